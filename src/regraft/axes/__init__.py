"""What the tensors of each model family are: layers, embeddings, heads. Parameter names stand here, nowhere else."""

from __future__ import annotations

from regraft.axes.layout import Layout, Place, layout

__all__ = ["Layout", "Place", "layout"]
