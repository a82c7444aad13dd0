"""LoRA adapters made: from the difference of two models, and from other adapters of one base."""
