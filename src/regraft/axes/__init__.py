"""What the tensors of a model are: layers, embeddings, heads, per family of architectures."""

from regraft.axes.layout import Layout, layout
from regraft.axes.place import Place

__all__ = ["Layout", "Place", "layout"]
