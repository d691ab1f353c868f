"""Which tensors of a checkpoint are stored in fewer bits, and how checkpoints spell those that are. No torch."""

from tritium.quant.layouts import Layout, declaration, declared, layout_of
from tritium.quant.policy import pattern, select

__all__ = ["Layout", "declaration", "declared", "layout_of", "pattern", "select"]
