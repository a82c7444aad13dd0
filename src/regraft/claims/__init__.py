"""Experiments that can fail, one per paper: what a claim is, how it is judged, run and shown. The experiments
themselves are in the repository's folder `claims/`."""
