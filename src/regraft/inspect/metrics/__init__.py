"""Metrics: one file each; a recipe's `evaluate:` step names one."""
