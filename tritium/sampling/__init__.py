"""Logits to tokens: what requests ask, as the tensors that the sampling ops take, and back as plain values.

Shapes: S rows that sample, T prompt tokens, V vocabulary.
"""

from tritium.sampling.sampler import Sampled, draw, prompt_logprobs

__all__ = ["Sampled", "draw", "prompt_logprobs"]
