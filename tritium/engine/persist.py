"""The prefix cache in files, so that sessions outlive the process.

A file is in safetensors' format (any reader of it shows what is inside):

    pages.<layer>.keys, .values   [n, nkv, 64, d]   KV pages of every attention layer, the MTP head's last
    ids                           [tokens] int32    tokens of all pages, one page after the other
    states                        [c, B] uint8      checkpoints as `runner.States` writes them
    __metadata__                  what it is of (model, dtype, quantization, device), the tree, and a sha256

The tree is JSON: `pages` as [index of the parent or -1, tokens], parents first; `states` as [index of a page, tokens
of it]; those used last come first. The sha256 is that of the whole file with zeros in its place. A file takes its
name only when all of it is on the disk, so whatever happens on the way, the one before it stays whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tritium.cache import Checkpoint, Node, PrefixCache
from tritium.core import CacheFileError, ConfigError, RequestError
from tritium.models.checkpoint import STORED_AS
from tritium.models.save import Entry, header
from tritium.nn.batch import AttentionCache
from tritium.runner import Runner

DEFAULT_NAME = "cache"
VERSION = "1"
_FORMAT = "tritium-cache"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_CHUNK_PAGES = 256
_CHUNK_BYTES = 16 << 20
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class CacheFiles:
    """The files of one directory, for one model as it runs here."""

    directory: Path
    identity: Mapping[str, str]
    """What must be the same in a file that is loaded: model, dtype, quantization, device."""

    def prepare(self) -> None:
        """Makes the directory and clears away what a crash left in it. Raises `ConfigError`."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob(".*.tmp"):
                left.unlink()
        except OSError as error:
            raise ConfigError(f"--cache-dir {self.directory} cannot be used: {error.strerror}") from error

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def save(self, name: str, cache: PrefixCache, runner: Runner, ids: tuple[int, ...] | None) -> dict[str, Any]:
        """Writes what `cache` holds, or of it what `ids` select. Raises `CacheFileError`, and then leaves the file of
        that name as it was."""
        path = self._path(name)
        pages, states = cache.holdings(ids or ())
        if not pages:
            raise CacheFileError("there is nothing to save: none of it is in the cache")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            _write(temporary, self._header(pages, states, runner), _payload(pages, states, runner))
            os.replace(temporary, path)
            _sync(self.directory)
            size = path.stat().st_size
        except OSError as error:
            why = f"{path} cannot be written: {error.strerror}"
            raise CacheFileError(why, hint="what was there is as it was") from error
        finally:
            temporary.unlink(missing_ok=True)
        return {"name": name, "tokens": sum(count for _, count in pages), "pages": len(pages),
                "checkpoints": len(states), "bytes": size}

    def load(self, name: str, cache: PrefixCache, runner: Runner) -> dict[str, Any]:
        """Takes what a file holds into `cache`, as far as there is room, beside what is there. Raises `CacheFileError`,
        and then leaves the cache as it was."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise CacheFileError(f"there is no saved cache {name!r}") from None
        except ValueError:  # an empty file cannot be mapped
            raise CacheFileError(f"{path} is damaged: it is empty") from None
        except OSError as error:
            raise CacheFileError(f"{path} cannot be read: {error.strerror}") from error
        return {"name": name} | _Opened(path, data, self.identity).pour(cache, runner)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise RequestError(f"{name!r} is no name of a cache", param="name",
                               hint="letters, digits, '_', '-' and '.', at most 64, the first a letter or digit")
        return self.directory / f"{name}.safetensors"

    def _header(self, pages: Sequence[tuple[Node, int]], states: Sequence[tuple[int, Checkpoint]], runner: Runner
                ) -> bytes:
        """All that stands before the data, with no digest yet."""
        place = {node: i for i, (node, _) in enumerate(pages)}
        offsets = [[i, len(checkpoint.key)] for i, checkpoint in states]
        tree = {"pages": [[place.get(node.parent, -1), count] for node, count in pages], "states": offsets}  # type: ignore[arg-type]
        metadata = {"format": _FORMAT, "version": VERSION, "sha256": _NO_DIGEST, **self.identity,
                    "tree": json.dumps(tree, separators=(",", ":"))}  # fmt: skip
        return header(metadata, _tensors(len(pages), sum(n for _, n in pages), len(states), runner))


class _Opened:
    """A file that was found to be whole and ours."""

    def __init__(self, path: Path, data: mmap.mmap, identity: Mapping[str, str]) -> None:
        self._path, self._data = path, data
        try:
            self._start = 8 + int.from_bytes(data[:8], "little")
            self._fields = json.loads(data[8 : self._start])
            metadata = self._fields.pop("__metadata__", {})
            if metadata.get("format") != _FORMAT:
                raise self._refused("is not a cache of Tritium's")
            if metadata["version"] != VERSION:
                raise self._refused(f"is of version {metadata['version']}, and this release reads version {VERSION}")
            for field, ours in identity.items():
                if metadata[field] != ours:
                    theirs = f" ({metadata[field]}, here {ours})" if field != "model" else ""
                    raise self._refused(f"was saved with another {field}{theirs}")
            size = self._start + max(entry["data_offsets"][1] for entry in self._fields.values())
            if len(data) != size:
                raise self._refused(f"is damaged: {len(data)} bytes of {size}")
            if metadata["sha256"] != self._digest(metadata["sha256"]):
                raise self._refused("is damaged: its checksum is wrong")
            self._tree = json.loads(metadata["tree"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._refused("is damaged: its header cannot be read") from error

    def pour(self, cache: PrefixCache, runner: Runner) -> dict[str, Any]:
        ids = iter(self._tensor("ids", torch.int32).tolist())
        pages = [(parent, tuple(islice(ids, count))) for parent, count in self._tree["pages"]]
        new_pages, new_states = cache.enter(pages, self._tree["states"])
        runner.states.move(cache.take_moves())
        rows, targets = torch.tensor(list(new_pages)), torch.tensor(list(new_pages.values()))
        for name, pool in _pools(runner) if new_pages else ():
            saved = self._tensor(name, pool.dtype).view(-1, *pool.shape[1:])
            for some, there in zip(rows.split(_CHUNK_PAGES), targets.split(_CHUNK_PAGES)):
                pool[there.to(pool.device)] = saved[some].to(pool.device)
        states = self._tensor("states", torch.uint8).split(runner.states.num_bytes) if new_states else ()
        for i, checkpoint in new_states.items():
            if checkpoint.slot is not None:
                runner.states.write(checkpoint.slot, states[i].to(runner.model.device))
            else:
                assert checkpoint.host is not None
                runner.states.host(checkpoint.host).copy_(states[i])
        return {"tokens": sum(len(pages[i][1]) for i in new_pages), "pages": len(new_pages),
                "checkpoints": len(new_states), "bytes": len(self._data)}

    def _tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A view of the file's memory, flat."""
        begin, end = self._fields[name]["data_offsets"]
        count = (end - begin) // dtype.itemsize
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=self._start + begin)

    def _digest(self, told: str) -> str:
        place = self._data.find(told.encode(), 8, self._start)
        digest = hashlib.sha256(self._data[:place] + _NO_DIGEST.encode() + self._data[place + 64 : self._start])
        for begin in range(self._start, len(self._data), _CHUNK_BYTES):
            digest.update(self._data[begin : begin + _CHUNK_BYTES])
        return digest.hexdigest()

    def _refused(self, why: str) -> CacheFileError:
        return CacheFileError(f"{self._path} {why}", hint="nothing of it was loaded")


def _pools(runner: Runner) -> Iterator[tuple[str, torch.Tensor]]:
    """The KV pools by their names in a file, [pages + 1, nkv, 64, d] each."""
    for i, cache in enumerate(runner.caches):
        if isinstance(cache, AttentionCache):
            yield f"pages.{i}.keys", cache.k_pages
            yield f"pages.{i}.values", cache.v_pages


def _tensors(pages: int, tokens: int, states: int, runner: Runner) -> Iterator[Entry]:
    """Name, dtype, shape and bytes of every tensor, as `_payload` gives them."""
    for name, pool in _pools(runner):
        yield name, STORED_AS[pool.dtype], [pages, *pool.shape[1:]], pages * pool[0].nbytes
    yield "ids", "I32", [tokens], 4 * tokens
    size = runner.states.num_bytes
    yield "states", "U8", [states, size], states * size


def _payload(pages: Sequence[tuple[Node, int]], states: Sequence[tuple[int, Checkpoint]], runner: Runner
             ) -> Iterator[torch.Tensor]:
    """The data, piece by piece, so that no second copy of a cache is ever in memory."""
    places = torch.tensor([node.page for node, _ in pages])
    for _, pool in _pools(runner):
        for some in places.split(_CHUNK_PAGES):
            yield pool[some.to(pool.device)]
    yield torch.tensor([token for node, count in pages for token in node.key[:count]], dtype=torch.int32)
    for _, checkpoint in states:
        if checkpoint.slot is not None:
            yield runner.states.read(checkpoint.slot)
        else:
            assert checkpoint.host is not None
            yield runner.states.host(checkpoint.host)


def _write(path: Path, header: bytes, payload: Iterator[torch.Tensor]) -> None:
    """All of a file, on the disk when this returns."""
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for piece in payload:
            data = piece.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.seek(header.index(_NO_DIGEST.encode()))
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """The directory's entries onto the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
