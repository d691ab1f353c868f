"""Logits to one token a row, and log-probabilities of tokens.

    edit:    x[i] ← rep(x[i] + bias) − minus      for the listed (row, i);   rep(y) = y / r if y > 0 else y · r
    allow:   x[i] ← -inf for every token outside the row's grammar
    greedy:  temperature 0:   token = argmax x,   ties to the lower id
    weigh:   w[i] = ⌊2^43 · exp((x[i] − max x) / temperature)⌋     an integer
    cut:     min_p: keep w ≥ min_p · 2^43
             top_k: keep the k first in falling order of w (ties: the lower id first)
             top_p: of these, the shortest prefix with Σ w ≥ top_p · Σ kept w
    draw:    token = the first id, in rising order of ids, at which the running sum of kept w exceeds u · Σ kept w
    u:       53 bits of Philox4x32-10 (Salmon et al., SC 2011) with key = seed, counter = position, over 2^53

    logprobs:  log softmax x at a token;  rank = 1 + the number of ids before it in falling order (ties: lower id)

Weights are integers so that their sums are exact: no order of summation, batch or device changes a draw. Their
quantum, 2^-43 of the likeliest token's weight, is far below what a seeded draw can tell. A cut is one comparison with
the last key kept, where key = w · 2^19 + (2^19 − 1 − id) orders by weight, then by id, and is unique.

A row whose largest edited logit is not finite (a NaN, +inf, or nothing but -inf) has no token: -1. Other -inf are
masks.

Shapes: S rows, V vocabulary (at most 2^19), E edits, K alternatives, W words of 32
tokens. logits_SV any float dtype; temperature_S,
top_p_S, min_p_S float64; top_k_S (0: all), seed_S, position_S, token_S, rank_S int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tritium.ops.spec import Dims, Op, OpSpec, randn, wide

_ONE = 2**43
"""Weight of the likeliest token; 2^19 of them still add up within 63 bits."""
_ID_BITS = 19
_LAST_ID = 2**_ID_BITS - 1
_LOW = 0xFFFFFFFF
_SLICE = 2**22
"""Logits worked on at a time, which bounds the float64 and int64 copies of a large vocabulary to some 100 MB."""


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes of single logits before anything else; each (row, id) at most once. Formula: see `edit` above."""

    row_E: torch.Tensor
    id_E: torch.Tensor
    bias_E: torch.Tensor
    """logit_bias, else 0."""
    repetition_E: torch.Tensor
    """repetition_penalty of a token that occurred, else 1."""
    minus_E: torch.Tensor
    """presence_penalty + frequency_penalty · count of a token that was generated, inf for a banned one, else 0."""


def edited(logits_SV: torch.Tensor, edits: Edits) -> torch.Tensor:
    """A copy. Waits for nothing: the same on every device."""
    x_SV = logits_SV.to(wide(logits_SV.dtype), copy=True)
    x_E = x_SV[edits.row_E, edits.id_E].double() + edits.bias_E
    x_E = torch.where(x_E > 0, x_E / edits.repetition_E, x_E * edits.repetition_E) - edits.minus_E
    x_SV[edits.row_E, edits.id_E] = x_E.to(x_SV.dtype)
    return x_SV


def philox4x32(counter_4S: torch.Tensor, key_2S: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 on int64 tensors that hold 32-bit words: [4, S] of a counter, [2, S] of a key to [4, S] random."""
    even_2S, odd_2S = counter_4S[0::2], counter_4S[1::2]
    multiplier_21 = torch.tensor([[0xD2511F53], [0xCD9E8D57]], device=key_2S.device)
    weyl_21 = torch.tensor([[0x9E3779B9], [0xBB67AE85]], device=key_2S.device)
    for _ in range(10):
        product_2S = (even_2S * multiplier_21).flip(0)  # may wrap into the sign bit: only its bits are used
        even_2S, odd_2S = (product_2S >> 32).bitwise_and_(_LOW) ^ odd_2S ^ key_2S, product_2S & _LOW
        key_2S = (key_2S + weyl_21).bitwise_and_(_LOW)
    return torch.stack([even_2S, odd_2S], 1).flatten(0, 1)


def uniform(seed_S: torch.Tensor, position_S: torch.Tensor) -> torch.Tensor:
    """One float64 in [0, 1) for each (seed, position), the same on every device."""
    zero_S = torch.zeros_like(position_S)
    counter_4S = torch.stack([position_S & _LOW, position_S >> 32 & _LOW, zero_S, zero_S])
    words_4S = philox4x32(counter_4S, torch.stack([seed_S & _LOW, seed_S >> 32 & _LOW]))
    return (words_4S[0] << 21 | words_4S[1] >> 11).double() * 2.0**-53


def _keys(order_SV: torch.Tensor) -> torch.Tensor:
    """Integers, in place, to unique keys of the same order in which the lower of equal ids comes first."""
    vocab = order_SV.shape[-1]
    order_SV <<= _ID_BITS
    order_SV += torch.arange(_LAST_ID, _LAST_ID - vocab, -1, device=order_SV.device)
    return order_SV


def _last_keys_kept(
    key_SV: torch.Tensor, total_S: torch.Tensor, top_k_S: torch.Tensor, top_p_S: torch.Tensor
) -> torch.Tensor:
    """The least key within top_k and top_p, [S, 1]; 0 for rows without either.

    Looks at as many of the largest keys as the rows turn out to need; integer sums make the answer the same however
    many are looked at.
    """
    vocab = key_SV.shape[-1]
    by_mass_S = top_p_S < 1
    k_S = torch.where(top_k_S > 0, top_k_S, vocab).clamp(max=vocab)
    width = min(vocab, max(int(top_k_S.max()), 64 if bool((by_mass_S & (top_k_S == 0)).any()) else 1))
    while True:
        best_SK = key_SV.topk(width, -1).values
        beyond_SK = torch.arange(width, device=k_S.device) >= k_S[:, None]
        mass_SK = (best_SK >> _ID_BITS).masked_fill_(beyond_SK, 0).cumsum(-1)
        target_S = top_p_S * torch.where(k_S <= width, mass_SK[:, -1], total_S)
        if width == vocab or bool(((k_S <= width) | ~by_mass_S | (mass_SK[:, -1] >= target_S)).all()):
            break
        width = min(vocab, 4 * width)
    prefix_S = (mass_SK < target_S[:, None]).sum(-1) + 1
    kept_S = torch.where(by_mass_S, prefix_S, k_S).clamp(max=width)
    last_S1 = best_SK.gather(-1, kept_S[:, None] - 1)
    return last_S1.masked_fill_(~(by_mass_S | (top_k_S > 0))[:, None], 0)


def _draw(
    logits_SV: torch.Tensor,
    peak_S: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    uniform_S: torch.Tensor,
) -> torch.Tensor:
    """Anything for rows without a finite peak or with temperature 0. In place wherever it can: new memory costs more
    than the arithmetic."""
    x_SV = logits_SV.to(torch.float64, copy=True).sub_(peak_S[:, None]).div_(temperature_S[:, None])
    weight_SV = x_SV.exp_().mul_(_ONE).long()
    if bool((min_p_S > 0).any()):
        weight_SV.masked_fill_(weight_SV < (min_p_S * _ONE).ceil().long()[:, None], 0)
    if bool(((top_k_S > 0) | (top_p_S < 1)).any()):
        key_SV = _keys(weight_SV.clone())
        last_S1 = _last_keys_kept(key_SV, weight_SV.sum(-1), top_k_S, top_p_S)
        weight_SV.masked_fill_(key_SV < last_S1, 0)
    sum_SV = weight_SV.cumsum_(-1)
    total_S = sum_SV[:, -1]
    goal_S = torch.minimum((uniform_S * total_S).long(), total_S - 1)
    return torch.searchsorted(sum_SV, goal_S[:, None], right=True)[:, 0]


def reference(
    *,
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    edits: Edits | None = None,
    allowed_SW: torch.Tensor | None = None,
    token_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens, -1 where there is none: in `token_S`, if given. Changes no other argument.

    `allowed_SW`: int32, bit t % 32 of word t / 32 says whether token t may be drawn.
    """
    check_vocabulary(logits_SV)
    if edits is not None:
        logits_SV = edited(logits_SV, edits)
    if allowed_SW is not None:
        bit_32 = torch.arange(32, dtype=torch.int32, device=allowed_SW.device)
        banned_SV = ((allowed_SW[:, :, None] >> bit_32) & 1).flatten(1)[:, : logits_SV.shape[-1]] == 0
        logits_SV = logits_SV.masked_fill(banned_SV, -torch.inf)
    best_S = logits_SV.argmax(-1)  # the first of equals; a NaN counts as the largest
    peak_S = logits_SV.gather(-1, best_S[:, None])[:, 0].double()
    drawn_S = temperature_S > 0
    if bool(drawn_S.any()):
        columns = (logits_SV, peak_S, temperature_S, top_k_S, top_p_S, min_p_S, uniform(seed_S, position_S))
        parts = zip(*(column.split(_rows(logits_SV)) for column in columns), strict=True)
        best_S = torch.where(drawn_S, torch.cat([_draw(*part) for part in parts]), best_S)
    best_S = best_S.masked_fill(~peak_S.isfinite(), -1)
    return best_S if token_S is None else token_S.copy_(best_S)


def logprobs_reference(
    *, logits_SV: torch.Tensor, token_S: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob_S float32, rank_S from 1, top_SK ids best first, top_logprob_SK float32), K = min(k, V)."""
    check_vocabulary(logits_SV)
    parts = zip(logits_SV.split(_rows(logits_SV)), token_S.split(_rows(logits_SV)), strict=True)
    columns = zip(*(_logprobs(x_SV, t_S, k) for x_SV, t_S in parts), strict=True)
    logprob_S, rank_S, top_SK, top_logprob_SK = (torch.cat(column) for column in columns)
    return logprob_S, rank_S, top_SK, top_logprob_SK


def _logprobs(logits_SV: torch.Tensor, token_S: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    # Floats as integers in the same order: negative ones have their magnitude turned; + 0.0 makes -0.0 equal 0.0.
    bits_SV = (logits_SV.float() + 0.0).view(torch.int32)
    bits_SV ^= (bits_SV >> 31).bitwise_and_(0x7FFFFFFF)
    key_SV = _keys(bits_SV.long())
    rank_S = 1 + (key_SV > key_SV.gather(-1, token_S[:, None])).sum(-1)
    top_SK = _LAST_ID - (key_SV.topk(min(k, key_SV.shape[-1]), -1).values & _LAST_ID)
    x_SV = logits_SV.double()
    wanted_SK = x_SV.gather(-1, torch.cat([token_S[:, None], top_SK], -1)) - x_SV.logsumexp(-1, keepdim=True)
    return wanted_SK[:, 0].float(), rank_S, top_SK, wanted_SK[:, 1:].float()


def _rows(logits_SV: torch.Tensor) -> int:
    """Rows that are worked on at a time."""
    return max(1, _SLICE // logits_SV.shape[-1])


def check_vocabulary(logits_SV: torch.Tensor) -> None:
    if logits_SV.shape[-1] > _LAST_ID + 1:
        raise ValueError(f"a vocabulary of {logits_SV.shape[-1]}; sampling handles at most {_LAST_ID + 1}")


def _inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    s = dims["S"]

    def among(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (s,), generator=generator)]

    return {
        "logits_SV": randn(generator, s, dims["V"], dtype=dtype, scale=3.0),
        "temperature_S": among(0.0, 0.6, 1.0, 2.0),
        "top_k_S": among(0, 1, 20, 100).long(),
        "top_p_S": among(0.5, 0.95, 1.0),
        "min_p_S": among(0.0, 0.05),
        "seed_S": torch.randint(-(2**62), 2**62, (s,), generator=generator),
        "position_S": torch.randint(2**20, (s,), generator=generator),
    }


def _logprobs_inputs(dims: Dims, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    s, v = dims["S"], dims["V"]
    tokens = torch.randint(v, (s,), generator=generator)
    return {"logits_SV": randn(generator, s, v, dtype=dtype, scale=3.0), "token_S": tokens, "k": dims["K"]}


SPEC = OpSpec(
    name="sample",
    cases=({"S": 1, "V": 77}, {"S": 33, "V": 2051}),
    inputs=_inputs,
    results=lambda arguments, returned: {"token_S": returned},
    bytes_moved=lambda d, size: d["S"] * (size * d["V"] + 8),
    flops=lambda d: 4 * d["S"] * d["V"],
    # Rounding the logits changes the choice itself, so only the wide dtype can be compared number by number.
    dtypes=(torch.float32,),
)

LOGPROBS_SPEC = OpSpec(
    name="logprobs",
    cases=({"S": 1, "V": 77, "K": 5}, {"S": 9, "V": 2051, "K": 20}),
    inputs=_logprobs_inputs,
    results=lambda arguments, returned: dict(zip(("logprob_S", "rank_S", "top_SK", "top_logprob_SK"), returned)),
    bytes_moved=lambda d, size: d["S"] * (size * d["V"] + 12 * (1 + d["K"])),
    flops=lambda d: 4 * d["S"] * d["V"],
    dtypes=(torch.float32,),
)

sample = Op(SPEC, reference, "sampling:sample")
logprobs = Op(LOGPROBS_SPEC, logprobs_reference, "sampling:logprobs")


def call_every_form(logits_SV: torch.Tensor) -> None:
    """Calls `sample` and `logprobs` with everything that a request may ask for: what is compiled ahead of requests."""
    draws, vocab = logits_SV.shape

    def column(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape or draws, dtype=dtype, device=logits_SV.device)

    whole, real = torch.int64, torch.float64
    none_E = column(whole, 0), column(whole, 0), *(column(real, 0) for _ in range(3))
    allowed_SW = column(torch.int32, draws, -(-vocab // 32))
    for edits, allowed in ((None, None), (None, allowed_SW), (Edits(*none_E), None)):
        sample(logits_SV=logits_SV, temperature_S=column(real), top_k_S=column(whole), top_p_S=column(real),
               min_p_S=column(real), seed_S=column(whole), position_S=column(whole), edits=edits,
               allowed_SW=allowed)  # fmt: skip
    logprobs(logits_SV=logits_SV, token_S=column(whole), k=1)
