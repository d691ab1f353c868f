"""Logits to tokens: what requests ask, as the tensors that the sampling ops take, and back as plain values.

Shapes: S rows that sample, T prompt tokens, V vocabulary.
"""

from tritium.sampling.sampler import Sampled, Sampler, prompt_logprobs

__all__ = ["Sampled", "Sampler", "prompt_logprobs"]
