"""Tritium: an inference engine for hybrid language models (Gated DeltaNet + attention + MTP)."""
