"""Who owns which KV page and which GDN slot: bookkeeping in integers, the memory itself lives in the runner."""

from tritium.cache.pools import PagePool, SlotPool, pages_for
from tritium.cache.prefix import Checkpoint, Lease, Match, Node, PrefixCache, common_prefix

__all__ = [
    "Checkpoint", "Lease", "Match", "Node", "PagePool", "PrefixCache", "SlotPool", "common_prefix", "pages_for",
]  # fmt: skip
