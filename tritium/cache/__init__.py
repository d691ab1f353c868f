"""Who owns which KV page and which GDN slot: bookkeeping in integers, the memory itself lives in the runner."""

from tritium.cache.pools import PagePool, SlotPool, pages_for

__all__ = ["PagePool", "SlotPool", "pages_for"]
