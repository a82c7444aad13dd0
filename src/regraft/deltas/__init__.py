"""Deltas as artefacts ("chat vectors"): what fine-tuning changed, stored apart from the base, and put back on it."""
