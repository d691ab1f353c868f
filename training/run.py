"""Trains one embedded model: `python -m training.run --model dense --seed 0 --minutes 18 --out OUT`.

Writes OUT/<model>/ (the checkpoint directory, again and again while training), OUT/<model>.jsonl and OUT/<model>.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.data import LONG, SHORT, Feed
from training.evaluate import evaluate
from training.export import export, load
from training.model import SHAPES, TinyModel
from training.optimizer import Optimizer
from training.text import ASSETS

MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 0.01
NAMES = ("loss", "accuracy", "mtp_loss", "mtp_accuracy", "balance")


class Stepper:
    """One training step at one shape: captured once as a CUDA graph, or run eagerly on a CPU."""

    def __init__(self, model: TinyModel, optimizer: Optimizer, shape: tuple[int, int], one_document: bool,
                 device: str) -> None:
        self.model, self.optimizer, self.one_document = model, optimizer, one_document
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.tokens, self.doc = (torch.zeros(shape, dtype=torch.long, device=device) for _ in range(2))
        self.weight = torch.zeros(shape, device=device)
        self.metrics = torch.zeros(len(NAMES), device=device)
        self.sum = torch.zeros(len(NAMES), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, batch: Any) -> None:
        for target, array in zip((self.tokens, self.doc, self.weight), batch, strict=True):
            source = torch.from_numpy(array)
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

    def compute(self) -> None:
        self.optimizer.zero_grad()
        parts = self.model.losses(self.tokens, self.doc, self.weight, self.one_document, self.dtype)
        main, _, ahead, _, balance = parts
        loss: Tensor = main + MTP_WEIGHT * ahead + BALANCE_WEIGHT * balance
        loss.backward()
        self.optimizer.step()
        self.sum += torch.stack([p.detach().float() for p in parts])

    def capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.compute()
        self.sum.zero_()

    def __call__(self, batch: Any) -> None:
        self.load(batch)
        if self.graph:
            self.graph.replay()
        else:
            self.compute()

    def averages(self, steps: int) -> dict[str, float]:
        values = (self.sum / max(1, steps)).tolist()
        self.sum.zero_()
        return {k: round(v, 4) for k, v in zip(NAMES, values, strict=True)}


def rate(progress: float, cooldown: float) -> float:
    """Warm-up, plateau, linear cooldown to zero over the last share `cooldown` of the time."""
    return min(progress / 0.02, 1.0, max(0.0, (1.0 - progress) / cooldown))


def draw(log: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    evals = [r for r in rows if "word_problems" in r]
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for key in ("loss", "mtp_loss"):
        left.plot([r["tokens"] / 1e6 for r in steps], [r[key] for r in steps], label=key)
    left.set(yscale="log", xlabel="tokens (million)", title="training loss")
    for key in ("word_problems", "tool_calls", "recall", "mtp_acceptance"):
        right.plot([r["tokens"] / 1e6 for r in evals], [r[key] for r in evals], marker="o", label=key)
    right.set(xlabel="tokens (million)", title="held-out tasks", ylim=(0, 1.02))
    left.legend()
    right.legend()
    plt.tight_layout()
    plt.savefig(log.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=18.0)
    parser.add_argument("--out", type=Path, default=Path("training/out"))
    parser.add_argument("--workers", type=int, default=13)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--long-every", type=int, default=8, help="one long batch in so many steps")
    parser.add_argument("--eval-minutes", type=float, default=3.0, help="0: only write the weights, every 20 seconds")
    parser.add_argument("--prompt-weight", type=float, default=0.05, help="loss weight of the prompts")
    parser.add_argument("--cooldown", type=float, default=0.5, help="share of the time in which the rates fall to zero")
    parser.add_argument("--init", type=Path, help="weights to continue from (a model.safetensors)")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    begin = time.time()

    args.out.mkdir(parents=True, exist_ok=True)
    log_path = args.out / f"{args.model}.jsonl"
    log = log_path.open("w")

    def note(**values: Any) -> None:
        line = json.dumps({"seconds": round(time.time() - begin, 1), **values})
        print(args.model, line, flush=True)
        log.write(line + "\n")
        log.flush()

    feed = Feed(ASSETS / "tokenizer.json", args.seed, args.workers, args.prompt_weight)
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_tf32 = True
    model = (load(args.model, args.init) if args.init else TinyModel(SHAPES[args.model])).to(args.device)
    optimizer = Optimizer(model, args.muon_lr, args.adam_lr, 0.05, args.device)
    steppers = {False: Stepper(model, optimizer, SHORT, False, args.device),
                True: Stepper(model, optimizer, LONG, True, args.device)}
    plain = model.pieces
    if args.device == "cuda":
        if not args.no_compile:
            model.compile_pieces()
        for long, stepper in steppers.items():
            stepper.load(feed.next(long))
            stepper.capture()
            note(captured=LONG if long else SHORT)
    note(parameters=sum(p.numel() for p in model.parameters()), arguments={k: str(v) for k, v in vars(args).items()})

    def judge(tokens: int, n: int, recall_n: int) -> None:
        compiled, model.pieces = model.pieces, plain
        size = export(model, args.out / args.model, tokenizer)
        if n == 0:
            note(tokens=tokens, bytes=size)
            return
        misses: list[str] = []
        note(tokens=tokens, bytes=size, **evaluate(model, tokenizer, n, recall_n, misses=misses))
        (args.out / f"{args.model}-misses.txt").write_text("\n".join(misses))
        model.pieces = compiled

    start, step, tokens, since = time.time(), 0, 0, {False: 0, True: 0}
    budget = args.minutes * 60 - (start - begin)
    pause = args.eval_minutes * 60 or 20.0
    next_eval, last = pause, time.time()
    while (elapsed := time.time() - start) < budget:
        if step % 10 == 0:
            optimizer.set_rate(rate(elapsed / budget, args.cooldown))
        long = step % args.long_every == args.long_every - 1
        steppers[long](feed.next(long))
        since[long] += 1
        tokens += (LONG if long else SHORT)[0] * (LONG if long else SHORT)[1]
        step += 1
        if step % 100 == 0:
            short_values, long_values = steppers[False].averages(since[False]), steppers[True].averages(since[True])
            note(step=step, tokens=tokens, **short_values, long_loss=long_values["loss"],
                 long_accuracy=long_values["accuracy"],
                 step_ms=round((time.time() - last) * 10, 2), fresh=feed.fresh, reused=feed.reused)
            since, last = {False: 0, True: 0}, time.time()
        if elapsed > next_eval:
            judge(tokens, 128 if args.eval_minutes else 0, 32)
            next_eval, last = time.time() - start + pause, time.time()
    feed.close()
    judge(tokens, 500 if args.eval_minutes else 0, 100)
    draw(log_path)
    note(done=True)


if __name__ == "__main__":
    main()
