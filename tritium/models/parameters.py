"""The parameters of a network, where each checkpoint tensor goes and how it is stored: shapes only, no tensors.

All of it comes from one declaration, so it cannot disagree. See docs/architecture.md for names, shapes and symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tritium.core.errors import ConfigError
from tritium.models.config import FULL, ModelConfig
from tritium.ops.quantized import SCHEMES, Scheme, stored_bytes

Shape = tuple[int, ...]
Role = Literal["matrix", "vector"]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
IGNORED = ("visual.",)
"""Checkpoint tensors (prefixes of canonical names) that the text model leaves unloaded: the vision tower."""

_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.")


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    shape: Shape
    role: Role
    """matrix: in the compute dtype; vector: in float32 (norms, convolution, decay)."""


@dataclass(frozen=True, slots=True)
class Placement:
    """One checkpoint tensor of shape `shape` fills rows [start, stop) of `parameter` (of its expert `expert`)."""

    parameter: str
    shape: Shape
    """Shape in the checkpoint; the region holds the same elements in the same order."""
    start: int
    stop: int
    expert: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows [start, stop) of a matrix (of every expert's), stored in one way: in the compute dtype, or in a scheme."""

    start: int
    stop: int
    scheme: Scheme | None


def parameter_shapes(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Every parameter of the network, by the names of docs/architecture.md."""
    return _declare(config).specs


def placements(config: ModelConfig) -> dict[str, Placement]:
    """Canonical checkpoint name -> its region. Fused and per-expert spellings of experts are both there."""
    return _declare(config).places


def canonical_name(name: str) -> str:
    """A checkpoint's tensor name without the prefix of its class: `layers.0...`, `mtp...`, `lm_head.weight`."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def quantizable(config: ModelConfig) -> list[str]:
    """Canonical names of the matrices that tokens are multiplied by; experts in the fused spelling too."""
    d = _declare(config)
    matrices = [name for name, place in d.places.items() if d.specs[place.parameter].role == "matrix"]
    return [name for name in matrices if name != "embed_tokens.weight"]


def blocks(config: ModelConfig) -> dict[str, tuple[Block, ...]]:
    """How each matrix is stored, from its first row to its last. Raises `ConfigError` where experts of a layer are not
    stored alike."""
    d, schemes = _declare(config), {name: SCHEMES[scheme] for name, scheme in config.schemes}
    apart = {d.places[name].parameter for name in schemes if d.places[name].expert is not None}
    pieces: dict[str, dict[tuple[int, int], set[Scheme | None]]] = {}
    for name, place in d.places.items():
        spec, fused = d.specs[place.parameter], place.expert is None
        if spec.role == "vector" or (len(spec.shape) > 2 and fused == (place.parameter in apart)):
            continue
        rows = (0, spec.shape[1]) if len(spec.shape) > 2 and fused else (place.start, place.stop)
        pieces.setdefault(place.parameter, {}).setdefault(rows, set()).add(schemes.get(name))
    return {parameter: _merged(parameter, found) for parameter, found in pieces.items()}


def _merged(parameter: str, pieces: dict[tuple[int, int], set[Scheme | None]]) -> tuple[Block, ...]:
    found: list[Block] = []
    for (start, stop), kinds in sorted(pieces.items()):
        if len(kinds) > 1:
            raise ConfigError(f"{parameter}: the experts of a layer must all be stored in the same way")
        (scheme,) = kinds
        last = found[-1] if found else None
        if last and last.scheme == scheme and (scheme is None or (start - last.start) % scheme.rows == 0):
            found[-1] = Block(last.start, stop, scheme)
        else:
            found.append(Block(start, stop, scheme))
    return tuple(found)


def stored_sizes(config: ModelConfig, width: int) -> dict[str, int]:
    """Bytes of every parameter, `width` an element of a matrix that is not quantized."""
    stored, sizes = blocks(config), {}
    for name, spec in parameter_shapes(config).items():
        sizes[name] = ITEM_BYTES["float32"] * math.prod(spec.shape)
        if spec.role == "matrix":
            *front, _, columns = spec.shape
            shapes = [((*front, block.stop - block.start, columns), block.scheme) for block in stored[name]]
            sizes[name] = sum(stored_bytes(s, shape) if s else width * math.prod(shape) for shape, s in shapes)
    return sizes


class _Declaration:
    """Collects parameters together with the checkpoint tensors that fill them."""

    def __init__(self) -> None:
        self.specs: dict[str, ParameterSpec] = {}
        self.places: dict[str, Placement] = {}

    def stacked(self, parameter: str, role: Role, *sources: tuple[str, Shape]) -> None:
        """`parameter` is the concatenation of `sources` (checkpoint name, shape) along their rows."""
        row = 0
        for name, shape in sources:
            self.places[name] = Placement(parameter, shape, row, row + shape[0])
            row += shape[0]
        self.specs[parameter] = ParameterSpec((row, *sources[0][1][1:]), role)

    def vector(self, parameter: str, source: str, size: int) -> None:
        self.stacked(parameter, "vector", (source, (size,)))

    def matrix(self, parameter: str, source: str, rows: int, columns: int) -> None:
        self.stacked(parameter, "matrix", (source, (rows, columns)))

    def experts(self, parameter: str, fused: str, shape: Shape, each: Callable[[int], list[str]]) -> None:
        """`parameter` [E, rows, columns]: one such tensor, or the matrices `each(e)` of every expert e."""
        self.specs[parameter] = ParameterSpec(shape, "matrix")
        self.places[fused] = Placement(parameter, shape, 0, shape[0])
        for expert in range(shape[0]):
            names = each(expert)
            rows = shape[1] // len(names)
            for i, name in enumerate(names):
                self.places[name] = Placement(parameter, (rows, shape[2]), i * rows, (i + 1) * rows, expert)


def _declare(config: ModelConfig) -> _Declaration:
    d, H, V = _Declaration(), config.hidden_size, config.vocab_size
    d.matrix("embed.weight", "embed_tokens.weight", V, H)
    for i, kind in enumerate(config.layer_types):
        _layer(d, config, f"layers.{i}", f"layers.{i}", full=kind == FULL)
    d.vector("norm.weight", "norm.weight", H)
    if not config.tied_embeddings:
        d.matrix("lm_head.weight", "lm_head.weight", V, H)
    if config.mtp_layers:
        d.matrix("mtp.fc.weight", "mtp.fc.weight", H, 2 * H)
        d.vector("mtp.norm_embedding.weight", "mtp.pre_fc_norm_embedding.weight", H)
        d.vector("mtp.norm_hidden.weight", "mtp.pre_fc_norm_hidden.weight", H)
        _layer(d, config, "mtp.layer", "mtp.layers.0", full=True)
        d.vector("mtp.norm.weight", "mtp.norm.weight", H)
    return d


def _layer(d: _Declaration, config: ModelConfig, to: str, source: str, *, full: bool) -> None:
    d.vector(f"{to}.input_norm.weight", f"{source}.input_layernorm.weight", config.hidden_size)
    if full:
        _attention(d, config, f"{to}.attn", f"{source}.self_attn")
    else:
        _gdn(d, config, f"{to}.gdn", f"{source}.linear_attn")
    d.vector(f"{to}.post_norm.weight", f"{source}.post_attention_layernorm.weight", config.hidden_size)
    if config.moe is None:
        _mlp(d, config, f"{to}.mlp.", f"{source}.mlp", config.intermediate_size)
    else:
        _moe(d, config, f"{to}.moe", f"{source}.mlp")


def _gdn(d: _Declaration, config: ModelConfig, to: str, source: str) -> None:
    H, C, nv, dv = config.hidden_size, config.conv_channels, config.gdn_value_heads, config.gdn_value_dim
    rows = {"in_proj_qkv": C, "in_proj_z": nv * dv, "in_proj_b": nv, "in_proj_a": nv}
    d.stacked(f"{to}.in_proj.weight", "matrix", *((f"{source}.{n}.weight", (r, H)) for n, r in rows.items()))
    conv = f"{to}.conv.weight"
    d.specs[conv] = ParameterSpec((C, config.conv_width), "vector")
    d.places[f"{source}.conv1d.weight"] = Placement(conv, (C, 1, config.conv_width), 0, C)
    d.vector(f"{to}.A_log", f"{source}.A_log", nv)
    d.vector(f"{to}.dt_bias", f"{source}.dt_bias", nv)
    d.vector(f"{to}.norm.weight", f"{source}.norm.weight", dv)
    d.matrix(f"{to}.out_proj.weight", f"{source}.out_proj.weight", H, nv * dv)


def _attention(d: _Declaration, config: ModelConfig, to: str, source: str) -> None:
    H, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"q_proj": 2 * q, "k_proj": kv, "v_proj": kv}
    d.stacked(f"{to}.qkv_proj.weight", "matrix", *((f"{source}.{n}.weight", (r, H)) for n, r in rows.items()))
    d.vector(f"{to}.q_norm.weight", f"{source}.q_norm.weight", config.head_dim)
    d.vector(f"{to}.k_norm.weight", f"{source}.k_norm.weight", config.head_dim)
    d.matrix(f"{to}.o_proj.weight", f"{source}.o_proj.weight", H, q)


def _mlp(d: _Declaration, config: ModelConfig, to: str, source: str, width: int) -> None:
    H = config.hidden_size
    sources = ((f"{source}.{n}_proj.weight", (width, H)) for n in ("gate", "up"))
    d.stacked(f"{to}gate_up.weight", "matrix", *sources)
    d.matrix(f"{to}down.weight", f"{source}.down_proj.weight", H, width)


def _moe(d: _Declaration, config: ModelConfig, to: str, source: str) -> None:
    assert config.moe is not None
    H, E, Im = config.hidden_size, config.moe.num_experts, config.moe.intermediate_size
    experts = f"{source}.experts"
    rows = ((f"{source}.gate.weight", (E, H)), (f"{source}.shared_expert_gate.weight", (1, H)))
    d.stacked(f"{to}.router.weight", "matrix", *rows)
    d.experts(
        f"{to}.experts_gate_up.weight",
        f"{experts}.gate_up_proj",
        (E, 2 * Im, H),
        lambda e: [f"{experts}.{e}.gate_proj.weight", f"{experts}.{e}.up_proj.weight"],
    )
    d.experts(
        f"{to}.experts_down.weight",
        f"{experts}.down_proj",
        (E, H, Im),
        lambda e: [f"{experts}.{e}.down_proj.weight"],
    )
    _mlp(d, config, f"{to}.shared_", f"{source}.shared_expert", config.moe.shared_intermediate_size)
