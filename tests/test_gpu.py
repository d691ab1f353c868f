"""The engine on a GPU: how a request is served changes no token there either, and Transformers agrees on the logits.

In float32 the tokens are those of the CPU's references; in bfloat16 graphs give those of eager steps.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Spec, random_checkpoint
from serving import Logits, Served, request

from tritium.config import EngineConfig
from tritium.core import Request
from tritium.engine import Engine
from tritium.ops.handed import Peak

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

WAYS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"async_scheduling": False},
    "one step ahead": {},
    "prefix cache off": {"enable_prefix_caching": False},
    "chunks of 128": {"max_num_batched_tokens": 128},
}


def load(model: str, **options: Any) -> Engine:
    fixed: dict[str, Any] = {"max_num_seqs": 16, "max_model_len": 2048, "speculate": "none", "show_progress": False}
    return Engine.load(EngineConfig(model=model, **(fixed | options)))


def requests(vocab: int, count: int = 12) -> list[Request]:
    rng = random.Random(0)
    out = []
    for i in range(count):
        ids = [rng.randrange(5, vocab) for _ in range(rng.choice((1, 5, 20, 64, 100, 300)))]
        sampling: dict[str, Any] = {"max_tokens": 60, "ignore_eos": i % 3 == 0}
        if i % 2:
            sampling |= {"temperature": 0.8, "top_p": 0.9, "top_k": rng.choice((0, 20)), "seed": i}
        out.append(request(str(i), ids, **sampling))
    return out


def served(engine: Engine, asked: list[Request]) -> Served:
    out: Served = {}
    tokens: dict[str, list[int]] = {r.id: [] for r in asked}
    for r in asked:
        engine.add(r)
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.tokens
            if event.finish_reason:
                out[event.request_id] = tokens[event.request_id], event.finish_reason
    return out


@pytest.mark.parametrize("model", ["tritium-dense", "tritium-moe"])
def test_every_way_to_serve_gives_the_tokens_of_the_cpu(model: str) -> None:
    want = served(load(model, device="cpu"), requests(300))
    for way, options in WAYS.items():
        got = served(load(model, device="cuda", dtype="float32", **options), requests(300))
        assert got == want, way
    for speculate in ("mtp:3", "ngram:4", "auto"):
        got = served(load(model, device="cuda", dtype="float32", speculate=speculate), requests(300))
        assert got == want, speculate
    alone = load(model, device="cuda", dtype="float32", enable_prefix_caching=False)
    for r in requests(300, 6):
        assert served(alone, [r])[r.id] == want[r.id], "alone"


@pytest.mark.parametrize("model", ["tritium-dense", "tritium-moe"])
def test_graphs_change_nothing_in_bfloat16(model: str) -> None:
    """Of the same steps. (One step ahead, a row that has just ended still counts as one, and in bfloat16 the number of
    rows may change a rounding.)"""
    eager, graphs = (
        served(load(model, device="cuda", dtype="bfloat16", async_scheduling=False, **options), requests(300))
        for options in ({"enforce_eager": True}, {})
    )
    assert eager == graphs


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("model", ["tritium-dense", "tritium-moe"])
def test_a_token_is_the_same_whoever_looks_for_the_largest_number(model: str, scheme: str) -> None:
    told, alone = (load(model, device="cuda", quantize=scheme, enforce_eager=True) for _ in range(2))
    links = [link[0] for layer in alone.runner.model.layers for part in (layer.mixer, layer.mlp) for link in part.chain]
    peaks = [arguments.pop("given") for arguments in links if isinstance(arguments.get("given"), Peak)]
    assert len(peaks) > len(told.runner.model.layers)
    for i in range(6):
        assert served(told, [requests(300, 6)[i]]) == served(alone, [requests(300, 6)[i]])


@pytest.mark.parametrize("rows", [1, 16])
def test_nothing_compiles_on_a_request(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    engine = load("tritium-dense", device="cuda", speculate="mtp:3", max_num_seqs=rows)
    compiled: list[str] = []
    compile_one = JITFunction._do_compile

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(self.fn.__name__)
        return compile_one(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", noted)
    rng = random.Random(2)
    for count in (1, 2, 3, 7, 16):
        asked = [request(str(i), [rng.randrange(5, 300) for _ in range(rng.randint(1, 400))]) for i in range(count)]
        served(engine, asked)
    assert not compiled


def test_the_self_test_attests_every_op() -> None:
    engine = load("tritium-moe", device="cuda")
    names = {"linear", "moe", "delta_net", "attention_inputs", "paged_attention", "rms_norm", "sample"}
    assert names <= engine.attested.keys()
    assert max(engine.attested.values()) < 0.3


def test_the_next_turn_of_a_chat_is_cold_or_cached_the_same() -> None:
    engine = load("tritium-dense", device="cuda", dtype="float32")
    ids = [5 + i % 290 for i in range(333)]
    first, _ = served(engine, [request("a", ids)])["a"]
    turn = [*ids, *first, 7, 8, 9]
    cached = served(engine, [request("b", turn)])["b"]
    assert engine.stats().prefix_hit_tokens >= 256
    cold = load("tritium-dense", device="cuda", dtype="float32", enable_prefix_caching=False)
    assert served(cold, [request("b", turn)])["b"] == cached


SPECS = [
    Spec(layer_types="lllf", nk=2, nv=2, head_dim=256, tied=True),
    Spec(layer_types="lffl", nk=1, nv=3, head_dim=64, vocab=320, hidden=96, rotary=0.5),
    Spec(layer_types="lllf", moe=True, nk=1, nv=4, head_dim=64, heads=6, kv_heads=2),
]


@pytest.mark.parametrize("spec", SPECS, ids=["dense", "odd", "moe"])
def test_transformers_own_cuda_forward(spec: Spec, tmp_path: Path) -> None:
    """Float32 against Transformers in float32; bfloat16 within twice the error of Transformers in bfloat16. A prompt in
    chunks, and decode steps."""
    import transformers

    directory = random_checkpoint(tmp_path, spec)
    rng = random.Random(1)
    prompt = [rng.randrange(1, 90) for _ in range(211)]

    def theirs(ids: list[int], dtype: torch.dtype) -> torch.Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to("cuda").eval()
        with torch.inference_mode():
            return model(torch.tensor([ids], device="cuda")).logits[0].double()

    def relative(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x - y).norm() / y.norm())

    for dtype in (torch.float32, torch.bfloat16):
        engine = load(str(directory), device="cuda", dtype=str(dtype)[6:], max_num_batched_tokens=96, max_model_len=512,
                      max_num_seqs=1)  # fmt: skip
        logits = Logits()
        engine.runner.observer = logits
        tokens = served(engine, [request("r", prompt, max_tokens=24)])["r"][0]
        ids = [*prompt, *tokens[:-1]]
        mine = torch.stack([logits.rows["r", t] for t in range(len(ids))]).double()
        exact = theirs(ids, torch.float32)
        if dtype == torch.float32:
            assert relative(mine, exact) < 1e-4
        elif not spec.moe:  # there a rounding may change the choice of an expert
            assert relative(mine, exact) < 2 * relative(theirs(ids, dtype), exact)
