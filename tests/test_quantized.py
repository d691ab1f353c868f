"""Weights in fewer bits: what their numbers mean, which tensors are, and that serving by them keeps every identity."""

from __future__ import annotations

import errno
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INDEX, Spec, edit_config, random_checkpoint, read_tensors, write_tensors
from serving import Logits, Served, again, assemble, mixed_requests, prompt, replace_tokens, request, run, serve
from torch import Tensor

from tritium.bench.ceilings import step_bytes
from tritium.cli.main import main
from tritium.config import SCHEMES as NAMES
from tritium.config import EngineConfig
from tritium.core import CheckpointError, ConfigError
from tritium.draft.proposers import HeadProposer
from tritium.engine import Engine
from tritium.models.checkpoint import Checkpoint, find_checkpoint, load_parameters, open_checkpoint
from tritium.models.config import parse_config
from tritium.models.families import family_config
from tritium.models.parameters import quantizable, stored_sizes
from tritium.models.save import save
from tritium.ops.linear import linear
from tritium.ops.moe import moe
from tritium.ops.quantized import FORMS, SCHEMES, Quantized, Scheme, dequantize, quantize, row_blocks
from tritium.quant import declared, select

DENSE = Spec(layer_types="lfl", hidden=96)
MOE = replace(DENSE, moe=True, hidden=64, experts=4)
KEPT = ("lm_head", "mlp.gate.", "shared_expert_gate", "in_proj_a", "in_proj_b", "mtp.fc")


# --- what the numbers mean, stated once more ----------------------------------------------------------------------


def e4m3(x: Tensor) -> Tensor:
    """The nearest of ±(1 + m/8) 2^e, -6 <= e <= 8, and below that of multiples of 2^-9; ties to even; at most 448."""
    exponent = torch.floor(torch.log2(x.abs().clamp_min(2.0**-40))).clamp(-6, 8)
    return (torch.round(x * 2.0 ** (3 - exponent)) * 2.0 ** (exponent - 3)).clamp(-448, 448)


def stated_weight(q: Quantized) -> Tensor:
    """[J, K] float64, number by number."""
    rows, columns = q.shape
    out = torch.zeros(rows, columns, dtype=torch.float64)
    scheme, group = q.scheme, q.scheme.group or columns
    for j in range(rows):
        for k in range(columns):
            scale = float(q.scales[j // scheme.rows, k // group])
            if scheme.bits == 8:
                value = float(q.values[j, k])
            else:
                nibble = int(q.values[j, k // 2]) >> 4 * (k % 2) & 15
                if scheme.name == "int4":
                    value = nibble - 8
                else:
                    sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
                    value = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
                    value, scale = (-value if sign else value), 2.0 ** (scale - 127)
            out[j, k] = value * scale
    return out


def stated_activations(x: Tensor, scheme: Scheme) -> Tensor:
    x = x.double()
    if scheme.activations is None:
        return x
    largest = x.abs().amax(-1, keepdim=True)
    most, nearest = (127.0, torch.round) if scheme.activations == torch.int8 else (448.0, e4m3)
    return torch.where(largest > 0, nearest(x * most / largest.clamp_min(1e-300)) * largest / most, x)


def weight(seed: int, rows: int, columns: int) -> Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5
    w[1] = 0.0
    w[2] = 0.25
    w[3] *= 1000
    w[:, 5] *= 1000
    w[4:, 6] = 0.0
    return w


@pytest.mark.parametrize("scheme", FORMS, ids=lambda s: s.name + ("" if s.activations else "-weights"))
@pytest.mark.parametrize(("rows", "columns"), [(7, 24), (9, 130), (130, 300)])
def test_a_product_is_what_its_scheme_says(scheme: Scheme, rows: int, columns: int, seed: int) -> None:
    w = weight(seed, rows, columns)
    q = quantize(w, scheme)
    stated = stated_weight(q)
    assert torch.equal(dequantize(q, torch.float64), stated)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed + 1))
    x[1], x[2], x[3, 5] = 0.0, 0.5, 300.0
    want = stated_activations(x, scheme) @ stated.t()
    got = linear(x_MK=x, w_JK=q)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert not got[1].any(), "a token of zeros"
    assert not got[:, 1].any(), "a row of zeros"


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_each_number_becomes_a_near_one(scheme: Scheme, seed: int) -> None:
    w = weight(seed, 12, 300)
    stated = stated_weight(quantize(w, scheme))
    error, blocks = (stated - w.double()).abs(), scheme.group or 300
    for at in range(0, 300, blocks):
        part = w[:, at : at + blocks].double()
        largest = part.abs().amax(-1, keepdim=True) if scheme.rows == 1 else part.abs().max()
        if scheme.name == "int8":
            allowed = largest / 254 + 0 * part
        elif scheme.bits == 8:
            allowed = part.abs() / 16 + largest / 448 * 2.0**-10
        elif scheme.name == "int4":
            continue  # clipped where that is better, as the next test says
        else:
            allowed = (part.abs() / 4).clamp_min(largest / 8)
        assert (error[:, at : at + blocks] <= allowed * 1.001).all()


def test_int4_is_better_than_rounding_to_sevenths_of_the_largest(seed: int) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    groups = w.unflatten(-1, (-1, 128))
    step = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    plain = (groups / step).round().clamp(-8, 7) * step
    best = dequantize(quantize(w, SCHEMES["int4"]), torch.float32).unflatten(-1, (-1, 128))
    theirs, ours = ((x - groups).square().sum(-1) for x in (plain, best))
    assert (ours <= theirs).all()
    assert ours.sum() < 0.8 * theirs.sum()


@pytest.mark.parametrize("scheme", FORMS, ids=lambda s: s.name + ("" if s.activations else "-weights"))
def test_what_shares_a_step_changes_no_bit(scheme: Scheme, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = tuple(quantize(torch.randn(n, 200, generator=generator), scheme) for n in (128, 24))
    x = torch.randn(70, 200, generator=generator)
    for product in (w[0], w, (*w, torch.randn(8, 200, generator=generator))):
        whole = linear(x_MK=x, w_JK=product)
        for count in (1, 2, 3, 7, 8, 9, 65):
            assert torch.equal(linear(x_MK=x[3 : 3 + count], w_JK=product), whole[3 : 3 + count])


def test_row_blocks_are_columns_of_one_result(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 96, generator=generator) for n in (10, 6, 4, 12)]
    blocks = (quantize(parts[0], SCHEMES["fp8"]), quantize(parts[1], SCHEMES["int4"]), parts[2],
              quantize(parts[3], SCHEMES["int8"]))  # fmt: skip
    x, norm = torch.randn(3, 96, generator=generator), torch.randn(96, generator=generator)
    got = linear(x_MK=x, w_JK=blocks, norm_K=norm, eps=1e-6, gated=True)
    apart = torch.cat([linear(x_MK=x, w_JK=block, norm_K=norm, eps=1e-6) for block in blocks], -1)
    torch.testing.assert_close(got, torch.nn.functional.silu(apart[:, :16]) * apart[:, 16:])


def test_experts_of_row_blocks(seed: int) -> None:
    """Gate and up stored apart give what they give together."""
    dims = {**moe.spec.cases[-1], "scheme": 1}
    given = moe.spec.inputs(dims, torch.float32, torch.Generator().manual_seed(seed))
    whole = given["gate_up_EJH"]
    half = whole.shape[1] // 2
    apart = tuple(whole._replace(values=whole.values[:, s], scales=whole.scales[:, s])
                  for s in (slice(0, half), slice(half, None)))  # fmt: skip
    assert torch.equal(moe(**given), moe(**given | {"gate_up_EJH": apart}))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(scheme: Scheme, bad: float, seed: int) -> None:
    w = weight(seed, 9, 130)
    w[8, 129] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(w, scheme)


# --- which tensors ------------------------------------------------------------------------------------------------


def sources(directory: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by canonical name."""
    return {n.removeprefix("model.").removeprefix("language_model."): t for n, t in read_tensors(directory).items()}


@pytest.fixture(scope="module", params=[DENSE, MOE, replace(MOE, per_expert=True, nested=True, shards=3)], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param, seed=seed)


def opened(directory: Path, scheme: str | None = None, **more: Any) -> Checkpoint:
    return find_checkpoint(EngineConfig(model=str(directory), quantize=scheme, **more))


@pytest.mark.parametrize("scheme", NAMES)
def test_the_defaults(written: Path, scheme: str) -> None:
    config = opened(written, scheme).config
    kept = (*KEPT, "in_proj_qkv", "in_proj_z") if scheme == "int8" else KEPT
    could = {name for name in sources(written) if name in quantizable(config)}
    assert {name: scheme for name in could if not any(word in name for word in kept)} == dict(config.schemes)
    words = ("out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate", "up", "down", "mtp.layers.0.mlp")
    assert all(any(word in name for name, _ in config.schemes) for word in words)


def test_globs_are_on_the_checkpoints_names(written: Path) -> None:
    name = next(n for n in read_tensors(written) if n.endswith("layers.1.self_attn.k_proj.weight"))
    canonical = "layers.1.self_attn.k_proj.weight"
    plain = dict(opened(written, "fp8").config.schemes)
    for glob in (name, canonical, "*layers.1.*k_proj*"):
        assert plain.keys() - dict(opened(written, "fp8", keep_bf16=(glob,)).config.schemes) == {canonical}
    also = dict(opened(written, "int8", quantize_also=("lm_head.weight", "*in_proj_qkv*")).config.schemes)
    added = also.keys() - dict(opened(written, "int8").config.schemes)
    assert added == {n for n in sources(written) if "in_proj_qkv" in n or n == "lm_head.weight"}
    both = opened(written, "int8", quantize_also=("lm_head.weight",), keep_bf16=("lm_*",)).config
    assert "lm_head.weight" not in dict(both.schemes)


def test_a_glob_that_matches_nothing_is_refused_with_what_is_near(written: Path) -> None:
    with pytest.raises(ConfigError, match=r"--keep-bf16 \*in_prj_qkv\* matches no .*\*\.linear_attn\.in_proj_qkv"):
        opened(written, "int8", keep_bf16=("*in_prj_qkv*",))
    shape = EngineConfig(model="qwen3.6-27b", quantize="int8", keep_bf16=("model.language_model.layers.3.*",))
    assert "layers.3.mlp.up_proj.weight" not in dict(find_checkpoint(shape, weights=False).config.schemes)
    for hopeless in ("*embed_tokens*", "*layernorm*", "*conv1d*", "*A_log"):
        with pytest.raises(ConfigError, match=r"--quantize-also .* matches no tensor that can be quantized"):
            opened(written, "int8", quantize_also=(hopeless,))
    with pytest.raises(ConfigError, match="--keep-bf16 is about what --quantize takes"):
        EngineConfig(keep_bf16=("*",))
    with pytest.raises(ConfigError, match="--quantize int3"):
        EngineConfig(quantize="int3")


def test_experts_of_a_layer_are_stored_alike(tmp_path: Path) -> None:
    directory = random_checkpoint(tmp_path / "x", MOE, per_expert=True)
    checkpoint = opened(directory, "int8", keep_bf16=("*layers.0.mlp.experts.2.up_proj*",))
    with pytest.raises(ConfigError, match="experts of a layer must all be stored in the same way"):
        load_parameters(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("scheme", NAMES)
def test_parameters_are_their_tensors_quantized_and_counted(written: Path, scheme: str) -> None:
    checkpoint = opened(written, scheme)
    parameters = load_parameters(checkpoint, dtype=torch.bfloat16)
    assert sum(stored_sizes(checkpoint.config, 2).values()) == sum(
        block.nbytes for weights in parameters.values() for block in row_blocks(weights)
    )
    t = sources(written)
    qkv = [t[f"layers.1.self_attn.{n}_proj.weight"] for n in "qkv"]
    wanted = {"layers.1.attn.qkv_proj.weight": quantize(torch.cat(qkv), SCHEMES[scheme], torch.bfloat16)}
    parts = [t[f"layers.0.linear_attn.in_proj_{n}.weight"] for n in ("qkv", "z", "b", "a")]
    in_proj = parameters["layers.0.gdn.in_proj.weight"]
    if scheme == "int8":
        assert torch.equal(in_proj, torch.cat(parts).bfloat16())
    else:
        assert len(in_proj) == 2
        assert torch.equal(in_proj[1], torch.cat(parts[2:]).bfloat16())
        wanted["in_proj"], parameters["in_proj"] = quantize(torch.cat(parts[:2]), SCHEMES[scheme]), in_proj[0]
    if "layers.0.mlp.experts.down_proj" in t:
        wanted["layers.0.moe.experts_down.weight"] = quantize(t["layers.0.mlp.experts.down_proj"], SCHEMES[scheme])
    for name, want in wanted.items():
        got = parameters[name]
        assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8)), name
        assert torch.equal(got.scales, want.scales), name


@pytest.mark.parametrize("scheme", NAMES)
def test_a_weight_that_is_not_finite_is_refused_by_name(scheme: str, tmp_path: Path) -> None:
    directory = random_checkpoint(tmp_path / "x", DENSE)
    for value in (float("nan"), float("inf")):
        tensors = read_tensors(directory)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 7] = value
        write_tensors(directory, tensors)
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*NaN or infinity"):
            load_parameters(opened(directory, scheme), dtype=torch.float32)


@pytest.mark.parametrize(("part", "change", "refusal"), [
    ("_scale", lambda t: t[:-1].contiguous(), r"I8 with scales \[\d+, 1\], but config.json asks for int8"),
    ("", lambda t: t.to(torch.float8_e4m3fn), "is F8_E4M3 with scales"),
    ("_scale", lambda t: t * math.nan, "is damaged: NaN or infinity among the numbers.*again"),
    ("_scale", lambda t: t.double() * math.pi, "is damaged: its scales, float64, are no float32"),
], ids=["shape", "dtype", "nan", "precision"])  # fmt: skip
def test_quantized_tensors_that_are_not_what_the_configuration_says(
    part: str, change: Callable[[Tensor], Tensor], refusal: str, tmp_path: Path
) -> None:
    save(opened(random_checkpoint(tmp_path / "x", DENSE), "int8"), tmp_path / "saved")
    name = "model.layers.1.mlp.up_proj.weight" + part
    tensors = read_tensors(tmp_path / "saved")
    write_tensors(tmp_path / "saved", {**tensors, name: change(tensors[name])})
    with pytest.raises(CheckpointError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight.*{refusal}"):
        load_parameters(opened(tmp_path / "saved"), dtype=torch.float32)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "norm.weight"])
def test_only_what_can_be_multiplied_comes_quantized(name: str, tmp_path: Path) -> None:
    save(opened(random_checkpoint(tmp_path / "x", DENSE), "int8"), tmp_path / "saved")
    tensors = read_tensors(tmp_path / "saved")
    own = tensors[f"model.{name}"]
    tensors |= {f"model.{name}": own.to(torch.int8), f"model.{name}_scale": torch.ones(len(own), 1)}
    write_tensors(tmp_path / "saved", tensors)
    with pytest.raises(CheckpointError, match=name):
        opened(tmp_path / "saved")


def test_random_weights_are_not_quantized_silently(tmp_path: Path) -> None:
    directory = random_checkpoint(tmp_path / "x", DENSE)
    edit_config(directory, quantization_config=FP8)
    dummy = EngineConfig(model=str(directory), load_format="dummy")
    with pytest.raises(ConfigError, match="is fp8-block, as random weights are only where --quantize says so"):
        find_checkpoint(dummy)
    assert "fp8" in find_checkpoint(replace(dummy, quantize="fp8")).config.quantization


def test_what_cannot_be_written_is_refused_before_anything_is(written: Path, tmp_path: Path) -> None:
    there, to = tmp_path / "file", tmp_path / "to"
    there.write_text("mine")
    refusals: list[tuple[Path, tuple[str, ...], str]] = [
        (there, (), "is there already"), (written, (), "is there already"), (to, ("*",), "nothing is left to quantize"),
    ]  # fmt: skip
    if any(".experts.0." in name for name in read_tensors(written)):
        refusals.append((to, ("*.experts.0.*",), "experts of a layer must all be stored in the same way"))
    for directory, keep, refusal in refusals:
        with pytest.raises(ConfigError, match=refusal):
            save(opened(written, "int8", keep_bf16=keep), directory)
    assert not to.exists()
    assert there.read_text() == "mine"


def test_a_disk_that_fills_up_leaves_nothing_that_loads(written: Path, tmp_path: Path) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tritium.models.save._pieces", full)
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
            save(opened(written, "int8"), tmp_path / "to")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path / "to")


def test_bytes_of_a_step_are_those_stored() -> None:
    config = parse_config(family_config("qwen3.6-27b") or {})
    names = {name: name for name in quantizable(config)}
    def bytes_of(scheme: str, *also: str) -> float:
        return step_bytes(replace(config, schemes=tuple(select(scheme, (), also, names).items())), 1, 512)
    plain = step_bytes(config, 1, 512)
    # What the issue reckons: 1.66 times fewer bytes for int8 with its defaults, 1.9 for fp8.
    assert plain / bytes_of("int8") == pytest.approx(1.66, abs=0.02)
    assert plain / bytes_of("fp8") == pytest.approx(1.9, abs=0.03)
    assert bytes_of("int4") < bytes_of("mxfp4") < bytes_of("fp8")
    assert bytes_of("int8", "lm_head.weight") - bytes_of("int8") == -248320 * 5120 + 4 * 248320


@pytest.mark.parametrize("scheme", NAMES)
def test_random_weights_are_drawn_quantized(scheme: str) -> None:
    config = EngineConfig(model="tritium-moe", load_format="dummy", quantize=scheme)
    checkpoint = find_checkpoint(config)
    real = find_checkpoint(replace(config, load_format="safetensors"))
    assert dict(checkpoint.config.schemes) == dict(real.config.schemes)
    parameters, again = (load_parameters(checkpoint, dtype=torch.float32) for _ in range(2))
    for name, weights in parameters.items():
        for block, same in zip(row_blocks(weights), row_blocks(again[name])):
            if isinstance(block, Quantized):
                assert torch.equal(block.scales, same.scales)
                w = dequantize(block, torch.float32)
                assert float(w.std()) * block.shape[-1] ** 0.5 == pytest.approx(1, abs=0.1), name


# --- checkpoints that bring their own -----------------------------------------------------------------------------


def loaded(directory: Path, **more: Any) -> dict[str, Tensor]:
    """Every parameter in float64, row blocks joined."""
    parameters = load_parameters(opened(directory, **more), dtype=torch.float32)

    def plain(block: Any) -> Tensor:
        return dequantize(block, torch.float64) if isinstance(block, Quantized) else block.double()

    return {name: torch.cat([plain(block) for block in row_blocks(w)], -2 if w_dim(w) > 1 else 0)
            for name, w in parameters.items()}  # fmt: skip


def w_dim(weights: Any) -> int:
    return len(row_blocks(weights)[0].shape)


def as_float(directory: Path, tensors: dict[str, Tensor], to: Path) -> dict[str, Tensor]:
    """What the checkpoint of `directory` is with these tensors in float32."""
    to.mkdir()
    (to / "config.json").write_text((directory / "config.json").read_text())
    write_tensors(to, tensors)
    return loaded(to)


def official_fp8(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, weight_scale_inv, what they stand for), block by block of 128 x 128."""
    rows, columns = w.shape
    values, meant = torch.zeros(rows, columns), torch.zeros(rows, columns)
    scales = torch.zeros(math.ceil(rows / 128), math.ceil(columns / 128))
    for j in range(0, rows, 128):
        for k in range(0, columns, 128):
            block = w[j : j + 128, k : k + 128].float()
            scale = block.abs().max() / 448
            scales[j // 128, k // 128] = scale
            values[j : j + 128, k : k + 128] = block / scale
            meant[j : j + 128, k : k + 128] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return values.to(torch.float8_e4m3fn), scales, meant


Parts = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def requantize(directory: Path, parts_of: Parts, shards: int = 1) -> dict[str, Tensor]:
    """Rewrites the matrices that quantized checkpoints quantize; gives all tensors as what they now stand for."""
    tensors, meant = read_tensors(directory), {}
    out = dict[str, Tensor]()
    for name, w in tensors.items():
        inner = name.endswith("_proj.weight") and not name.endswith(("in_proj_a.weight", "in_proj_b.weight"))
        if inner and "visual" not in name:
            parts, meant[name] = parts_of(w)
            out |= {name.removesuffix("weight") + part: t.contiguous() for part, t in parts.items()}
        else:
            out[name] = meant[name] = w
    write_tensors(directory, out, shards=shards)
    return meant


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_the_official_fp8_layout(moe: bool, tmp_path: Path, seed: int) -> None:
    spec = replace(MOE if moe else DENSE, per_expert=True, nested=True, seed=seed, hidden=192, dtype="bfloat16")
    directory = random_checkpoint(tmp_path / "fp8", spec)

    def parts(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, scales, meant = official_fp8(w)
        return {"weight": values, "weight_scale_inv": scales}, meant

    meant = requantize(directory, parts, shards=3)
    want = as_float(directory, meant, tmp_path / "float")
    edit_config(directory, quantization_config={
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.visual", "mtp.fc"],
    })  # fmt: skip
    got = loaded(directory)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-6, atol=0), name
    config = opened(directory).config
    assert set(dict(config.schemes).values()) == {"fp8-block"}
    # Rows of a source that are no multiple of 128 make a block of their own.
    kinds = {len(row_blocks(w)) for w in load_parameters(opened(directory), dtype=torch.float32).values()}
    assert kinds >= {1, 2}
    engine = Engine.load(EngineConfig(model=str(directory), max_model_len=512, max_num_seqs=4, show_progress=False))
    check_serving(engine, seed)
    with pytest.raises(ConfigError, match="is fp8-block already, and cannot become int8"):
        opened(directory, "int8")
    edit_config(directory, compression_config={
        "quant_method": "fp8", "weight_block_size": [128, 128]}, quantization_config=None)
    assert opened(directory).config.schemes == config.schemes


COMPRESSED = {
    "int-quantized": ({"num_bits": 8, "type": "int", "strategy": "channel"},
                      {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}),
    "float-quantized": ({"num_bits": 8, "type": "float", "strategy": "channel"},
                        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}),
    "pack-quantized": ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_compressed_tensors_are_what_that_package_decompresses(kind: str, moe: bool, tmp_path: Path, seed: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    weights, activations = COMPRESSED[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations, format=kind)
    compressor = BaseCompressor.get_value_from_registry(kind)
    hidden = {"hidden": 256, "head_dim": 128, "gdn_value_dim": 64} if kind == "pack-quantized" else {}
    spec = replace(MOE if moe else DENSE, per_expert=True, seed=seed, **hidden)
    directory = random_checkpoint(tmp_path / "compressed", spec)

    def parts(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        most = {"int-quantized": 127, "float-quantized": 448, "pack-quantized": 7}[kind]
        group = 128 if kind == "pack-quantized" else w.shape[1]
        if w.shape[1] % group:
            return {"weight": w}, w
        scale = w.unflatten(-1, (-1, group)).abs().amax(-1) / most
        packed = compressor.compress({"weight": w.float(), "weight_scale": scale.bfloat16().float()}, scheme)
        return dict(packed), compressor.decompress(packed, scheme)["weight"]

    meant = requantize(directory, parts)
    want = as_float(directory, meant, tmp_path / "float")
    told = QuantizationConfig(config_groups={"group_0": scheme}, format=kind, quantization_status="compressed",
                              ignore=["lm_head"])
    edit_config(directory, quantization_config=json.loads(told.model_dump_json()))
    got = loaded(directory)
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-6, atol=0), name
    name = declared(json.loads(told.model_dump_json())).scheme
    assert {scheme for _, scheme in opened(directory).config.schemes} == {name}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GROUP = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
         "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}}
INT8 = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": GROUP}}


def changed(part: str, **changes: Any) -> dict[str, Any]:
    return {**INT8, "config_groups": {"group_0": {**GROUP, part: {**GROUP[part], **changes}}}}


@pytest.mark.parametrize(("told", "named"), [
    ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ({"quant_method": "awq"}, "awq"),
    ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ({"bits": 4}, "unnamed method"),
    ({"quant_method": "tritium", "scheme": "int3"}, "tritium"),
    ({"quant_method": "fp8"}, "fp8 with weight_block_size None"),
    ({**FP8, "weight_block_size": [64, 128]}, r"fp8 with weight_block_size \[64, 128\]"),
    ({**FP8, "activation_scheme": "static"}, "activation_scheme static"),
    ({**INT8, "format": "nvfp4-pack-quantized"}, "compressed-tensors, format nvfp4-pack-quantized"),
    ({**INT8, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ({**INT8, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (changed("weights", strategy="tensor"), "strategy tensor"),
    (changed("weights", num_bits=4), "num_bits 4"),
    (changed("weights", symmetric=False), "symmetric False"),
    (changed("input_activations", dynamic=False), "dynamic False"),
    ({**INT8, "config_groups": {"group_0": {"weights": GROUP["weights"]}}}, "strategy None"),
    ({**INT8, "config_groups": ["x"]}, "compressed-tensors, damaged"),
    ({**INT8, "format": "pack-quantized"}, "num_bits 8.*strategy channel.*group_size None.*input_activations"),
])  # fmt: skip
def test_other_schemes_are_refused_by_name_with_what_is_supported(told: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"quantization_config .*{named}.* is not supported .*tensors: int-quantized"):
        declared(told)


def test_what_is_supported_is_not_refused() -> None:
    assert declared(FP8).scheme == "fp8-block"
    assert declared(INT8).scheme == "int8"


# --- identities ---------------------------------------------------------------------------------------------------


def check_serving(engine: Engine, seed: int) -> None:
    """Batched = alone to the bit; drafts and prefix cache on = off."""
    rng = random.Random(seed)
    requests = [replace_tokens(r, 12) for r in mixed_requests(rng, 6, longest=60)]
    together, alone = Logits(), Logits()
    got, _ = serve(engine, again(requests), budget=48, observe=together, arrive=lambda i: i, seqs=4, pages=40)
    want: Served = {}
    for one in again(requests):
        want |= serve(engine, [one], observe=alone, seqs=4, pages=40)[0]
    assert got == want
    for position, logits in alone.rows.items():
        assert torch.equal(together.rows[position], logits), position
    assert serve(engine, again(requests), proposer=HeadProposer(), depth=lambda r: 3, seqs=4, pages=40)[0] == want
    shared = prompt(rng, 100)
    turns = [request(f"t{i}", shared[: 70 + 10 * i] + prompt(rng, 9), max_tokens=6) for i in range(4)]
    cold: Served = {}
    for one in again(turns):
        cold |= serve(engine, [one], seqs=4, pages=40)[0]
    cached, warm = assemble(engine, seqs=4, pages=40, checkpoints=8), {}
    for one in again(turns):
        served, stats = run(cached, [one])
        warm |= served
    assert stats.prefix_hit_tokens > 0
    assert warm == cold


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("spec", [DENSE, MOE], ids=["dense", "moe"])
def test_serving_by_a_scheme_keeps_every_identity(spec: Spec, scheme: str, tmp_path: Path, seed: int) -> None:
    directory = random_checkpoint(tmp_path / "x", spec, seed=seed)
    also = ("lm_head.weight", "mtp.fc.weight")
    engine = Engine.load(EngineConfig(
        model=str(directory), quantize=scheme, quantize_also=also, max_model_len=512, max_num_seqs=4,
        num_gpu_blocks_override=40, show_progress=False,
    ))  # fmt: skip
    assert scheme in engine.memory_plan.table()
    check_serving(engine, seed)


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("model", ["tritium-dense", "tritium-moe", "random"])
def test_online_is_saved_and_loaded_to_the_bit(model: str, scheme: str, tmp_path: Path, seed: int,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    if model == "random":
        model = str(random_checkpoint(tmp_path / "source", MOE, per_expert=True, nested=True, shards=3, seed=seed))
    saved = tmp_path / "saved"
    options = ["--keep-bf16", "*layers.0.*down*", "--quantize-also", "mtp.fc*"]
    with pytest.raises(SystemExit) as ended:
        main(["quantize", model, str(saved), "--scheme", scheme, *options, "--device", "cpu", "-q"])
    assert ended.value.code == 0
    assert scheme in capsys.readouterr().out
    config = EngineConfig(model=model, quantize=scheme, keep_bf16=("*layers.0.*down*",), quantize_also=("mtp.fc*",))
    online = load_parameters(find_checkpoint(config), dtype=torch.float32)
    offline = load_parameters(open_checkpoint(saved), dtype=torch.float32)
    assert online.keys() == offline.keys()
    for name, weights in online.items():
        for a, b in zip(row_blocks(weights), row_blocks(offline[name]), strict=True):
            for mine, other in zip(a[:2], b[:2]) if isinstance(a, Quantized) else ((a, b),):
                assert torch.equal(mine.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name
    assert (saved / INDEX).exists() == (Path(model) / INDEX).exists()
    with pytest.raises(ConfigError, match=f"is {scheme} already, and no flag changes"):
        opened(saved, scheme, keep_bf16=("*out_proj*",))
    main_again = EngineConfig(model=str(saved), quantize=scheme)
    assert find_checkpoint(main_again).config.schemes == find_checkpoint(EngineConfig(model=str(saved))).config.schemes
    for source in (str(saved), model):
        with pytest.raises(SystemExit) as ended:
            main(["quantize", source, str(saved if source == model else tmp_path / "twice"), "--scheme", scheme, "-q"])
        assert ended.value.code in (1, 2)


def test_doctor_lists_every_tensor_its_scheme_and_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, rows in (([], 6), (["--tensors"], 1)):
        with pytest.raises(SystemExit):
            main(["doctor", "--model", "tritium-dense", "--quantize", "int8", "--device", "cpu", *flags])
        out = capsys.readouterr().out
        (line,) = [line for line in out.splitlines() if "in_proj_b" in line and (rows > 1 or "layers.0." in line)]
        assert f"{rows}" in line.split()
        (line,) = [line for line in out.splitlines() if "out_proj" in line and (rows > 1 or "layers.0." in line)]
        assert line.split()[1:] == ["int8", str(rows), "390", "KiB"] if rows > 1 else ["int8", "1", "65", "KiB"]
    config = find_checkpoint(EngineConfig(quantize="int8")).config
    assert f"{len(config.schemes)} tensors int8" in out
