"""`tritium quantize`: a checkpoint with the tensors of its scheme quantized, written tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch

from tritium.core.errors import CheckpointError, ConfigError
from tritium.models.checkpoint import INDEX, STORED_AS, Checkpoint, StoredTensor, read, read_json, stored_tensors
from tritium.models.parameters import blocks, canonical_name
from tritium.ops.quantized import SCHEMES, Scheme, quantize, stored_shapes
from tritium.quant import declaration

Entry = tuple[str, str, Sequence[int], int]
"""Name, dtype as safetensors spells it, shape and bytes of a tensor in a file."""


def save(checkpoint: Checkpoint, directory: Path, *, device: str = "cpu", progress: bool = False) -> tuple[int, int]:
    """Writes `checkpoint`, whose configuration says what is quantized, to `directory`: file by file as it is stored,
    what is not quantized byte by byte, config.json last. Gives the bytes of all tensors before and after.

    What is quantized on `device` has the bits that loading it there with --quantize gives. Raises `ConfigError` before
    anything is written, `CheckpointError` after."""
    from tqdm import tqdm

    schemes = {name: SCHEMES[scheme] for name, scheme in checkpoint.config.schemes}
    if any(tensor.parts for tensor in checkpoint.tensors):
        raise ConfigError(f"{checkpoint.directory} is quantized already", hint="serve it as it is")
    if not schemes:
        raise ConfigError("nothing is left to quantize", hint="a narrower glob for --keep-bf16")
    blocks(checkpoint.config)  # refuses what could not be loaded again
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConfigError(f"{directory} is there already", hint="name a new directory")
    stored = stored_tensors(checkpoint.directory)
    before, after, places = sum(tensor.nbytes for tensor in stored), 0, dict[str, str]()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in checkpoint.directory.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
                shutil.copy(path, directory / path.name)
        with tqdm(
            total=before, unit="B", unit_scale=True, desc="quantizing", file=sys.stderr, disable=not progress
        ) as bar:
            for file, tensors in groupby(stored, key=lambda tensor: tensor.file):
                chosen = {tensor: schemes.get(canonical_name(tensor.name)) for tensor in tensors}
                entries = list(_entries(chosen))
                after += sum(entry[-1] for entry in entries)
                places |= {entry[0]: file.name for entry in entries}
                with (directory / file.name).open("wb") as out:
                    out.write(header({"format": "pt"}, entries))
                    for tensor, scheme in chosen.items():
                        for piece in _pieces(tensor, scheme, device):
                            out.write(piece.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                        bar.update(tensor.nbytes)
        if (checkpoint.directory / INDEX).exists():
            index = {"metadata": {"total_size": after}, "weight_map": places}
            (directory / INDEX).write_text(json.dumps(index, indent=2))
        config = read_json(checkpoint.directory / "config.json")
        config["quantization_config"] = declaration(checkpoint.config.schemes[0][1])
        (directory / "config.json").write_text(json.dumps(config, indent=2))
    except OSError as e:
        raise CheckpointError(f"{directory} cannot be written: {e.strerror}", hint="remove what was begun") from e
    return before, after


def header(metadata: dict[str, str], entries: Iterable[Entry]) -> bytes:
    """What stands before the data in a file of safetensors."""
    fields: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, size in entries:
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entries(tensors: dict[StoredTensor, Scheme | None]) -> Iterator[Entry]:
    for tensor, scheme in tensors.items():
        if scheme is None:
            yield tensor.name, tensor.dtype, tensor.shape, tensor.nbytes
            continue
        kinds = (scheme.values, scheme.scales)
        for suffix, kind, shape in zip(("", "_scale"), kinds, stored_shapes(scheme, tensor.shape)):
            yield tensor.name + suffix, STORED_AS[kind], shape, math.prod(shape) * kind.itemsize


def _pieces(tensor: StoredTensor, scheme: Scheme | None, device: str) -> Iterator[torch.Tensor]:
    data = read(tensor)
    if scheme is None:
        yield data
        return
    try:
        yield from quantize(data.to(device), scheme)[:2]
    except ValueError as e:
        raise CheckpointError(f"{tensor.file.name}: {tensor.name} cannot be quantized: {e}",
                              hint=f"--keep-bf16 {tensor.name}") from e
