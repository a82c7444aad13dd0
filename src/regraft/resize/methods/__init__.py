"""One file per way to compress a model: the methods of the verb `compress`."""
