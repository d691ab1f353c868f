"""Which tensors of a checkpoint are stored in fewer bits, and how checkpoints spell those that are. No torch."""

from tritium.quant.layouts import Layout, declaration, declared
from tritium.quant.policy import pattern, select

__all__ = ["Layout", "declaration", "declared", "pattern", "select"]
