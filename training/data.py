"""Batches: documents packed into rows of fixed width by worker processes.

A short row holds several documents (numbered in `doc`, attention and state stop at their borders); a long row holds one
text of up to 4,000 tokens with several questions about it. Shapes: B rows, T width.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.text import Documents
from tritium.eval.tasks import samples

SHORT, LONG = (80, 768), (14, 4480)
MIX = [("word_problems", 0.45), ("arithmetic", 0.12), ("tool_calls", 0.28), ("recall", 0.06), ("conversations", 0.06),
       ("small_talk", 0.03)]
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens int16, documents uint8, weights float16: [B, T] each


@dataclass
class _Source:
    documents: Documents
    seed: int
    turn: int = 0

    def short(self) -> list[tuple[list[int], list[float]]]:
        """Some encoded documents of the mix, each at most a row long."""
        kinds, weights = zip(*MIX, strict=True)
        rng = random.Random(f"{self.seed}/{self.turn}")
        self.turn += 1
        found = []
        for kind in rng.choices(kinds, weights, k=64):
            drawn = samples(kind, "train", rng.getrandbits(60), 1, rng.randint(20, 480), rng.choice((1, 2, 3)))
            found.append(self.documents.encode(drawn[0]))
        return [d for d in found if len(d[0]) <= SHORT[1]]

    def long(self) -> tuple[list[int], list[float]]:
        while True:
            rng = random.Random(f"{self.seed}/long/{self.turn}")
            self.turn += 1
            tokens = rng.choice((1000, 2000, 3000, 4000, 4000, 4000))
            document = self.documents.encode(samples("recall", "train", rng.getrandbits(60), 1, tokens, 7)[0])
            if len(document[0]) <= LONG[1]:
                return document


def _empty(shape: tuple[int, int]) -> Batch:
    return np.zeros(shape, np.int16), np.full(shape, 255, np.uint8), np.zeros(shape, np.float16)


def short_batch(source: _Source, waiting: list[tuple[list[int], list[float]]]) -> Batch:
    """Best fit: the longest waiting document that still fits goes into the row."""
    tokens, doc, weight = batch = _empty(SHORT)
    for row in range(SHORT[0]):
        start = number = 0
        while True:
            if len(waiting) < 64:
                waiting += source.short()
            fits = [i for i, d in enumerate(waiting) if len(d[0]) <= SHORT[1] - start]
            if not fits:
                break
            best = fits[0] if start < SHORT[1] // 2 else max(fits, key=lambda i: len(waiting[i][0]))
            ids, weights = waiting.pop(best)
            end = start + len(ids)
            tokens[row, start:end], doc[row, start:end], weight[row, start:end] = ids, number, weights
            weight[row, start] = 0
            start, number = end, number + 1
    return batch


def long_batch(source: _Source) -> Batch:
    tokens, doc, weight = batch = _empty(LONG)
    doc[:] = 0
    for row in range(LONG[0]):
        ids, weights = source.long()
        tokens[row, : len(ids)], weight[row, : len(ids)] = ids, weights
    return batch


def _work(tokenizer: str, seed: int, prompt_weight: float, long: bool, out: mp.Queue[Batch]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    source = _Source(Documents(Tokenizer.from_file(tokenizer), prompt_weight), seed)
    waiting: list[tuple[list[int], list[float]]] = []
    while True:
        out.put(long_batch(source) if long else short_batch(source, waiting))


class Feed:
    """Worker processes and what they made; a batch is used again when no new one is ready."""

    def __init__(self, tokenizer: Path, seed: int, workers: int, prompt_weight: float) -> None:
        context = mp.get_context("fork")
        self.queues = {False: context.Queue(24), True: context.Queue(6)}
        self.kept: dict[bool, list[Batch]] = {False: [], True: []}
        self.rng = random.Random(seed)
        self.fresh = self.reused = 0
        long_workers = max(1, workers // 4)
        self.processes = []
        for i in range(workers):
            long = i < long_workers
            work = (str(tokenizer), seed * 1000 + i, prompt_weight, long, self.queues[long])
            self.processes.append(context.Process(target=_work, args=work, daemon=True))
        for process in self.processes:
            process.start()

    def next(self, long: bool) -> Batch:
        kept = self.kept[long]
        try:
            batch = self.queues[long].get(block=len(kept) < 8)
            self.fresh += 1
        except queue.Empty:
            self.reused += 1
            return self.rng.choice(kept)
        kept.append(batch)
        if len(kept) > 400:
            kept.pop(self.rng.randrange(len(kept)))
        return batch

    def close(self) -> None:
        for process in self.processes:
            process.terminate()


