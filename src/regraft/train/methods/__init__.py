"""One file per way to train a model: the methods of the verb `train`."""
