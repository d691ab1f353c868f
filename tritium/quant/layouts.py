"""How checkpoints that bring quantized tensors spell them: `quantization_config` of config.json, read and written.

    fp8 (official)       NAME F8_E4M3, NAME_scale_inv a block of 128 x 128
    compressed-tensors   int8, fp8: NAME, NAME_scale a row;  int4: NAME_packed (8 in an int32), NAME_scale, NAME_shape
    tritium              NAME (values as `ops.quantized` keeps them) and NAME_scale

A tensor without scales is as it always was, so lists of modules that were left out need not be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritium.config import SCHEMES
from tritium.core.errors import ConfigError

_OURS = "tritium"
_SUPPORTED = (
    "fp8 with weight_block_size [128, 128] and dynamic activations; compressed-tensors: int-quantized (8 bits by "
    "channel, tokens dynamic), float-quantized (so too), pack-quantized (4 bits, symmetric, groups of 128); what "
    "`tritium quantize` writes; or an unquantized checkpoint with --quantize"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a quantized tensor are, by what is put behind its name."""

    scheme: str
    scales: str = "_scale"
    values: str = ""
    beside: tuple[str, ...] = ()
    """More that belongs to it and tells nothing new."""


def _numbers(bits: int, kind: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **more}


_COMPRESSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, Layout]] = {
    "int-quantized": (_numbers(8, "int", strategy="channel"), _numbers(8, "int", strategy="token", dynamic=True),
                      Layout("int8")),
    "float-quantized": (_numbers(8, "float", strategy="channel"), _numbers(8, "float", strategy="token", dynamic=True),
                        Layout("fp8")),
    "pack-quantized": (_numbers(4, "int", strategy="group", group_size=128), None,
                       Layout("int4", values="_packed", beside=("_shape",))),
}  # fmt: skip
"""Format: what it must say of weights and activations."""


def declaration(scheme: str) -> dict[str, str]:
    """The `quantization_config` of what `tritium quantize` writes."""
    return {"quant_method": _OURS, "scheme": scheme}


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a checkpoint by its config.json; None where nothing in it is quantized. Raises `ConfigError`."""
    for place in (config, config.get("text_config") or {}):
        if quantization := place.get("quantization_config") or place.get("compression_config"):
            return declared(quantization)
    return None


def declared(quantization: Any) -> Layout:
    """The layout that a `quantization_config` tells of. Raises `ConfigError` for one that is not supported."""
    told = quantization if isinstance(quantization, Mapping) else {"quant_method": quantization}
    method = told.get("quant_method")
    if method == _OURS and told.get("scheme") in SCHEMES:
        return Layout(told["scheme"])
    if method == "fp8":
        asked = {"weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
        defaults = {"activation_scheme": "dynamic", "fmt": "e4m3"}
        if not (wrong := _differences({**defaults, **told}, asked)):
            return Layout("fp8-block", scales="_scale_inv")
        raise _refused(f"fp8 with {wrong}")
    if method == "compressed-tensors":
        try:
            return _compressed(told)
        except AttributeError:  # a list or a text where that package writes an object
            raise _refused("compressed-tensors, damaged") from None
    raise _refused(str(method or "unnamed method"))


def _compressed(told: Mapping[str, Any]) -> Layout:
    kind, groups = told.get("format"), told.get("config_groups") or {}
    if kind not in _COMPRESSED or not groups:
        raise _refused(f"compressed-tensors, format {kind}")
    weights, activations, layout = _COMPRESSED[kind]
    status = told.get("quantization_status") and "compressed"
    wrong = _differences(told, {"kv_cache_scheme": None, "quantization_status": status})
    if (told.get("sparsity_config") or {}).get("format", "dense") != "dense":
        wrong += " sparsity_config"
    for group in groups.values():
        given = group.get("input_activations")
        wrong += _differences(group.get("weights") or {}, weights, dynamic=False)
        wrong += " actorder" if (group.get("weights") or {}).get("actorder") == "group" else ""
        wrong += _differences(given or {}, activations) if activations else " input_activations" if given else ""
        wrong += " output_activations" if group.get("output_activations") else ""
    if wrong:
        raise _refused(f"compressed-tensors, {kind} with {wrong.strip()}")
    return layout


def _differences(given: Mapping[str, Any], asked: Mapping[str, Any], **defaults: Any) -> str:
    found = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    return "".join(f" {name} {found.get(name)}" for name, value in asked.items() if found.get(name) != value)


def _refused(what: str) -> ConfigError:
    return ConfigError(f"config.json: quantization_config ({' '.join(what.split())}) is not supported", hint=_SUPPORTED)
