"""The benchmarks on a CPU, with tiny random models: what they count is what happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import Spec, hf_config
from click.testing import CliRunner
from served import rambles, served

from tritium.bench import decode as bench
from tritium.bench import show, speculation
from tritium.bench.ceilings import Ceilings, flops, measure, step_bytes
from tritium.bench.kernels import Event, shares
from tritium.bench.ops import run, sizes
from tritium.cli.bench import bench as command
from tritium.cli.doctor import plan
from tritium.config import EngineConfig
from tritium.core import CapacityError, CheckpointError, ConfigError, Request, SamplingParams
from tritium.engine import Engine
from tritium.hw import Target
from tritium.models.checkpoint import find_checkpoint, load_parameters
from tritium.models.config import parse_config
from tritium.models.families import FAMILY, family_config
from tritium.models.parameters import parameter_shapes, stored_sizes
from tritium.ops.spec import all_ops

CEILINGS = Ceilings("a chip", read=1e9, copy=1e9, dot=1e9)
H200 = Target("cuda", "cuda:0", "NVIDIA H200", "sm_90", 132, 140 << 30, 140 << 30, host_memory=64 << 30)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json and nothing else."""
    directory = tmp_path_factory.mktemp("tiny")
    spec = Spec(layer_types="llf", vocab=2000, hidden=64, nested=False, tied=False)
    (directory / "config.json").write_text(json.dumps(hf_config(spec).to_dict() | {
        "architectures": ["Qwen3_5ForCausalLM"], "max_position_embeddings": 4096, "mtp_num_hidden_layers": 1}))
    return directory


def dummy(model: Path | str, **options) -> EngineConfig:
    return EngineConfig(**{"model": str(model), "load_format": "dummy", "device": "cpu", "max_num_seqs": 4,
                           "num_threads": 1, "show_progress": False} | options)


def invoke(*arguments: str) -> dict:
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- random weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_every_name_of_the_family_is_a_configuration(name: str) -> None:
    config = parse_config(family_config(name.upper()) or {})
    assert config.mtp_layers == 1
    assert config.layer_types[:4] == ("linear_attention",) * 3 + ("full_attention",)
    billions = float(name.split("-")[1].removesuffix("b"))
    assert sum(stored_sizes(config, 2).values()) / 2e9 == pytest.approx(billions, rel=0.2)  # the MTP head included


def test_dummy_weights_are_drawn_apart_and_by_their_seed(tiny: Path) -> None:
    checkpoint = find_checkpoint(dummy(tiny))
    drawn, again = (load_parameters(checkpoint, dtype=torch.bfloat16) for _ in range(2))
    assert {name: tuple(w.shape) for name, w in drawn.items()} == {
        name: spec.shape for name, spec in parameter_shapes(checkpoint.config).items()
    }
    assert all(torch.equal(weight, again[name]) for name, weight in drawn.items())
    assert len({weight.data_ptr() for weight in drawn.values()}) == len(drawn)
    first, second = (drawn[f"layers.{i}.mlp.gate_up.weight"] for i in (0, 1))
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)
    assert float(first.float().std()) * 8 == pytest.approx(1.0, rel=0.05)
    assert float(drawn["layers.0.gdn.A_log"].exp().max()) <= 16
    assert all(torch.isfinite(weight).all() for weight in drawn.values())


def test_a_dummy_generates_text_of_the_embedded_tokenizer(tiny: Path) -> None:
    engine = Engine.load(dummy(tiny))
    request = Request("a", [1, 2, 3], SamplingParams(temperature=0.6, top_k=20, max_tokens=24, ignore_eos=True), seed=3)
    engine.add(request)
    while engine.has_work:
        engine.step()
    assert len(set(request.output_ids)) > 8
    assert max(request.output_ids) < 1536
    assert (engine.directory / "tokenizer.json").exists()


def test_a_shape_has_no_weights_and_its_plan_needs_none() -> None:
    with pytest.raises(CheckpointError, match="a shape without weights") as caught:
        find_checkpoint(EngineConfig(model="qwen3.6-27b"))
    assert "--load-format dummy" in (caught.value.hint or "")
    assert "weights" in plan(EngineConfig(model="qwen3.6-27b"), H200)
    with pytest.raises(CapacityError, match="the model does not fit"):
        Engine.load(dummy("qwen3.5-397b-a17b"))
    with pytest.raises(ConfigError, match="--load-format nonsense"):
        EngineConfig(load_format="nonsense")


# --- what must move ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rows", "measured", "too_much"), [
    ("qwen3.6-27b", 1, 51.93, 0.35), ("qwen3.6-27b", 8, 54.28, 0.35),
    ("qwen3.6-35b-a3b", 1, 6.19, 0.17), ("qwen3.6-35b-a3b", 8, 19.62, 0.17),
])  # fmt: skip
def test_bytes_of_a_step_are_those_that_were_measured(
    name: str, rows: int, measured: float, too_much: float
) -> None:
    """GB of the steps that an H200 was measured with, whose networks were a little larger than the real ones: all
    layers had the recurrent kind's projection."""
    config = parse_config(family_config(name) or {})
    assert step_bytes(config, rows, 512) / 1e9 == pytest.approx(measured - too_much, rel=0.01)


def test_bytes_and_operations_grow_with_context_and_rows() -> None:
    config = parse_config(family_config("qwen3.6-27b") or {})
    assert step_bytes(config, 1, 1024) - step_bytes(config, 1, 512) == 512 * 65536
    assert step_bytes(config, 4, 512) - step_bytes(config, 3, 512) == step_bytes(config, 2, 512) - step_bytes(
        config, 1, 512)
    assert flops(config, 1, 0, 1) / 1e9 == pytest.approx(2 * 25.6, rel=0.01)


def test_ceilings_are_measured_in_a_moment() -> None:
    found = measure("cpu", small=True)
    assert min(found.read, found.copy, found.dot) > 1e8
    assert "GB/s" in found.line()


# --- the engine ----------------------------------------------------------------------------------------------------


def test_placed_requests_decode_at_their_context(tiny: Path) -> None:
    engine = Engine.load(dummy(tiny, enable_prefix_caching=False, speculate="none"))
    asked = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    requests = [bench.request(engine, str(i), 1000 + i, asked, seed=i) for i in range(3)]
    bench.place(engine, requests)
    assert [r.num_computed for r in requests] == [1000, 1001, 1002]
    engine.step()
    assert [r.num_computed for r in requests] == [1001, 1002, 1003]
    assert all(len(r.output_ids) == 2 for r in requests)
    bench.clear(engine, requests)
    assert engine.stats().pages_used == engine.stats().slots_used == 0
    with pytest.raises(CapacityError, match="do not fit at once"):
        bench.place(engine, [bench.request(engine, str(i), 100, asked) for i in range(5)])
    assert not engine.has_work


def test_the_decode_matrix_ends_in_json_a_table_and_a_picture(tiny: Path, tmp_path: Path) -> None:
    picture, file = tmp_path / "out.png", tmp_path / "out.json"
    result = invoke("decode", "--model", str(tiny), "--load-format", "dummy", "--num-threads", "1", "-q",
                    "--rows", "1,3",
                    "--contexts", "64,500,131072", "--steps", "4", "--rounds", "1", "--plot", str(picture))
    cells = {(cell["rows"], cell["context"]): cell for cell in result["cells"]}
    assert set(cells) == {(rows, context) for rows in (1, 3) for context in (64, 500, 131072)}
    assert cells[3, 131072]["skipped"] == "longer than max_model_len"
    cell = cells[3, 500]
    assert cell["tokens_per_step"] == 3
    assert cell["tokens_per_second"] == pytest.approx(3000 / cell["ms"])
    assert cell["share"] == pytest.approx(cell["bytes"] / cell["ms"] * 1e3 / result["ceilings"]["read"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    file.write_text("talk\n" + json.dumps(result) + "\n")
    table = CliRunner().invoke(command, ["table", str(file)]).output.splitlines()
    assert table[0] == "| rows | 64 | 500 | 128K |"
    assert table[2].startswith("| 1 | ")
    assert table[3].endswith(" | - |")


def test_cells_that_hold_more_than_the_pool_are_skipped(tiny: Path) -> None:
    config = dummy(tiny, num_gpu_blocks_override=12, speculate="none")
    cells = list(bench.decode(config, CEILINGS, rows=(1, 4), contexts=(400,), steps=2, rounds=1))
    assert [cell.get("skipped") for cell in cells] == [None, "more KV than fits"]


def test_kernels_are_charged_with_what_they_add_to_a_step() -> None:
    """Two steps: a long kernel, one that waits for it from its middle on, a gap, one that is hidden wholly."""
    events = [Event(name, grid, begin + step * 100, lasts) for step in (0, 1) for name, grid, begin, lasts in (
        ("long", (64,), 1000.0, 40.0), ("waits", (8,), 1020.0, 25.0), ("late", (), 1050.0, 30.0),
        ("hidden", (1,), 1055.0, 5.0))]
    cells = {cell["kernel"]: cell for cell in shares(reversed(events), steps=2)}
    assert list(cells) == ["long", "late", "waits", "hidden"]
    # In the second step nothing ran from 1080 to 1100.
    assert {name: cell["own_us"] for name, cell in cells.items()} == {
        "long": (40 + 60) / 2, "waits": 5.0, "late": 35.0, "hidden": 0.0}
    assert (cells["late"]["idle_us"], cells["waits"]["lasts_us"], cells["long"]["grid"]) == (5.0, 25.0, "64")
    assert sum(cell["own_us"] for cell in cells.values()) == (1180 - 1000) / 2


def test_kernels_of_steps_that_are_no_graphs_are_refused(tiny: Path) -> None:
    done = CliRunner().invoke(command, ["kernels", "--model", str(tiny), "--load-format", "dummy", "--device", "cpu"])
    assert isinstance(done.exception, ConfigError)
    assert "--enforce-eager" in (done.exception.hint or "")


def test_prompts_are_timed(tiny: Path) -> None:
    cells = list(bench.prefill(dummy(tiny, speculate="none"), CEILINGS, lengths=(200, 5000), rounds=1))
    assert cells[0]["tokens_per_second"] == pytest.approx(200 / cells[0]["seconds"])
    assert "skipped" in cells[1]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_full_pool_is_filled_to_its_last_page(tiny: Path, prefix: bool) -> None:
    config = dummy(tiny, max_model_len=320, num_gpu_blocks_override=15, enable_prefix_caching=prefix, speculate="none",
                   max_num_batched_tokens=128)
    found = bench.fill(config, tokens=12)
    assert (found["rows"], found["pages_used"], found["pages_total"]) == (3, 15, 15)
    assert found["complete"]
    assert found["alike"]
    assert found["as_alone"] == 1.0
    assert found["preemptions"] == 0


def test_starts_are_timed_in_processes_of_their_own(tiny: Path) -> None:
    result = invoke("start", "--model", str(tiny), "--load-format", "dummy", "-q", "--starts", "1", "--requests", "3",
                    "--prompt", "16")
    (cell,) = result["cells"]
    assert len(cell["ttft"]) == 3
    assert cell["to_first_token"] == pytest.approx(cell["imports"] + cell["load"] + cell["ttft_first"])


def test_speculation_is_held_against_none_cell_by_cell(tiny: Path) -> None:
    def turns(seed: int) -> list[tuple[dict, dict]]:
        return [({"role": "user", "content": f"What is {seed} + 1?"}, {"role": "assistant", "content": "A sum."})]

    (cell,) = speculation.run(dummy(tiny), turns, rows=(2,), contexts=(64,), rounds=1, tokens=8)
    assert cell["ratio"] == pytest.approx(cell["tokens_per_second"] / cell["tokens_per_second_without"])
    assert 1 <= cell["tokens_per_forward"] <= 4
    head, _, line = show.markdown({"bench": "speculation", "cells": [cell]}).splitlines()
    assert head == "| rows | context | tokens/s | without | ratio | a forward |"
    assert line.startswith("| 2 | 64 | ")


# --- ops and servers -----------------------------------------------------------------------------------------------


def test_every_op_has_a_line_at_the_models_sizes() -> None:
    raw = family_config("qwen3.5-0.8b") or {}
    config = parse_config(raw | {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "vocab_size": 300})
    family = sizes(config, (2, 3), (100,))
    assert [len(family[name]) for name in ("rms_norm", "delta_net", "linear")] == [2, 1, 14]
    ops = all_ops()
    assert set(family) <= {op.spec.name for op in ops}
    quick = [op for op in ops if op.spec.name != "gdn"]
    lines = list(run(quick, family, "cpu", CEILINGS, budget=1e-4))
    assert [line["op"] for line in lines if not line["called"]] == [
        op.spec.name for op in quick if op.spec.name not in family]
    assert len(lines) == sum(len(family.get(op.spec.name, [1])) for op in quick)
    assert all(line["us"] > 0 and line["floor_us"] >= 0 for line in lines)
    moe = sizes(parse_config(family_config("qwen3.6-35b-a3b") or {}), (8,), (512,))["moe"]
    assert moe == [{"T": 8, "E": 256, "K": 8, "H": 2048, "I": 512, "S": 512}]


def test_an_op_that_does_not_exist_is_refused_by_name() -> None:
    done = CliRunner().invoke(command, ["ops", "--op", "attention", "--device", "cpu"])
    assert done.exit_code == 2
    assert "attention is not one of attention_inputs," in done.output


def test_a_server_is_asked_by_more_and_more_clients() -> None:
    with served(rambles(step_seconds=0.002)) as server:
        result = invoke("serve", server.url, "--concurrency", "1,3", "--each", "2", "--prompt", "40", "--tokens", "6")
    first, second = result["cells"]
    assert (first["clients"], second["clients"]) == (1, 3)
    assert (second["completed"], second["errors"], second["output_tokens"]) == (6, 0, 36)
    assert second["ttft"]["p50"] >= 0.002
    assert second["step_us"] == {}  # a scripted engine has no phases
    assert "TTFT p50 ms" in show.markdown(result)


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no server answers"):
        invoke("serve", "http://127.0.0.1:9")


@pytest.mark.parametrize("rows", ["0", "1,,2", "x", "1,-2"])
def test_lists_of_numbers_are_checked(rows: str) -> None:
    done = CliRunner().invoke(command, ["decode", "--rows", rows])
    assert done.exit_code == 2
    assert "whole numbers above 0" in done.output
