"""Parameters in memory: made as `blocks` says, filled tensor by tensor."""

from __future__ import annotations

import torch

from tritium.hw import probe
from tritium.models.config import ModelConfig
from tritium.models.parameters import Placement, blocks, parameter_shapes
from tritium.ops.quantized import WEIGHT_ONLY, Quantized, Weight, Weights, empty, expert_of, quantize_into, row_blocks


def allocate(config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str,
             features: frozenset[str] | None = None) -> dict[str, Weights]:
    """Every parameter of `config`: matrices in `dtype` or in the blocks of their schemes, vectors in float32; nobody
    has written them yet. `features`: of the device's target, where that cannot be asked."""
    device = torch.device(device)
    if features is None:
        # On a CPU nothing has a dot of e4m3; there, fp8 computes what GPUs that have one compute.
        features = frozenset({"dot_fp8"}) if device.type in ("cpu", "meta") else probe(str(device)).features
    stored, found = blocks(config), dict[str, Weights]()
    for name, spec in parameter_shapes(config).items():
        if spec.role == "vector":
            found[name] = torch.empty(spec.shape, dtype=torch.float32, device=device)
            continue
        *front, _, columns = spec.shape
        parts: list[Weight] = []
        for block in stored[name]:
            shape, scheme = (*front, block.stop - block.start, columns), block.scheme
            if scheme is None:
                parts.append(torch.empty(shape, dtype=dtype, device=device))
            else:
                served = scheme if "dot_fp8" in features else WEIGHT_ONLY.get(scheme.name, scheme)
                parts.append(empty(served, shape, dtype, device))
        found[name] = tuple(parts) if len(parts) > 1 else parts[0]
    return found


def fill(weight: Weights, place: Placement, *source: torch.Tensor) -> None:
    """Puts a checkpoint's tensor where it belongs, quantized if its place is; `source` may be values and scales that
    are so already. Raises `ValueError` for numbers that cannot be quantized."""
    region = _region(weight, place)
    if isinstance(region, torch.Tensor):
        region.copy_(source[0].reshape(region.shape))
    elif len(source) == 1:
        quantize_into(region, source[0])
    else:
        _take(region, *source)


def _region(weight: Weights, place: Placement) -> torch.Tensor | Quantized:
    if isinstance(weight, torch.Tensor):
        return (weight if place.expert is None else weight[place.expert])[place.start : place.stop]
    start, every = place.start, row_blocks(weight)
    if len(every[0].shape) > 2 and place.expert is None:
        return every[0]  # the experts of a layer in one tensor
    for block in every:
        if start < block.shape[-2]:
            break
        start -= block.shape[-2]
    if place.expert is not None:
        block = expert_of(block, place.expert)  # type: ignore[assignment]
    stop = start + place.stop - place.start
    return block[start:stop] if isinstance(block, torch.Tensor) else block.rows(start, stop)


def _take(region: Quantized, values: torch.Tensor, scales: torch.Tensor) -> None:
    kept = region.scheme.scales
    values = values.view(torch.uint8) if region.scheme.bits == 4 else values
    region.values.copy_(values.reshape(region.values.shape))
    region.scales.copy_(scales.reshape(region.scales.shape))
    if kept == torch.uint8:
        return
    nan = region.values.dtype == torch.float8_e4m3fn and (region.values.view(torch.uint8) & 127 == 127).any()
    if nan or not region.scales.isfinite().all():
        raise ValueError("NaN or infinity among the numbers")
    if not torch.equal(region.scales.cpu().double(), scales.reshape(region.scales.shape).double()):
        raise ValueError(f"its scales, {str(scales.dtype)[6:]}, are no {str(kept)[6:]}")
