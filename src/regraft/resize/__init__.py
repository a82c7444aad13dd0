"""Make a model smaller or larger: its modules replaced, the change recorded, and folded back where that is possible."""
