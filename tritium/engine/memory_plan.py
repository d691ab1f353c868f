"""How the device's memory is divided, computed before anything is loaded.

    budget = weights + workspace + state slots + KV pages (+ what is left unused)

Every part is a formula over the model's shapes, stated at its function. What cannot fit is refused with the
numbers and the flag to change; nothing is discovered by running out of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from tritium.cache import pages_for
from tritium.config import EngineConfig, flag
from tritium.core import PAGE_TOKENS, PROMPT_LOGITS, CapacityError, ConfigError
from tritium.hw import Target
from tritium.models.config import ModelConfig
from tritium.models.parameters import ITEM_BYTES, stored_sizes

_FLOAT32 = 4
_CHECKPOINT_SHARE = 1 / 8
_LEAST_CHECKPOINTS = 8
_MOST_CHECKPOINTS = 256
_CPU_CHECKPOINT_BYTES = 256 << 20
_HOST_BYTES = 4 << 30
_CPU_KV_BYTES = 4 << 30
"""Bytes of KV that a CPU takes without being asked: its memory is shared with everything else."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What is allocated: bytes, pages, slots. Page 0 and slot 0, for padding, come on top of those counted."""

    dtype: str
    """Compute dtype of matrices, activations, KV and convolution inputs."""
    device: str
    """Name of the device, for the table."""
    budget: int
    weights: int
    workspace: int
    bytes_per_page: int
    num_pages: int
    bytes_per_slot: int
    num_slots: int
    """Of running requests; the prefix cache's come on top."""
    num_checkpoints: int
    max_model_len: int
    quantization: str = ""
    """What weights are quantized to, and how many tensors are."""
    num_host_checkpoints: int = 0
    """Places for evicted checkpoints in host memory, outside the budget."""
    host_bytes: int = 0
    notes: tuple[str, ...] = ()
    """What was decided for the user, one sentence each."""

    @property
    def kv_bytes(self) -> int:
        return (self.num_pages + 1) * self.bytes_per_page

    @property
    def state_bytes(self) -> int:
        return (self.num_slots + self.num_checkpoints + 1) * self.bytes_per_slot

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.state_bytes + self.kv_bytes

    @property
    def max_tokens(self) -> int:
        """Tokens of all running requests together."""
        return self.num_pages * PAGE_TOKENS

    @property
    def full_length_requests(self) -> int:
        """Requests of max_model_len tokens that run at once."""
        return min(self.num_slots, self.num_pages // pages_for(self.max_model_len))

    def table(self) -> str:
        """The plan as aligned lines for a terminal."""
        page = f"{self.num_pages:,} pages of {PAGE_TOKENS} tokens, {size(self.bytes_per_page)} each"
        slots = f"{self.num_slots:,} requests and {self.num_checkpoints:,} checkpoints"
        rows = [
            ("weights", self.weights, ", ".join(filter(None, (self.dtype, self.quantization)))),
            ("state", self.state_bytes, f"{slots}, {size(self.bytes_per_slot)} each"),
            ("KV", self.kv_bytes, page),
            ("workspace", self.workspace, "activations and logits of one step, at most"),
            ("total", self.total, f"of {size(self.budget)} that may be used on {self.device}"),
        ]
        if self.num_host_checkpoints:
            rows.append(("host", self.host_bytes, f"{self.num_host_checkpoints:,} evicted checkpoints, in host memory"))
        lines = [f"  {name:<10}{size(value):>11}  {what}" for name, value, what in rows]
        fits = f"{self.full_length_requests:,} of full length at once, {self.max_tokens:,} tokens in all"
        lines.append(f"  requests up to {self.max_model_len:,} tokens: {fits}")
        return "\n".join(["memory plan", *lines, *(f"  note: {note}" for note in self.notes)])


def plan_memory(config: ModelConfig, engine: EngineConfig, target: Target) -> MemoryPlan:
    """Divides the memory of `target` for `config` as `engine` asks.

    Slots come first (max_num_seqs, since every running request holds one), then the prefix cache's checkpoints (as many
    as the user names, or as 1/8 of what is left holds, 8 to 256, on a CPU 256 MiB at most), then KV pages from what is
    left: as many as the user names, or as max_num_seqs requests of max_model_len need, twice that with a prefix cache,
    on a CPU 4 GiB at most.
    Raises `ConfigError` for limits that contradict the checkpoint or each other, `CapacityError` for what does not
    fit, each with the flag to change.
    """
    _check_limits(config, engine, target)
    dtype = compute_dtype(config, engine, target)
    width = ITEM_BYTES[dtype]
    budget = _budget(engine, target)
    weights = sum(stored_sizes(config, width).values())
    asked_len = engine.max_model_len or config.max_position
    drafts = engine.drafts(config.mtp_layers > 0)
    fixed, per_row = workspace_bytes(config, engine.batched_tokens(target.is_gpu), asked_len, width, drafts)
    workspace = fixed + engine.max_num_seqs * per_row
    per_page, per_slot = bytes_per_page(config, width), bytes_per_slot(config, width, drafts)
    state = (engine.max_num_seqs + 1) * per_slot

    if weights + workspace > budget:
        raise CapacityError(
            f"the model does not fit: {size(weights)} of {dtype} weights and {size(workspace)} of workspace, "
            f"{size(budget)} may be used on {target.name}",
            hint=f"{_more_memory(target)}, or {_smaller(weights <= budget, dtype)}",
        )
    left = budget - weights - workspace - state
    if left < 2 * per_page:  # page 0 and one to use
        fit = (budget - weights - fixed - 2 * per_page - per_slot) // (per_slot + per_row)
        raise CapacityError(
            f"{engine.max_num_seqs} requests need {size(state)} of state, and {size(left + state)} are left "
            f"beside the weights ({size(weights)}) and the workspace ({size(workspace)})",
            hint=(f"--max-num-seqs {fit} at most, or " if fit >= 1 else "") + _more_memory(target),
        )

    checkpoints = _checkpoints(engine, target, left, per_slot, per_page)
    left -= checkpoints * per_slot
    pages, why = _pages(engine, target, left, per_page, asked_len)
    max_model_len, notes = asked_len, []
    if pages * PAGE_TOKENS < asked_len:
        if engine.max_model_len is not None:
            raise CapacityError(
                f"one request of {asked_len:,} tokens needs {size(pages_for(asked_len) * per_page)} of KV "
                f"({pages_for(asked_len):,} pages); {pages:,} pages fit ({why})",
                hint=f"--max-model-len {pages * PAGE_TOKENS} at most, or {_more_pages(engine, target)}",
            )
        max_model_len = pages * PAGE_TOKENS
        notes.append(f"max_model_len lowered from {asked_len:,} (the checkpoint's) to {max_model_len:,}: {why}")
    hosted = _host_checkpoints(engine, target, bytes_per_slot(config, width))
    return MemoryPlan(
        dtype=dtype,
        device=target.name,
        budget=budget,
        weights=weights,
        workspace=workspace,
        bytes_per_page=per_page,
        num_pages=pages,
        bytes_per_slot=per_slot,
        num_slots=engine.max_num_seqs,
        num_checkpoints=checkpoints,
        max_model_len=max_model_len,
        quantization=config.quantization,
        num_host_checkpoints=hosted,
        host_bytes=hosted * bytes_per_slot(config, width),
        notes=tuple(notes),
    )


def fits(config: ModelConfig, engine: EngineConfig, target: Target, context: int) -> int:
    """Requests of `context` tokens that fit at once, at most: with nothing left for a prefix cache."""
    width, asked = ITEM_BYTES[compute_dtype(config, engine, target)], engine.max_model_len or config.max_position
    drafts = engine.drafts(config.mtp_layers > 0)
    fixed, per_row = workspace_bytes(config, engine.batched_tokens(target.is_gpu), max(asked, context), width, drafts)
    per_page, per_slot = bytes_per_page(config, width), bytes_per_slot(config, width, drafts)
    left = _budget(engine, target) - sum(stored_sizes(config, width).values()) - fixed - per_page - per_slot
    return max(0, left // (per_row + per_slot + pages_for(context) * per_page))


def compute_dtype(config: ModelConfig, engine: EngineConfig, target: Target) -> str:
    """The dtype asked for; auto is the checkpoint's on a GPU and float32 on a CPU."""
    if engine.dtype != "auto":
        return engine.dtype
    return config.dtype if target.is_gpu else "float32"


def bytes_per_page(config: ModelConfig, width: int) -> int:
    """Keys and values of 64 tokens in every attention layer, MTP's included; `width` bytes an element."""
    layers = len(config.attention_layers) + config.mtp_layers
    return 2 * PAGE_TOKENS * config.num_kv_heads * config.head_dim * width * layers


def bytes_per_slot(config: ModelConfig, width: int, drafts: int = 0) -> int:
    """Per GDN layer: nv dk dv float32 of recurrent state, a ring of cw + D convolution inputs of C channels, and the
    inputs of the D drafts under verification, nv (dk + dv + 2) float32 each."""
    recurrent = config.gdn_value_heads * config.gdn_key_dim * config.gdn_value_dim * _FLOAT32
    convolution = (config.conv_width + drafts) * config.conv_channels * width
    pending = drafts * config.gdn_value_heads * (config.gdn_key_dim + config.gdn_value_dim + 2) * _FLOAT32
    return (recurrent + convolution + pending) * len(config.gdn_layers)


def workspace_bytes(config: ModelConfig, tokens: int, positions: int, width: int, drafts: int = 0
) -> tuple[int, int]:
    """What a step of T tokens needs at most beside weights and pools: (in any case, more for each of its rows).

    w bytes an element, 4 where an op makes a float32 copy. The stream, the largest layer and the rope table:

    stream     3 T H w                           the residual, its norm, the layer's output
    GDN        T (C + nv dv) w + 4 T (2 C + nv (2 dk + 3 dv))    projections; convolution, q, k, v, output
    attention  T (2 nq + 2 nkv) d w + 12 T nq d                  projections; query, sum, output
               + 2048 r (2 nkv d (w + 4) + 8 m)  keys and values of 32 pages, their scores and weights, for r = 16
                                                 decode rows of m = max((D + 1) nq, 8 nkv) for D drafts, or one
                                                 prefill row of m = 256 nq
    MLP        3 T I (w + 4)                     gate, up, product
    experts    3 T (Im + Is) (w + 4) + T K H (w + 4) + 20 T E    one expert may get every token; outputs; router
    prompts    9 V min(T, 128)                   logits, a copy, masks
    rope       4 L (rotary dims)

    and each row: 8 nv dk dv for its state in one layer and a product of that size; 20 V (D + 1) for float32 logits,
    their sorted copy with int64 ids, and probabilities.
    """
    both, hidden = width + _FLOAT32, config.hidden_size
    values = config.gdn_value_heads * config.gdn_value_dim
    gdn_float32 = 2 * config.conv_channels + 2 * config.gdn_value_heads * config.gdn_key_dim + 3 * values
    gdn = tokens * ((config.conv_channels + values) * width + _FLOAT32 * gdn_float32)

    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    decode = 16 * (2 * keys * both + 8 * max((drafts + 1) * config.num_heads, 8 * config.num_kv_heads))
    prefill = 2 * keys * both + 8 * 256 * config.num_heads
    attention = tokens * (2 * (queries + keys) * width + 12 * queries) + 2048 * max(decode, prefill)

    mlp = 3 * tokens * config.intermediate_size * both
    if moe := config.moe:
        inner = 3 * (moe.intermediate_size + moe.shared_intermediate_size) + moe.experts_per_token * hidden
        mlp = tokens * (inner * both + 20 * moe.num_experts)

    rope = _FLOAT32 * positions * config.rope.rotary_dim
    prompts = 9 * min(tokens, PROMPT_LOGITS) * config.vocab_size
    fixed = 3 * tokens * hidden * width + max(gdn, attention, mlp, prompts) + rope
    return fixed, 8 * values * config.gdn_key_dim + 20 * config.vocab_size * (drafts + 1)


def size(count: int) -> str:
    """Bytes in words: 1536 -> 1.5 KiB."""
    value, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if abs(value) < 1024 or unit == units[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.3g} {unit}"


def _check_limits(config: ModelConfig, engine: EngineConfig, target: Target) -> None:
    if engine.max_model_len is not None and engine.max_model_len > config.max_position:
        raise ConfigError(
            f"--max-model-len {engine.max_model_len} is above the checkpoint's limit of {config.max_position}",
            hint=f"--max-model-len {config.max_position} at most",
        )
    if engine.batched_tokens(target.is_gpu) < engine.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {engine.batched_tokens(target.is_gpu)} is less than --max-num-seqs "
            f"{engine.max_num_seqs}: a step computes one token of every running request",
            hint=f"--max-num-batched-tokens {engine.max_num_seqs} at least, or a smaller --max-num-seqs",
        )


def _budget(engine: EngineConfig, target: Target) -> int:
    """Bytes the plan may use: a share of all memory on a GPU, of free memory on a CPU; never more than is free."""
    base = target.memory_total if target.is_gpu else target.memory_available
    return min(int(base * engine.gpu_memory_utilization), target.memory_available)


def _checkpoints(engine: EngineConfig, target: Target, left: int, per_slot: int, per_page: int) -> int:
    """Slots of the prefix cache, from `left` bytes that they share with the KV pages."""
    if not engine.enable_prefix_caching:
        return 0
    fit = (left - 2 * per_page) // per_slot if per_slot else _MOST_CHECKPOINTS
    if engine.num_checkpoints is not None:
        if engine.num_checkpoints > fit:
            raise CapacityError(
                f"{flag('num_checkpoints')} {engine.num_checkpoints} asks for "
                f"{size(engine.num_checkpoints * per_slot)} of state, and {size(left)} are left",
                hint=f"{flag('num_checkpoints')} {fit} at most, or {_more_memory(target)}",
            )
        return engine.num_checkpoints
    share = int(left * _CHECKPOINT_SHARE)
    if not target.is_gpu:
        share = min(share, _CPU_CHECKPOINT_BYTES)
    wanted = min(_MOST_CHECKPOINTS, share // per_slot if per_slot else _MOST_CHECKPOINTS)
    # Below the least that is of use: half of what is left at most, so that there is KV to go with them.
    return max(wanted, min(_LEAST_CHECKPOINTS, fit // 2))


def _host_checkpoints(engine: EngineConfig, target: Target, per_state: int) -> int:
    """Places for evicted checkpoints; a power of two of bytes by default, as pinned memory is rounded up to one."""
    if not engine.enable_prefix_caching or not per_state:
        return 0
    if engine.swap_space is None:
        return min(_HOST_BYTES, target.host_memory // 8) // per_state
    asked, available = int(engine.swap_space * 2**30), target.host_memory or target.memory_available
    if asked > available:
        raise CapacityError(f"{flag('swap_space')} {engine.swap_space:g} asks for {size(asked)} of host memory, and "
                            f"{size(available)} are available", hint=f"{available / 2**30:.1f} at most")
    return asked // per_state


def _pages(engine: EngineConfig, target: Target, left: int, per_page: int, asked_len: int) -> tuple[int, str]:
    """Pages of the pool besides page 0, and what limited them, in words."""
    wanted = engine.max_num_seqs * pages_for(asked_len) * (2 if engine.enable_prefix_caching else 1)
    if per_page == 0:  # no attention layer: pages cost nothing
        return engine.num_gpu_blocks_override or wanted, "no attention layer"
    fit = left // per_page - 1
    named, by_user = None, ""
    if engine.num_gpu_blocks_override is not None:
        named = engine.num_gpu_blocks_override
        by_user = f"{flag('num_gpu_blocks_override')} {named}"
    elif engine.kv_cache_memory_bytes is not None:
        named = engine.kv_cache_memory_bytes // per_page - 1
        by_user = f"{flag('kv_cache_memory_bytes')} {engine.kv_cache_memory_bytes}"
    if named is not None:
        if named < 1:
            raise CapacityError(
                f"{by_user} holds no page of KV", hint=f"at least {2 * per_page}: page 0 and one to use"
            )
        if named > fit:
            raise CapacityError(
                f"{by_user} asks for {size((named + 1) * per_page)} of KV, and {size(left)} are left",
                hint=f"{fit} pages ({(fit + 1) * per_page} bytes) at most, or {_more_memory(target)}",
            )
        return named, by_user
    if not target.is_gpu:
        least = pages_for(engine.max_model_len) if engine.max_model_len else 1  # one request that was asked for
        capped = max(least, _CPU_KV_BYTES // per_page - 1)
        if capped < min(wanted, fit):
            note = f"a CPU takes {size(_CPU_KV_BYTES)} of KV unless {flag('kv_cache_memory_bytes')} is given"
            return capped, note
    return min(wanted, fit), f"{size(left)} are left for KV"


def _more_memory(target: Target) -> str:
    share = f"a larger {flag('gpu_memory_utilization')}"
    return share if target.is_gpu else f"{share}, more free memory"


def _smaller(weights_fit: bool, dtype: str) -> str:
    if weights_fit:
        return f"a smaller {flag('max_num_batched_tokens')} or {flag('max_num_seqs')}"
    return "--dtype bfloat16 or a smaller model" if dtype == "float32" else "a smaller model"


def _more_pages(engine: EngineConfig, target: Target) -> str:
    if engine.num_gpu_blocks_override is not None:
        return f"a larger {flag('num_gpu_blocks_override')}"
    if engine.kv_cache_memory_bytes is not None:
        return f"a larger {flag('kv_cache_memory_bytes')}"
    return f"{_more_memory(target)}, a smaller {flag('max_num_seqs')}"
