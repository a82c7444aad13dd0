"""Experiments, one per paper, that can fail; `regraft claims` runs them."""
