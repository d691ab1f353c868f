"""The engine against Transformers: logits of whole conversations through the paged, chunked, batched path.

Checkpoints are random and written by Transformers itself; `--seed` draws others. Errors are norms of differences over
norms, of the logits of a whole request. Where a router's last expert taken and first one left out are equal up to
rounding, either choice is right and all that follows differs: from such a position on, nothing is compared.

Shapes: T tokens, V vocabulary, H hidden, E experts.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers as tf
from checkpoints import Spec, random_checkpoint, random_spec, read_tensors
from mtp_statement import mtp_logits
from torch import Tensor

from tritium.config import EngineConfig
from tritium.core import Request, SamplingParams, StepPlan
from tritium.engine import Engine

DECODE_STEPS = 64
YARN = (("rope_type", "yarn"), ("factor", 4.0), ("original_max_position_embeddings", 256))

# Every value that the family can take at least once: nv / nk in {1, 2, 3, 4}, head dims, irregular layers, ...
SPECS = [
    Spec(layer_types="lllf", nk=2, nv=2, head_dim=256, tied=True, shards=2),
    Spec(layer_types="fl", nk=1, nv=2, head_dim=128, vocab=97, heads=4, kv_heads=2, nested=True),
    Spec(layer_types="lffl", nk=1, nv=3, head_dim=64, vocab=320, hidden=96, rope=YARN, rotary=0.5),
    Spec(layer_types="llf", nk=2, nv=8, head_dim=64, gdn_key_dim=64, gdn_value_dim=16, tied=True, rotary=1.0),
    Spec(layer_types="flf", moe=True, nk=3, nv=3, head_dim=128, experts_per_token=1, tied=True),
    Spec(layer_types="lllf", moe=True, nk=1, nv=4, head_dim=64, per_expert=True, shards=3, heads=6, kv_heads=2),
    Spec(layer_types="lf", moe=True, nk=2, nv=4, head_dim=256, nested=True, tied=True, experts=12, experts_per_token=4),
]


@dataclass
class Served:
    """What the engine computed: token ids of every request, and the logits after each of its computed tokens."""

    ids: dict[str, list[int]]
    logits: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """By position, [V]."""
    drafts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """The MTP head's, likewise."""


class Silent:
    """A proposer that wants to hear the head and guesses nothing."""

    def propose(self, request: Request, most: int) -> tuple[int, ...]:
        return ()

    def forget(self, request_id: str) -> None:
        pass


@mock.patch("tritium.draft.mtp.HEAD_TOKENS", 10**9)  # over the whole text, not only its end
@mock.patch("tritium.sched.scheduler.HEAD_TOKENS", 10**9)
def serve(directory: Path, prompts: dict[str, list[int]], *, steps: int, dtype: str, budget: int = 160) -> Served:
    """All prompts at once through an engine whose steps hold at most `budget` tokens, every logit overheard."""
    engine = Engine.load(
        EngineConfig(
            model=str(directory),
            dtype=dtype,
            device="cpu",
            max_num_seqs=len(prompts),
            max_num_batched_tokens=budget,
            max_model_len=1024,
            num_gpu_blocks_override=128,
            speculate="none",
            show_progress=False,
        )
    )
    served = Served(dict(prompts), {name: {} for name in prompts}, {name: {} for name in prompts})
    current: list[StepPlan] = []

    def keep(plan: StepPlan, logits_TV: Tensor, kept: dict[str, dict[int, Tensor]]) -> None:
        places = [(row.request_id, row.start + i) for row in plan.rows for i in range(len(row.ids))]
        for (name, position), logits_V in zip(places, logits_TV, strict=True):
            assert position not in kept[name], f"position {position} of {name} was computed twice"
            kept[name][position] = logits_V.clone()

    def observe(plan: StepPlan, logits_TV: Tensor) -> None:
        current[:] = [plan]
        keep(plan, logits_TV, served.logits)

    model = engine.runner.model
    draft_hidden = model.draft_hidden

    def overheard(*args: object) -> Tensor:
        hidden_TH: Tensor = draft_hidden(*args)  # type: ignore[arg-type]
        keep(current[0], model.logits(hidden_TH), served.drafts)
        return hidden_TH

    # The MTP head follows every token, and its guesses are never verified.
    engine.runner.run_head = model.mtp is not None
    engine.scheduler._proposer, engine.scheduler._depth = Silent(), lambda request: 1
    engine.runner.observer = observe
    model.draft_hidden = overheard  # type: ignore[method-assign,assignment]
    for i, (name, prompt) in enumerate(prompts.items()):
        sampling = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
        engine.add(Request(name, list(prompt), sampling, seed=i))
    while engine.has_work:
        for event in engine.step():
            served.ids[event.request_id] = served.ids[event.request_id] + list(event.tokens)
    return served


def prompts_of(lengths: list[int], vocab: int, rng: random.Random) -> dict[str, list[int]]:
    return {f"p{n}": [rng.randrange(vocab) for _ in range(n)] for n in lengths}


NEAR_TIE = 1e-5
"""Difference of router logits (which are about 1) that rounding in float32 can turn around."""


class Reference:
    """Transformers' own model of a checkpoint, run over a whole sequence at once."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        raw = json.loads((directory / "config.json").read_text())
        self.text = raw.get("text_config", raw)
        self.model = getattr(tf, raw["architectures"][0]).from_pretrained(directory, dtype=dtype).eval()
        self._margins: list[Tensor] = []
        for name, layer in self.model.named_modules():
            if name.endswith("mlp.gate"):
                layer.register_forward_hook(lambda _, __, out: self._margins.append(self._margin(out[0])))

    def _margin(self, logits_TE: Tensor) -> Tensor:
        """[T]: how far the last expert that is taken is ahead of the first that is not."""
        k = self.text["num_experts_per_tok"]
        if k == self.text["num_experts"]:
            return torch.full((len(logits_TE),), torch.inf)
        best = logits_TE.topk(k + 1).values
        return best[:, k - 1] - best[:, k]

    @torch.no_grad()
    def run(self, ids: list[int]) -> tuple[Tensor, Tensor, int]:
        """Logits [T, V], final-normed hidden states [T, H], and how many leading positions are beyond doubt."""
        self._margins.clear()
        hidden_TH = self.model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        doubtful = [(m < NEAR_TIE).nonzero() for m in self._margins]
        sure = min((int(where[0]) for where in doubtful if len(where)), default=len(ids))
        return self.model.lm_head(hidden_TH), hidden_TH, sure


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item() if len(ours) else 0.0


def check_float32(directory: Path, spec: Spec, lengths: list[int], rng: random.Random) -> None:
    served = serve(directory, prompts_of(lengths, spec.vocab, rng), steps=DECODE_STEPS, dtype="float32")
    reference = Reference(directory, torch.float32)
    tensors = {name: t.float() for name, t in read_tensors(directory).items()}
    for (name, ids), length in zip(served.ids.items(), lengths):
        assert len(ids) == length + DECODE_STEPS + 1
        expected_TV, hidden_TH, sure = reference.run(ids[:-1])
        ours_TV = torch.stack([served.logits[name][p] for p in range(len(ids) - 1)])
        assert relative(ours_TV[:sure], expected_TV[:sure]) < 1e-4, (str(spec), name)
        if spec.mtp and not spec.rope:
            expected_TV, _ = mtp_logits(tensors, reference.text, hidden_TH, torch.tensor(ids[1:]))
            drafted_TV = torch.stack([served.drafts[name][p] for p in range(len(ids) - 1)])
            assert relative(drafted_TV[:sure], expected_TV[:sure]) < 1e-4, (str(spec), name, "MTP")


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_float32_logits_are_those_of_transformers(spec: Spec, seed: int, tmp_path: Path) -> None:
    spec = replace(spec, seed=seed)
    directory = random_checkpoint(tmp_path, spec)
    rng = random.Random(seed)
    check_float32(directory, spec, [1, 2, rng.randint(3, 200), 64, 65], rng)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_long_prompts(moe: bool, seed: int, tmp_path: Path) -> None:
    spec = Spec(moe=moe, layer_types="lfl", nk=1, nv=2, seed=seed)
    rng = random.Random(seed)
    check_float32(random_checkpoint(tmp_path, spec), spec, [700, rng.randint(129, 699), 3], rng)


@pytest.mark.parametrize("draw", range(6))
def test_random_checkpoints(draw: int, seed: int, tmp_path: Path) -> None:
    rng = random.Random(1000 * seed + draw)
    spec = random_spec(rng)
    directory = random_checkpoint(tmp_path, spec)
    check_float32(directory, spec, [1, rng.randint(2, 63), rng.randint(64, 300)], rng)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_half_precision_errs_at_most_twice_as_much_as_transformers(
    moe: bool, dtype: str, seed: int, tmp_path: Path
) -> None:
    spec = Spec(moe=moe, layer_types="llfl", nk=1, nv=3, dtype=dtype, seed=seed)
    directory = random_checkpoint(tmp_path, spec)
    prompts = prompts_of([1, 65, 200], spec.vocab, random.Random(seed))
    served = serve(directory, prompts, steps=DECODE_STEPS, dtype=dtype)
    exact, same = Reference(directory, torch.float32), Reference(directory, getattr(torch, dtype))
    ours, theirs = 0.0, 0.0
    for name, ids in served.ids.items():
        truth_TV = exact.run(ids[:-1])[0]
        ours_TV = torch.stack([served.logits[name][p] for p in range(len(ids) - 1)])
        ours += (ours_TV - truth_TV).norm().item() ** 2
        theirs += (same.run(ids[:-1])[0].float() - truth_TV).norm().item() ** 2
    assert ours**0.5 < 2 * theirs**0.5
