"""Look at models: what one is (`facts`), how several differ and whether they fit (`compare`), what fine-tuning changed
(`deltas`). Metrics for evaluation are in `metrics`.
"""
