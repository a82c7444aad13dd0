"""One file per loss over a batch; what they share is in `regraft.train`."""
