"""What the tensors of a model are: layers, embeddings, heads, per family of architectures."""

from regraft.axes.layout import Layout, flat_layout, layout
from regraft.axes.modules import Modules
from regraft.axes.place import Place

__all__ = ["Layout", "Modules", "Place", "flat_layout", "layout"]
