"""Checkpoints of recurrent and convolution state as bytes: in host memory, in files, and on the way to and from slots.

Shapes: B bytes of a checkpoint, N places in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tritium.core import StateMove
from tritium.nn.batch import GdnCache, LayerCache


class States:
    """The host's tier of checkpoints, and slots seen as bytes.

    A checkpoint is the recurrent state of every GDN layer, then the ring of inputs that its convolution looks back on;
    what a slot keeps of drafts is not part of it. On a GPU host memory is pinned, and copies run on a stream of their
    own: the forward pass waits for what comes back, and never for what goes out.
    """

    def __init__(self, caches: Sequence[LayerCache], *, places: int = 0) -> None:
        layers = [cache for cache in caches if isinstance(cache, GdnCache)]
        self._parts = [layer.state for layer in layers] + [layer.conv for layer in layers]
        self._sizes = [part[0].numel() * part.element_size() for part in self._parts]
        self.num_bytes = sum(self._sizes)
        self._device = caches[0][0].device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" and places else None
        self._host_NB = torch.empty(places + 1, self.num_bytes, dtype=torch.uint8, pin_memory=bool(self._stream))

    def move(self, moves: Sequence[StateMove]) -> None:
        """Copies checkpoints, in order."""
        for move in moves:
            if move.out:
                self._put_away(self.read(move.slot), move.host)
            else:
                self.write(move.slot, self._fetched(move.host))

    def read(self, slot: int) -> torch.Tensor:
        """[B] uint8 on the device: a copy of what `slot` holds."""
        empty = torch.empty(0, dtype=torch.uint8, device=self._device)
        return torch.cat([empty, *(part[slot].reshape(-1).view(torch.uint8) for part in self._parts)])

    def write(self, slot: int, state_B: torch.Tensor) -> None:
        for part, piece in zip(self._parts, state_B.split(self._sizes)):
            part[slot].copy_(piece.view(part.dtype).view(part.shape[1:]))

    def host(self, place: int) -> torch.Tensor:
        """[B] uint8: the checkpoint at a place in host memory, to be read or written by the caller."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._host_NB[place]

    def _put_away(self, state_B: torch.Tensor, place: int) -> None:
        if self._stream is None:
            self._host_NB[place].copy_(state_B)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._host_NB[place].copy_(state_B, non_blocking=True)
        state_B.record_stream(self._stream)

    def _fetched(self, place: int) -> torch.Tensor:
        if self._stream is None:
            return self._host_NB[place]
        with torch.cuda.stream(self._stream):
            state_B = self._host_NB[place].to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        state_B.record_stream(current)
        return state_B
