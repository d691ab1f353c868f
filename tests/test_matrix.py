"""The compile matrix: what it must catch, and that what ships passes it, without a GPU."""

from __future__ import annotations

import ast
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import ir
from triton.compiler import code_generator, make_backend

from tritium.bench import matrix
from tritium.core import PROMPT_LOGITS, SHORT_ROW
from tritium.engine import selftest
from tritium.engine.memory_plan import workspace_bytes
from tritium.hw import NAMED, named
from tritium.models.config import FULL, LINEAR, parse_config
from tritium.models.decoder import allocate_caches
from tritium.models.families import FAMILY, family_config
from tritium.nn.batch import ForwardBatch
from tritium.ops.kernels.launch import Launch, launch, recorded
from tritium.ops.kernels.matrix import Compiled, Job, _gpu_target, compile_all, occupancy, violations
from tritium.ops.sampling import call_every_form
from tritium.ops.spans import Spans
from tritium.ops.spec import all_ops
from tritium.runner import Runner


@triton.jit
def _product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, pdl: tl.constexpr):
    """c = a b, K columns of a in steps of BLOCK."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    out = tl.zeros((M, N), tl.float32)
    for at in range(0, K, BLOCK):
        x = tl.load(a + m[:, None] * K + at + k)
        y = tl.load(b + (at + k)[:, None] * N + n)
        if DOT:
            out = tl.dot(x, y, out)
        else:
            out += tl.sum(x[:, :, None].to(tl.float32) * y[None].to(tl.float32), 1)
    tl.store(c + m[:, None] * N + n, out)


@triton.jit
def _halved(out, n, pdl: tl.constexpr):
    low, high = tl.load(out), tl.load(out + 1)
    middle = low
    while high - low > n:
        low = middle
        middle = low + ((high - low) >> 1)
    tl.store(out, low)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(dtype: torch.dtype = torch.bfloat16, m: int = 64, n: int = 64, block: int = 64, **options: Any) -> None:
    a, b, c = meta(m, 1024, dtype=dtype), meta(1024, n, dtype=dtype), meta(m, n, dtype=torch.float32)
    launch(_product, (1,), a, b, c, 1024, M=m, N=n, BLOCK=block, **{"DOT": True, "num_warps": 4, **options})


def compiled(call: Callable[[], None], arch: str, cache: Path | None = None) -> Compiled:
    with recorded(arch) as found:
        call()
    (one,) = compile_all([Job.of(each, arch) for each in found], workers=1, cache=cache)
    return one


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx1151", "gfx1201"])
def test_a_product_that_fits_is_clean_and_uses_the_matrix_unit(arch: str) -> None:
    found = compiled(product, arch)
    assert found.violations == ()
    assert any(word in found.dots for word in ("wgmma", "mma.sync", "wmma", "mfma")), found.dots
    assert found.registers > 16
    assert found.spills == 0
    assert 0 < found.occupancy <= 1


@pytest.mark.parametrize("arch", ["sm_90", "gfx1151"])
def test_a_spill_is_caught(arch: str) -> None:
    found = compiled(lambda: product(m=128, n=128, block=32, num_warps=1, num_stages=1), arch)
    assert found.spills > 0
    assert found.violations == (f"spills {found.spills}",)


def test_too_much_shared_memory_is_caught_where_it_is_too_much() -> None:
    call = lambda: product(m=128, block=128, num_stages=4, num_warps=8)  # noqa: E731
    found = {arch: compiled(call, arch) for arch in ("sm_90", "sm_120", "gfx1151")}
    assert found["sm_90"].violations == ()
    for arch in ("sm_120", "gfx1151"):
        there = named(arch).shared_memory_per_workgroup
        assert found[arch].violations == (f"{found[arch].shared} bytes of shared memory, {there} are there",)


def test_a_product_without_the_matrix_unit_is_caught() -> None:
    """8 rows are too few for CDNA's; float32 is nothing that must use it."""
    (violation,) = compiled(lambda: product(m=8, n=16, block=16), "gfx942").violations
    assert "without a matrix instruction" in violation
    exact = compiled(lambda: product(torch.float32, m=16, n=16, block=16), "gfx1151")
    assert (exact.dots, exact.violations) == ("", ())


def test_a_kernel_that_does_not_compile_is_caught() -> None:
    found = compiled(lambda: product(block=8), "sm_90")
    assert "does not compile" in found.violations[0]


def test_what_numbers_can_tell() -> None:
    fine = Compiled("gfx1151", "gdn_chunk._x", "", 4, 2, 100, 0, 1024, 0.5)
    assert violations(fine, named("gfx1151")) == []
    assert violations(replace(fine, seconds=61.0), named("gfx1151")) == ["compiles for 61 s, 60 are allowed"]
    deep = replace(fine, num_stages=3)
    assert violations(deep, named("gfx1151")) == ["num_stages 3 of a recurrence, 2 on RDNA at most"]
    assert violations(deep, named("gfx942")) == violations(replace(deep, kernel="linear._few"), named("gfx1151")) == []


def test_results_are_kept_and_judged_again(tmp_path: Path) -> None:
    call = lambda: product(m=128, block=128, num_stages=4, num_warps=8)  # noqa: E731
    first = compiled(call, "sm_120", tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert compiled(call, "sm_120", tmp_path) == first
    assert first.violations


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "share"),
    [
        ("sm_90", 64, 0, 4, 0.5),
        ("sm_90", 32, 100 << 10, 4, 8 / 64),
        ("gfx1151", 96, 0, 4, 1.0),
        ("gfx1151", 256, 0, 4, 20 / 64),
        ("gfx1151", 97, 64 << 10, 8, 16 / 64),
        ("gfx942", 128, 0, 4, 0.5),
        ("gfx942", 512, 64 << 10, 4, 4 / 32),
        ("sm_120", 255, 0, 16, 0.0),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, warps: int, share: float) -> None:
    assert occupancy(arch, registers=registers, shared=shared, num_warps=warps) == share


def test_the_table_of_chips_is_whole() -> None:
    assert all(occupancy(arch, registers=32, shared=0, num_warps=4) == 1 for arch in NAMED)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx1151", "gfx1201"])
def test_what_ships_compiles_within_the_limits(arch: str) -> None:
    """Every op in every shipped configuration; `make matrix` adds every size, and the other targets."""
    found = [each for _, each in matrix.run([arch], sample=True, workers=1)]
    assert {each.kernel.partition(".")[0] for each in found} >= {
        "attention", "attention_inputs", "delta_net", "feed", "gdn_chunk", "linear", "mlp", "moe", "moe_grouped",
        "norm", "sampling",
    }  # fmt: skip
    wrong = [matrix.line(each) for each in found if each.violations]
    assert not wrong, "\n".join(wrong)


def lost(launches: Iterable[Launch], arch: str, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(function, name) set in a loop and not carried to its next round: Triton goes by a first pass over the body, in
    which every name has its value from before. After `b = a`, an `a = b` in a loop is no change to it. The interpreter
    runs such loops as they are written."""
    generator, found, passes = code_generator.CodeGenerator, set(), []
    find, visit = generator._find_carries, generator.visit_compound_statement

    def values(self: Any) -> dict[str, list[Any]]:
        held = {name: x for name, x in self.lscope.items() if code_generator._is_triton_value(x)}
        return {name: code_generator.flatten_values_to_ir([x]) for name, x in held.items()}

    def finds(self: Any, node: Any, *more: Any, **options: Any) -> Any:
        passes.append(node)
        result = find(self, node, *more, **options)
        passes.pop()
        node.carried = {*result[0], *([node.target.id] if isinstance(node, ast.For) else [])}
        return result

    def visits(self: Any, body: Any) -> None:
        before = values(self)
        visit(self, body)
        loop = self.scf_stack[-1] if self.scf_stack else None
        if loop and body is loop.body and not passes:
            after = values(self)
            changed = {name for name, x in before.items() if after.get(name, x) != x}
            found.update((self.function_name.split("__")[0], name) for name in changed - loop.carried)

    monkeypatch.setattr(generator, "_find_carries", finds)
    monkeypatch.setattr(generator, "visit_compound_statement", visits)
    forms = {(x.kernel, *(v for v in x.options.values() if isinstance(v, (bool, str)) or v < 2)): x for x in launches}
    backend = make_backend(target := _gpu_target(arch))
    for job in (Job.of(form, arch) for form in forms.values()):
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        options = backend.parse_options(dict(job.options))
        job.source.make_ir(
            target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
    return found


def test_a_name_that_a_loop_loses_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded("sm_90") as found:
        launch(_halved, (1,), meta(2, dtype=torch.int64), 3)
    assert {name for _, name in lost(found, "sm_90", monkeypatch)} == {"low"}


def test_no_loop_loses_what_it_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(model, scheme) for model in matrix.MODELS for scheme in ("", *matrix.SCHEMES)]
    found = (x for model, scheme in steps for _, x in matrix.launches(model, "sm_90", scheme=scheme))
    assert not lost(found, "sm_90", monkeypatch)


def network(model: str, rows: int, scheme: str) -> list[Launch]:
    """What a decode step launches ahead of the sampler."""
    launches = [x for _, x in matrix.launches(model, "sm_90", [matrix.Step(decode=rows)], scheme)]
    return launches[: [x.kernel.__name__ for x in launches].index("_peaks")]


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("model", ["qwen3.6-27b", "qwen3.6-35b-a3b"])
def test_who_makes_one_tokens_x_leaves_its_largest(model: str, scheme: str) -> None:
    launches = network(model, 1, scheme)
    rounding = [x.options for x in launches if x.options.get("LARGEST") and "PEAK" in x.options]
    assert [x["N"] for x in rounding if not x["PEAK"]] == [248320]  # the head's
    assert len(rounding) == 13
    left = [x.kernel.__name__ for x in launches if x.options.get("LEAVE")]
    mlp = ["_one", "_one", "_one"] if model == "qwen3.6-27b" else ["_one", "_down_one"]
    assert left == ["_step", *mlp, "_step", *mlp, "_merge", *mlp]


def test_who_makes_a_few_tokens_x_leaves_it_scaled() -> None:
    launches = network("qwen3.6-27b", 8, "")
    assert sum(x.kernel.__name__ == "_rms_norm" for x in launches) == 2  # ahead of the first layer, and of the head
    assert sum(x.options.get("PARTS", 0) > 0 for x in launches) == 5
    assert sum(x.options.get("LEAVE", 0) for x in launches) == 6  # the last layer's, too, so that there is one form


@pytest.mark.parametrize("scheme", ["", "int8", "fp8", "int4"])
def test_what_starts_before_the_wait_of_the_one_ahead_reads_nothing_but_weights(scheme: str) -> None:
    """All models, for an entry of launch parameters serves the nearest sizes, too."""
    for model in FAMILY:
        launches = [x for _, x in matrix.launches(model, "sm_90", [matrix.Step(decode=n) for n in (1, 8)], scheme)]
        behind = {f"{after.kernel.__module__.rpartition('.')[2]}.{after.kernel.__name__}"
                  for x, after in pairwise(launches) if x.options["pdl"] == 3}  # fmt: skip
        assert behind <= {"linear._one", "quantized._one", "moe_quantized._route_one", "norm._rms_norm"}, model


def test_every_op_with_a_kernel_is_launched() -> None:
    """What no step of the family launches would never be compiled."""
    launched = {launch.kernel.__module__ for model in matrix.MODELS for _, launch in matrix.launches(model, "gfx1151")}
    modules = {f"tritium.ops.kernels.{op.launcher.partition(':')[0]}" for op in all_ops() if op.launcher}
    assert modules <= launched, modules - launched


def forms(launches: Iterable[Launch], arch: str, known: dict[object, Job]) -> dict[str, Job]:
    """What is compiled for these launches, by key. `known`: of launches seen before, by all that may tell two apart."""
    def told(a: object) -> object:
        if isinstance(a, torch.Tensor):
            return a.dtype, a.storage_offset() * a.element_size() % 16
        return (a == 1, a % 16 == 0, abs(a) >= 2**31) if isinstance(a, int) else a

    found = {}
    for x in launches:
        call = (x.kernel, repr([told(a) for a in x.arguments]), repr(sorted(x.options.items())))
        job = known[call] = known.get(call) or Job.of(x, arch)
        found[job.key] = job
    return found


def step(runner: Runner, lengths: tuple[int, ...], drafts: int, told: int, rng: random.Random) -> None:
    """What the runner calls in a step with rows of these lengths, up to 1 + `drafts` tokens of which decode; and for
    `told` tokens of a prompt whose log-probabilities are asked for."""
    model, device = runner.model, runner.model.device

    def spans(lengths: tuple[int, ...]) -> Spans:
        nothing, pages = (0,) * len(lengths), (0,) * rng.randint(1 + max(lengths) // 64, 200)
        return Spans(lengths, nothing, nothing, (pages,) * len(lengths), device)

    def ids(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64, device=device)

    batch = ForwardBatch(ids(sum(lengths)), spans(lengths), ids(1))
    hidden_TH = model.forward(batch, runner.caches)
    draws = sum(rng.choice((1, n)) if n <= drafts + 1 else rng.randrange(2) for n in lengths)
    for count in (draws, told):
        if count:
            call_every_form(model.logits(hidden_TH[ids(count)]))
    if runner.run_head:
        stays = [rng.randint(1, n) if n <= drafts + 1 else n for n in lengths]
        followed = tuple(n for n in stays if rng.random() < 0.8) or (stays[0],)
        guessing = (1,) * rng.randint(1, len(followed))
        for rows in (followed, guessing):
            next_ids_T = ids(sum(rows))
            hidden_TH = model.draft_hidden(hidden_TH[next_ids_T], next_ids_T, spans(rows), runner.caches[-1])
            call_every_form(model.logits(hidden_TH[ids(rng.randint(1, len(rows)))]))


@pytest.mark.parametrize(("arch", "model", "scheme"), [
    ("sm_90", "qwen3.6-27b", ""), ("sm_90", "qwen3.6-35b-a3b", ""), ("sm_90", "qwen3.6-27b", "int8"),
    ("sm_90", "qwen3.6-35b-a3b", "fp8"), ("gfx1151", "qwen3.6-27b", "int4"),
])  # fmt: skip
def test_nothing_is_left_to_be_compiled_on_a_request(
    arch: str, model: str, scheme: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of random steps are among those that a start compiles: any rows, drafts, ends of prompts and prompts; and
    so are those of the self-test itself."""
    draw, whole = torch.randn, torch.randint  # which here have no numbers, and so no generator
    monkeypatch.setattr(torch, "Generator", Mock)
    monkeypatch.setattr(torch, "randn", lambda *sizes, generator, **options: draw(*sizes, **options))
    monkeypatch.setattr(torch, "randint", lambda *sizes, generator, **options: whole(*sizes, **options))
    config = replace(parse_config(family_config(model) or {}), layer_types=(LINEAR, LINEAR, LINEAR, FULL) * 2)
    rng, known = random.Random(seed), dict[object, Job]()
    for max_rows in (1, 2, 4, 8, 32, 100):
        drafts = rng.choice((0, 1, 2, 3, 8))
        budget = rng.choice((max(16, max_rows * (1 + drafts)), 500, 3000, 8192))
        decoder, _ = matrix.stand_in(matrix.in_scheme(config, scheme), named(arch).features)
        caches = allocate_caches(config, pages=64, slots=64, dtype=torch.bfloat16, device=decoder.device, drafts=drafts)
        runner = Runner(decoder, caches, run_head=drafts > 0)
        with recorded(arch) as found:
            runner.compile(max_rows, drafts, budget, 1, also=selftest.steps(drafts))
        ready = forms(found, arch, known)
        with recorded(arch) as found:
            selftest._run(decoder, drafts, lambda op, given: op.kernel(**selftest._copied(given)))
        left = {job.name: job.settings for key, job in forms(found, arch, known).items() if key not in ready}
        assert not left, (max_rows, drafts, budget, "the self-test")
        steps = [(n,) for n in range(1, min(budget, 66) if max_rows == 1 else 1)]
        for _ in range(30):
            short = rng.randint(0, max_rows)
            long = min(max_rows - short, rng.randint(not short, 3))
            lengths = (*(rng.choice((1, 1, 1 + drafts, rng.randint(1, SHORT_ROW))) for _ in range(short)),
                       *(rng.randint(17, rng.choice((400, 8000))) for _ in range(long)))  # fmt: skip
            steps += [lengths] if sum(lengths) <= budget else []
        for lengths in steps:
            told = min(lengths[-1] - 1, rng.randint(0, PROMPT_LOGITS))
            with recorded(arch) as found:
                step(runner, lengths, drafts, told, rng)
            left = {job.name: job.settings for key, job in forms(found, arch, known).items() if key not in ready}
            assert not left, (max_rows, drafts, budget, lengths, told)


class Held(TorchDispatchMode):
    """`most`: bytes that tensors made under it held at once, without those that only `launches` remember."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches, self.tensors, self.now, self.most = launches, Counter[int](), 0, 0

    def __torch_dispatch__(self, call: Callable[..., Any], types: Any, given: Any = (), options: Any = None) -> Any:
        self.launches.clear()
        out = call(*given, **(options or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                storage, size = x.untyped_storage()._cdata, x.untyped_storage().nbytes()
                self.now += 0 if self.tensors[storage] else size
                self.tensors[storage] += 1
                weakref.finalize(x, self.leave, storage, size)
        self.most = max(self.most, self.now)
        return out

    def leave(self, storage: int, size: int) -> None:
        self.tensors[storage] -= 1
        self.now -= 0 if self.tensors[storage] else size


@pytest.mark.parametrize("tokens", [64, 512, 4096])
def test_a_start_holds_no_more_than_was_planned_for_steps(tokens: int) -> None:
    """Logits of prompts too, where few tokens a step and few rows leave little room for them."""
    config = parse_config(family_config("qwen3.5-0.8b") or {})
    decoder, _ = matrix.stand_in(config, named("sm_90").features)
    caches = allocate_caches(config, pages=64, slots=64, dtype=torch.bfloat16, device=decoder.device, drafts=0)
    runner = Runner(decoder, caches, run_head=False)
    fixed, per_row = workspace_bytes(config, tokens, 4096, 2)
    with recorded("sm_90") as launches, Held(launches) as held:
        runner.compile(1, 0, tokens, 1)
    assert min(tokens, PROMPT_LOGITS) * config.vocab_size * 8 <= held.most <= fixed + per_row
