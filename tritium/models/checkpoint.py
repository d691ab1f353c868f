"""Checkpoints: found (directory, embedded, hub), accounted for tensor by tensor, and streamed into parameters."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tritium.config import EngineConfig
from tritium.core.errors import CheckpointError, ConfigError, one_line
from tritium.models.config import ModelConfig, parse_config
from tritium.models.dummy import draw_parameters
from tritium.models.families import family_config
from tritium.models.parameters import IGNORED, Placement, canonical_name, parameter_shapes, placements, quantizable
from tritium.models.weights import allocate, fill
from tritium.ops.quantized import SCHEMES, Weights, stored_bytes, stored_shapes
from tritium.quant import Layout, layout_of, select

log = logging.getLogger(__name__)

EMBEDDED = {"tritium-dense": "dense", "tritium-moe": "moe"}
INDEX = "model.safetensors.index.json"

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
STORED_AS = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32",
             torch.bfloat16: "BF16", torch.float16: "F16"}  # fmt: skip
"""Dtypes as safetensors spells them."""
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
_AGAIN = "download it again"
_HASHED_WHOLE = 64 << 20
_SAMPLE_BYTES = 256
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file's header describes it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, F16, F8_E4M3, ..."""
    parts: tuple[StoredTensor, ...] = ()
    """Values and scales, where the file has it quantized; `shape` is then that of the weight."""

    @property
    def nbytes(self) -> int:
        own = math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 1)
        return sum(part.nbytes for part in self.parts) if self.parts else own


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory whose tensors were all accounted for (headers read, no data)."""

    directory: Path
    config: ModelConfig
    """What the files can really do: without MTP where its tensors are absent, untied where lm_head differs; and what
    is quantized, by the files or at load."""
    tensors: dict[StoredTensor, Placement]
    """Tensors that get loaded, in the order of files, and where each goes."""
    is_dummy: bool = False
    """There are no tensors: the weights are random. `directory` has a tokenizer and a template to go with them."""
    text_ids: int = 0
    """Ids of that tokenizer, where it is smaller than the model's vocabulary."""


def find_checkpoint(config: EngineConfig, *, weights: bool = True) -> Checkpoint:
    """What `config` names: a checkpoint, or with `--load-format dummy` the shape of one (a directory or hub name of
    which only the configuration is read, or a name of the family). `weights` false: nothing is to be loaded, so the
    name of a family will do. Raises `CheckpointError` or `ConfigError`.
    """
    raw = None if Path(config.model).is_dir() else family_config(config.model)
    dummy = config.load_format == "dummy" or (raw is not None and not weights)
    if not dummy and raw is not None:
        raise CheckpointError(f"{config.model} is a shape without weights", hint="--load-format dummy for random "
                              "weights, or the directory or hub name (owner/name) of a checkpoint")
    if raw is None:
        text = resolve(config.model, config.revision, config.download_dir, weights=not dummy)
        if not dummy:
            return open_checkpoint(text, config)
        told, model = _configured(text)
        if config.quantize is None and (layout := layout_of(told)):
            raise ConfigError(f"{config.model} is {layout.scheme}, as random weights are only where --quantize says so",
                              hint=f"--quantize {layout.scheme.removesuffix('-block')}")
    else:
        model = parse_config(raw)
    model = _quantized(model, config, published_names(model))
    if raw is None and (text / "tokenizer.json").exists():
        return Checkpoint(text, model, {}, is_dummy=True)
    text = resolve("tritium-dense")
    return Checkpoint(text, model, {}, is_dummy=True, text_ids=int(read_json(text / "config.json")["vocab_size"]))


def resolve(model: str, revision: str | None = None, download_dir: str | None = None, *, weights: bool = True) -> Path:
    """The local directory of a checkpoint: a directory, an embedded model's name, or owner/name from the hub.

    A hub checkpoint is downloaded (resumed where a download was cut, with a progress bar) or taken from the cache;
    without `weights` only its other files are.
    Raises `CheckpointError` when there is no such thing.
    """
    if model in EMBEDDED:
        directory = Path(str(resources.files("tritium"))) / "embedded" / EMBEDDED[model]
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"this installation does not contain {model}", hint="install a released version")
        return directory
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.suffix == ".gguf" or model.lower().endswith("-gguf"):
        raise CheckpointError(f"{model}: GGUF is not supported", hint="use the model's safetensors checkpoint")
    if model and path.exists():
        raise CheckpointError(f"{model} is a file", hint="give the directory of config.json and the weights")
    if not _HUB_NAME.fullmatch(model) or model.startswith("."):
        embedded = ", ".join(EMBEDDED)
        raise CheckpointError(f"there is no directory {model}", hint=f"a directory, owner/name, or {embedded}")
    return _download(model, revision, download_dir, _DOWNLOADED if weights else _DOWNLOADED[1:])


def _download(model: str, revision: str | None, download_dir: str | None, files: list[str]) -> Path:
    import httpx
    from huggingface_hub import errors, snapshot_download

    at = f"{model} (revision {revision})" if revision else model
    try:
        found = snapshot_download(model, revision=revision, cache_dir=download_dir, allow_patterns=files)
        return Path(found)
    except errors.GatedRepoError as e:
        raise CheckpointError(
            f"{model} is gated", hint="accept its terms on huggingface.co and log in with `hf auth login`"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise CheckpointError(f"{model} has no revision {revision}", hint="check --revision") from e
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as e:
        raise CheckpointError(f"there is no directory {model}, and no such model on the hub (or it is private)",
                              hint="check the spelling, or log in with `hf auth login`") from e
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.HTTPError, ConnectionError) as e:
        raise CheckpointError(f"{at} is not in the local cache and the hub cannot be reached",
                              hint="check the network, or give a local directory") from e
    except (errors.HfHubHTTPError, OSError) as e:
        raise CheckpointError(f"downloading {at} failed: {one_line(e)}", hint="run again to resume") from e


def open_checkpoint(directory: Path, engine: EngineConfig | None = None) -> Checkpoint:
    """Read config and tensor headers of `directory` and account for every tensor, before any data is read. `engine`
    says what is to be quantized at load; what the files have quantized stays so.

    Two cases are settled here, with a line in the log: a checkpoint that announces MTP and has no mtp.* tensor
    loses its MTP head; one that says tied but holds an lm_head.weight other than the embeddings is not tied, as in
    Transformers (an equal one is the tied tensor itself). Raises `CheckpointError` or `ConfigError`.
    """
    raw, config = _configured(directory)
    stored = stored_tensors(directory)
    by_name = _canonical(stored)
    layout = layout_of(raw)
    if layout:
        by_name = _joined(by_name, layout)
    config = _settle(config, raw, by_name)
    tensors = _account(directory, config, by_name)
    names = {canonical_name(tensor.name): tensor.name for tensor in tensors}
    if layout is None:
        return Checkpoint(directory, _quantized(config, engine, names), tensors)
    if engine and engine.quantize not in (None, layout.scheme):
        raise ConfigError(f"{directory} is {layout.scheme} already, and cannot become {engine.quantize}",
                          hint="leave --quantize out, or take the original")
    if engine and (engine.keep_bf16 or engine.quantize_also):
        raise ConfigError(f"{directory} is {layout.scheme} already, and no flag changes which of its tensors are",
                          hint="leave out --keep-bf16 and --quantize-also")
    brought = {name: layout.scheme for name in names if by_name[name].parts}
    if never := [names[name] for name in brought.keys() - set(quantizable(config))]:
        raise CheckpointError(f"{directory}: tensors are quantized that must not be: {_some(sorted(never))}")
    return Checkpoint(directory, replace(config, schemes=tuple(brought.items())), tensors)


def _configured(directory: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json, and what it and generation_config.json say."""
    raw, generation = read_json(directory / "config.json"), directory / "generation_config.json"
    return raw, parse_config(raw, generation=read_json(generation) if generation.exists() else None)


def table(checkpoint: Checkpoint, width: int) -> list[tuple[str, str, int]]:
    """Name, scheme (or compute dtype of a matrix, float32) and bytes of every tensor of a checkpoint as it is loaded;
    `width` an element of a matrix that is not quantized."""
    schemes, shapes = dict(checkpoint.config.schemes), parameter_shapes(checkpoint.config)
    places = placements(checkpoint.config)
    loaded = [tensor.name for tensor in checkpoint.tensors] or list(published_names(checkpoint.config).values())
    found = []
    for name in loaded:
        place, scheme = places[canonical_name(name)], schemes.get(canonical_name(name))
        if scheme:
            found.append((name, scheme, stored_bytes(SCHEMES[scheme], place.shape)))
        else:
            each = width if shapes[place.parameter].role == "matrix" else _ITEM_BYTES["F32"]
            found.append((name, "float32" if each == _ITEM_BYTES["F32"] else "16 bits", each * place.numel))
    return found


def published_names(config: ModelConfig) -> dict[str, str]:
    """By canonical name, the names that tensors have in the family's own checkpoints, where the experts of a layer are
    one tensor: for models of which only the shape is known."""
    names = (name for name, place in placements(config).items() if place.expert is None)
    return {n: n if n.startswith(("lm_head.", "mtp.")) else f"model.language_model.{n}" for n in names}


def _quantized(config: ModelConfig, engine: EngineConfig | None, names: dict[str, str]) -> ModelConfig:
    if engine is None or engine.quantize is None:
        return config
    could = {name: names[name] for name in quantizable(config) if name in names}
    chosen = select(engine.quantize, engine.keep_bf16, engine.quantize_also, could)
    return replace(config, schemes=tuple(chosen.items()))


def _joined(stored: dict[str, StoredTensor], layout: Layout) -> dict[str, StoredTensor]:
    """Quantized tensors under their own names, with their values and scales as parts."""
    scheme, joined = SCHEMES[layout.scheme], dict(stored)
    for name in [n.removesuffix(layout.scales) for n in stored if n.endswith(layout.scales)]:
        scales, values = joined.pop(name + layout.scales), joined.pop(name + layout.values, None)
        for suffix in layout.beside:
            joined.pop(name + suffix, None)
        if values is None:
            raise CheckpointError(f"{scales.file.name}: {scales.name} is there, but not what it scales", hint=_AGAIN)
        *front, columns = values.shape
        shape = (*front, columns * 8 * _ITEM_BYTES.get(values.dtype, 1) // scheme.bits)
        wanted = stored_shapes(scheme, shape)[1] if front else (0,)
        kinds = ("U8", "I32") if scheme.bits == 4 else (STORED_AS[scheme.values],)
        if values.dtype not in kinds or math.prod(scales.shape) != math.prod(wanted):
            raise CheckpointError(
                f"{values.file.name}: {values.name} is {values.dtype} with scales {list(scales.shape)}, but "
                f"config.json asks for {layout.scheme}: {' or '.join(kinds)} with scales {list(wanted)}", hint=_AGAIN)
        own = values.name.removesuffix(layout.values)
        joined[name] = StoredTensor(own, values.file, shape, values.dtype, (values, scales))
    return joined


def load_parameters(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu", progress: bool = False
) -> dict[str, Weights]:
    """Every parameter of `checkpoint.config`: matrices in `dtype` or quantized, vectors in float32, on `device`.

    Each tensor is read once and put straight into its region, so the peak is the model plus one tensor (beside
    pages of the mapped file, which the kernel takes back as it needs). Experts are quantized a few at a time.
    `progress` draws a bar in bytes on stderr.
    """
    from tqdm import tqdm

    if checkpoint.is_dummy:
        return draw_parameters(checkpoint.config, dtype=dtype, device=device, text_ids=checkpoint.text_ids)
    parameters = allocate(checkpoint.config, dtype=dtype, device=device)
    total = sum(tensor.nbytes for tensor in checkpoint.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", file=sys.stderr, disable=not progress,
              leave=False) as bar:  # fmt: skip
        for tensor, place, source in _stream(checkpoint):
            try:
                fill(parameters[place.parameter], place, *source)
            except ValueError as e:
                what = "is damaged" if tensor.parts else "cannot be quantized"
                raise CheckpointError(f"{tensor.file.name}: {tensor.name} {what}: {e}",
                                      hint=_AGAIN if tensor.parts else f"--keep-bf16 {tensor.name}") from e
            bar.update(tensor.nbytes)
    return parameters


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells checkpoints apart without reading all: a hash of the configuration and, of every file, all where it is
    small, else the header and some bytes from the middle of every tensor."""
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for path in sorted({part.file for tensor in checkpoint.tensors for part in tensor.parts or (tensor,)}):
        with path.open("rb") as file:
            if path.stat().st_size <= _HASHED_WHOLE:
                digest.update(file.read())
                continue
            start = int.from_bytes(file.read(8), "little")
            header = file.read(start)
            digest.update(header)
            for name, entry in json.loads(header).items():
                if name != "__metadata__":
                    file.seek(8 + start + sum(entry["data_offsets"]) // 2)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(
            f"{path.parent} has no {path.name}", hint="give a directory with a checkpoint in Hugging Face format"
        ) from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read: {one_line(e)}", hint=_AGAIN) from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object", hint=_AGAIN)
    return value


def stored_tensors(directory: Path) -> list[StoredTensor]:
    """Every tensor of a directory's files, in their order."""
    index = directory / INDEX
    if not index.exists():
        return [tensor for file in _unindexed_files(directory) for tensor in _header(file)]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map", hint=_AGAIN)
    files = sorted(set(weight_map.values()))
    missing = [f for f in files if not (directory / f).is_file()]
    if missing:
        raise CheckpointError(f"{directory}: files of {INDEX} are absent: {_some(missing)}", hint=_AGAIN)
    stored = [tensor for f in files for tensor in _header(directory / f)]
    absent = sorted(set(weight_map) - {t.name for t in stored})
    if absent:
        raise CheckpointError(f"{directory}: tensors of {INDEX} are in no file: {_some(absent)}", hint=_AGAIN)
    return stored


def _unindexed_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        other = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".gguf", ".pt", ".pth"))
        found = f" (found {_some(other)})" if other else ""
        raise CheckpointError(f"{directory} has no *.safetensors file{found}", hint="only these can be loaded")
    for match in (m for m in (_SHARD.fullmatch(f.name) for f in files) if m):
        stem, count = match[1], match[3]
        names = [f"{stem}-{i:0{len(match[2])}d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
        missing = [n for n in names if not (directory / n).is_file()]
        if missing:
            raise CheckpointError(f"{directory}: shards are missing: {_some(missing)}", hint=_AGAIN)
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it becomes one line."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, OSError) as e:
        if file.is_file() and file.open("rb").read(24).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file} is a git-lfs pointer, not weights", hint="run `git lfs pull`") from e
        raise CheckpointError(f"{file} is damaged or truncated: {one_line(e)}", hint=_AGAIN) from e


def _header(file: Path) -> list[StoredTensor]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        return [StoredTensor(n, file, tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()]


def _canonical(stored: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    by_name: dict[str, StoredTensor] = {}
    for tensor in stored:
        twin = by_name.setdefault(canonical_name(tensor.name), tensor)
        if twin is not tensor:
            where = f"{twin.name} ({twin.file.name}) and {tensor.name} ({tensor.file.name})"
            raise CheckpointError(f"{tensor.file.parent}: {where} are the same parameter", hint="keep one of them")
    return by_name


def _settle(config: ModelConfig, raw: dict[str, Any], stored: dict[str, StoredTensor]) -> ModelConfig:
    embed, head = stored.get("embed_tokens.weight"), stored.get("lm_head.weight")
    declared = [s.get(key) for s in (raw, raw.get("text_config") or {}) for key in ("dtype", "torch_dtype")]
    if embed and not any(declared):
        config = replace(config, dtype=_DTYPES.get(embed.dtype, config.dtype))
    if config.mtp_layers and not any(name.startswith("mtp.") for name in stored):
        log.warning("config.json announces an MTP head, but there is no mtp.* tensor: continuing without it")
        config = replace(config, mtp_layers=0)
    if config.tied_embeddings and embed and head and (head.parts or not torch.equal(read(embed), read(head))):
        log.warning("tie_word_embeddings is set, but lm_head.weight differs from the embeddings: using both")
        config = replace(config, tied_embeddings=False)
    return config


def _account(directory: Path, config: ModelConfig, stored: dict[str, StoredTensor]) -> dict[StoredTensor, Placement]:
    """Pair tensors and regions; raise unless every tensor is used or ignored and every region filled once."""
    ignored = {name for name in stored if name.startswith(IGNORED)}
    tied = {"lm_head.weight"} if config.tied_embeddings else set()
    places = placements(config)
    unknown = [t.name for name, t in stored.items() if name not in places and name not in ignored | tied]
    if unknown:
        raise CheckpointError(f"{directory}: tensors that this model does not have: {_some(unknown)}")
    used = {tensor: places[name] for name, tensor in stored.items() if name in places}
    for tensor, place in used.items():
        if tensor.dtype not in _DTYPES and not tensor.parts:
            raise CheckpointError(f"{tensor.file.name}: {tensor.name} is {tensor.dtype}, which is not supported",
                                  hint=f"supported: {', '.join(_DTYPES)}")
        if tensor.shape != place.shape:
            raise CheckpointError(f"{tensor.file.name}: {tensor.name} has shape {list(tensor.shape)}, "
                                  f"but config.json asks for {list(place.shape)}")
    _check_filled_once(directory, config, places, stored)
    if ignored:
        log.warning("not loading %d tensors of the vision tower (visual.*): this is a text engine", len(ignored))
    return used


def _check_filled_once(
    directory: Path, config: ModelConfig, places: dict[str, Placement], stored: Container[str]
) -> None:
    """Regions are disjoint but for the two spellings of experts, so counting elements per parameter is enough."""
    sources: dict[str, list[str]] = {}
    for name, place in places.items():
        sources.setdefault(place.parameter, []).append(name)
    missing: list[str] = []
    for parameter, spec in parameter_shapes(config).items():
        used = [name for name in sources[parameter] if name in stored]
        filled, numel = sum(places[name].numel for name in used), math.prod(spec.shape)
        if filled > numel:
            raise CheckpointError(f"{directory}: {parameter} is given more than once: {_some(used)}")
        if filled < numel:
            # The spelling of experts that the checkpoint uses; fused where it has none.
            each = any(places[name].expert is not None for name in used)
            absent = (name for name in sources[parameter] if name not in stored)
            missing += [name for name in absent if (places[name].expert is not None) == each]
    if missing:
        raise CheckpointError(f"{directory}: tensors are missing: {_some(missing)}", hint="is the download complete?")


def _stream(checkpoint: Checkpoint) -> Iterator[tuple[StoredTensor, Placement, list[torch.Tensor]]]:
    for file, tensors in groupby(checkpoint.tensors.items(), key=lambda pair: pair[0].file):
        with _opened(file) as opened:
            for tensor, place in tensors:
                parts = tensor.parts or (tensor,)
                yield tensor, place, [read(part, opened if part.file == file else None) for part in parts]


def read(tensor: StoredTensor, opened: Any = None) -> torch.Tensor:
    """The data of a tensor, from its file if that is open."""
    if opened is not None:
        return opened.get_tensor(tensor.name)  # type: ignore[no-any-return]
    with _opened(tensor.file) as file:
        return file.get_tensor(tensor.name)  # type: ignore[no-any-return]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > 10 else ""
    return ", ".join(names[:10]) + rest
