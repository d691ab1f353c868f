"""Checkpoints: every tensor of every spelling lands where it belongs, and what is wrong with one is one clear line."""

from __future__ import annotations

import json
import logging
import random
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import checkpoints
import huggingface_hub.constants
import pytest
import torch
import transformers as tf
from checkpoints import Spec, edit_config, random_checkpoint, random_spec, read_tensors, write_tensors
from mtp_statement import mtp_logits
from torch import Tensor

from tritium.core import CheckpointError, ConfigError
from tritium.models import checkpoint as module
from tritium.models.checkpoint import load_parameters, open_checkpoint, resolve
from tritium.models.parameters import parameter_shapes, stored_sizes

TINY = Spec(layer_types="lf", vocab=50)
TINY_MOE = replace(TINY, moe=True, experts=4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Spec], Path]:
    """Checkpoints by spec, each written once; tests that change one take a copy."""
    made: dict[Spec, Path] = {}

    def get(spec: Spec) -> Path:
        if spec not in made:
            made[spec] = random_checkpoint(tmp_path_factory.mktemp("checkpoint"), spec)
        return made[spec]

    return get


@pytest.fixture
def copy(written: Callable[[Spec], Path], tmp_path: Path) -> Callable[..., Path]:
    """A private copy of a checkpoint, its tensors changed by `change` (a dict in, changed in place)."""

    def make(spec: Spec = TINY, change: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
        directory = tmp_path / "copy"
        shutil.copytree(written(spec), directory)
        if change:
            tensors = read_tensors(directory)
            change(tensors)
            write_tensors(directory, tensors)
        return directory

    return make


def expected_parameters(tensors: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """The table of docs/architecture.md, written out once more with torch.cat."""
    t = {name.removeprefix("model.").removeprefix("language_model."): x for name, x in tensors.items()}
    out = {"embed.weight": t["embed_tokens.weight"], "norm.weight": t["norm.weight"]}
    if not spec.tied:
        out["lm_head.weight"] = t["lm_head.weight"]
    for i, kind in enumerate(spec.layer_types):
        out |= expected_layer(t, f"layers.{i}", f"layers.{i}", kind, spec)
    if spec.mtp:
        out |= {"mtp.fc.weight": t["mtp.fc.weight"], "mtp.norm.weight": t["mtp.norm.weight"]}
        out |= {f"mtp.norm_{x}.weight": t[f"mtp.pre_fc_norm_{x}.weight"] for x in ("embedding", "hidden")}
        out |= expected_layer(t, "mtp.layer", "mtp.layers.0", "f", spec)
    return out


def expected_layer(t: dict[str, Tensor], to: str, at: str, kind: str, spec: Spec) -> dict[str, Tensor]:
    def rows(block: str, *names: str) -> Tensor:
        return torch.cat([t[f"{at}.{block}.{name}.weight"] for name in names])

    out = {"input_norm.weight": t[f"{at}.input_layernorm.weight"]}
    out["post_norm.weight"] = t[f"{at}.post_attention_layernorm.weight"]
    if kind == "f":
        out["attn.qkv_proj.weight"] = rows("self_attn", "q_proj", "k_proj", "v_proj")
        out |= {f"attn.{n}.weight": t[f"{at}.self_attn.{n}.weight"] for n in ("q_norm", "k_norm", "o_proj")}
    else:
        out["gdn.in_proj.weight"] = rows("linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        out["gdn.conv.weight"] = t[f"{at}.linear_attn.conv1d.weight"].squeeze(1)
        out |= {f"gdn.{n}": t[f"{at}.linear_attn.{n}"] for n in ("A_log", "dt_bias", "norm.weight", "out_proj.weight")}
    if not spec.moe:
        out["mlp.gate_up.weight"] = rows("mlp", "gate_proj", "up_proj")
        out["mlp.down.weight"] = t[f"{at}.mlp.down_proj.weight"]
        return {f"{to}.{name}": x for name, x in out.items()}
    out["moe.router.weight"] = torch.cat([t[f"{at}.mlp.{n}.weight"] for n in ("gate", "shared_expert_gate")])
    out["moe.shared_gate_up.weight"] = rows("mlp.shared_expert", "gate_proj", "up_proj")
    out["moe.shared_down.weight"] = t[f"{at}.mlp.shared_expert.down_proj.weight"]
    if spec.per_expert:
        experts = [f"mlp.experts.{e}" for e in range(spec.experts)]
        out["moe.experts_gate_up.weight"] = torch.stack([rows(e, "gate_proj", "up_proj") for e in experts])
        out["moe.experts_down.weight"] = torch.stack([rows(e, "down_proj") for e in experts])
    else:
        out["moe.experts_gate_up.weight"] = t[f"{at}.mlp.experts.gate_up_proj"]
        out["moe.experts_down.weight"] = t[f"{at}.mlp.experts.down_proj"]
    return {f"{to}.{name}": x for name, x in out.items()}


def test_every_tensor_lands_where_it_belongs(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    for i in range(16):
        spec = random_spec(rng)
        directory = random_checkpoint(tmp_path / str(i), spec)
        checkpoint = open_checkpoint(directory)
        dtype = getattr(torch, rng.choice(("float32", "bfloat16", "float16")))
        parameters = load_parameters(checkpoint, dtype=dtype)
        specs = parameter_shapes(checkpoint.config)
        expected = expected_parameters(read_tensors(directory), spec)
        assert parameters.keys() == specs.keys() == expected.keys(), spec
        for name, parameter in parameters.items():
            assert parameter.dtype == (dtype if specs[name].role == "matrix" else torch.float32), name
            assert torch.equal(parameter, expected[name].to(parameter.dtype)), (str(spec), name)
        assert sum(stored_sizes(checkpoint.config, dtype.itemsize).values()) == sum(
            p.nbytes for p in parameters.values()
        )


def test_vectors_are_the_norms_convolution_and_decay(written: Callable[[Spec], Path]) -> None:
    specs = parameter_shapes(open_checkpoint(written(TINY_MOE)).config)
    vectors = {name.split(".", 2)[-1] for name, spec in specs.items() if spec.role == "vector" and "layers" in name}
    assert vectors == {
        *("input_norm.weight", "post_norm.weight", "attn.q_norm.weight", "attn.k_norm.weight"),
        *("gdn.A_log", "gdn.dt_bias", "gdn.norm.weight", "gdn.conv.weight"),
    }


def test_tensor_names_without_a_prefix_are_understood(copy: Callable[..., Path]) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert len(load_parameters(open_checkpoint(copy(TINY, strip)), dtype=torch.float32)) > 10


def test_the_vision_tower_is_left_out_and_said_once(
    written: Callable[[Spec], Path], caplog: pytest.LogCaptureFixture
) -> None:
    directory = written(replace(TINY, nested=True))
    count = sum(name.startswith("model.visual.") for name in read_tensors(directory))
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(directory)
        load_parameters(checkpoint, dtype=torch.float32)
    assert [r.getMessage() for r in caplog.records] == [
        f"not loading {count} tensors of the vision tower (visual.*): this is a text engine"
    ]
    assert not any("visual" in tensor.name for tensor in checkpoint.tensors)


def test_loading_reads_each_tensor_once_and_holds_one_at_a_time(
    written: Callable[[Spec], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    opened = module.safe_open

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.context = opened(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.file = self.context.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)

        def get_tensor(self, name: str) -> Tensor:
            reads.append(name)
            tensor: Tensor = self.file.get_tensor(name)
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(module, "safe_open", Counting)
    directory = written(replace(TINY_MOE, shards=2, per_expert=True))
    checkpoint = open_checkpoint(directory)
    assert reads == []
    load_parameters(checkpoint, dtype=torch.float32)
    assert sorted(reads) == sorted(read_tensors(directory))


def test_progress_goes_to_stderr(written: Callable[[Spec], Path], capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(written(TINY))
    load_parameters(checkpoint, dtype=torch.float32, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "loading" in err
    load_parameters(checkpoint, dtype=torch.float32)
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_while_loading_is_not_swallowed(
    written: Callable[[Spec], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(written(TINY))

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "copy_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_parameters(checkpoint, dtype=torch.float32)


# Tied embeddings, MTP and dtype: what the files say against what the config says.


def test_a_tied_checkpoint_may_repeat_its_embeddings(copy: Callable[..., Path]) -> None:
    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    checkpoint = open_checkpoint(copy(replace(TINY, tied=True), repeat))
    assert checkpoint.config.tied_embeddings
    assert "lm_head.weight" not in load_parameters(checkpoint, dtype=torch.float32)


def test_a_tied_checkpoint_with_another_lm_head_is_not_tied_as_in_transformers(
    copy: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    def differ(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    directory = copy(replace(TINY, tied=True), differ)
    checkpoint = open_checkpoint(directory)
    assert not checkpoint.config.tied_embeddings
    assert "lm_head.weight differs" in caplog.text
    theirs = tf.Qwen3_5ForCausalLM.from_pretrained(directory).lm_head.weight
    assert torch.equal(load_parameters(checkpoint, dtype=torch.float32)["lm_head.weight"], theirs)


def test_absent_mtp_is_said_and_partial_mtp_is_an_error(
    copy: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    def drop(tensors: dict[str, Tensor], keep: str = "") -> None:
        for name in [n for n in tensors if n.startswith("mtp.") and n != keep]:
            del tensors[name]

    directory = copy(TINY, drop)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config.mtp_layers == 0
    assert [r.getMessage() for r in caplog.records] == [
        "config.json announces an MTP head, but there is no mtp.* tensor: continuing without it"
    ]
    assert not any("mtp" in name for name in load_parameters(checkpoint, dtype=torch.float32))
    shutil.rmtree(directory)
    with pytest.raises(CheckpointError, match=r"tensors are missing: mtp\..*14 in all"):
        open_checkpoint(copy(TINY, lambda tensors: drop(tensors, keep="mtp.fc.weight")))


def test_mtp_tensors_that_the_config_does_not_announce_are_an_error(copy: Callable[..., Path]) -> None:
    directory = copy(TINY)
    edit_config(directory, mtp_num_hidden_layers=...)
    with pytest.raises(CheckpointError, match=r"does not have: mtp\.fc\.weight"):
        open_checkpoint(directory)


def test_without_a_dtype_in_the_config_the_tensors_tell(copy: Callable[..., Path]) -> None:
    directory = copy(replace(TINY, dtype="bfloat16"))
    edit_config(directory, dtype=...)
    assert open_checkpoint(directory).config.dtype == "bfloat16"


def test_eos_ids_come_from_both_files(copy: Callable[..., Path]) -> None:
    directory = copy(TINY)
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    assert open_checkpoint(directory).config.eos_ids == (5, 3, 0)
    (directory / "generation_config.json").unlink()
    assert open_checkpoint(directory).config.eos_ids == (0,)


# Damage: one line that names it.

Tensors = dict[str, Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("spec", "change", "named"),
    [
        (TINY, lambda t: t.pop(Q), r"missing: layers\.1\.self_attn\.q_proj\.weight"),
        (TINY, lambda t: [t.pop(n) for n in list(t) if ".0." in n and "mtp" not in n], r"missing: .*14 in all"),
        (TINY, lambda t: t.update({"model.layers.9.x": torch.zeros(1)}), r"does not have: model\.layers\.9\.x"),
        (TINY, lambda t: t.update({f"junk{i}": torch.zeros(1) for i in range(12)}), r"junk0, .*\.\.\. \(12 in all\)"),
        (TINY, lambda t: t.update({Q: t[Q][:5].clone()}), r"q_proj.* has shape \[5, 64\].*asks for \[256, 64\]"),
        (TINY, lambda t: t.update({Q: t[Q].T.contiguous()}), r"has shape \[64, 256\].*\[256, 64\]"),
        (TINY, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), r"q_proj\.weight is F8_E4M3.*F32, BF16, F16"),
        (TINY, lambda t: t.update({Q: t[Q].to(torch.int8)}), r"q_proj\.weight is I8"),
        (TINY, lambda t: t.update({Q[6:]: t[Q].clone()}), "q_proj.*q_proj.*are the same parameter"),
        (
            TINY_MOE,
            lambda t: t.update({FUSED.replace("gate_up_proj", "0.up_proj.weight"): torch.zeros(32, 64)}),
            r"layers\.0\.moe\.experts_gate_up\.weight is given more than once",
        ),
        (TINY_MOE, lambda t: t.pop(FUSED), r"missing: layers\.0\.mlp\.experts\.gate_up_proj \("),
        (
            replace(TINY_MOE, per_expert=True),
            lambda t: t.pop(FUSED.replace("gate_up_proj", "2.up_proj.weight")),
            r"missing: layers\.0\.mlp\.experts\.2\.up_proj\.weight \(",
        ),
    ],
)
def test_tensors_that_do_not_add_up(
    copy: Callable[..., Path], spec: Spec, change: Callable[[Tensors], object], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        open_checkpoint(copy(spec, change))
    assert "\n" not in str(caught.value)


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def remove_shard(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").unlink()


def forget_index_and_shard(directory: Path) -> None:
    (directory / checkpoints.INDEX).unlink()
    remove_shard(directory)


def index_names_a_ghost(directory: Path) -> None:
    index = json.loads((directory / checkpoints.INDEX).read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
    (directory / checkpoints.INDEX).write_text(json.dumps(index))


SHARDED = replace(TINY, shards=3)
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(
    ("spec", "damage", "named"),
    [
        (TINY, lambda d: (d / "config.json").unlink(), r"has no config\.json"),
        (TINY, lambda d: (d / "config.json").write_text("{"), r"config\.json cannot be read"),
        (TINY, lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json cannot be read"),
        (TINY, lambda d: (d / "config.json").write_text("[]"), r"config\.json must hold a JSON object"),
        (TINY, lambda d: (d / "generation_config.json").write_text("{"), r"generation_config\.json cannot be read"),
        (TINY, lambda d: (d / WEIGHTS).unlink(), r"has no \*\.safetensors"),
        (TINY, lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), r"no \*\.safetensors.*pytorch_model\.bin"),
        (TINY, lambda d: truncate(d / WEIGHTS, 0.9), r"model\.safetensors is damaged or truncated"),
        (TINY, lambda d: truncate(d / WEIGHTS, 0.001), r"model\.safetensors is damaged or truncated"),
        (TINY, lambda d: truncate(d / WEIGHTS, 0), r"model\.safetensors is damaged or truncated"),
        (TINY, lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 99) + b"x" * 99), "is damaged or truncated"),
        (TINY, lambda d: (d / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (SHARDED, remove_shard, r"index\.json are absent: model-00002-of-00003\.safetensors"),
        (SHARDED, forget_index_and_shard, r"shards are missing: model-00002-of-00003\.safetensors"),
        (SHARDED, index_names_a_ghost, r"are in no file: ghost\.weight"),
        (SHARDED, lambda d: (d / checkpoints.INDEX).write_text("{}"), r"index\.json has no weight_map"),
        (SHARDED, lambda d: truncate(d / "model-00003-of-00003.safetensors", 0.9), r"00003-of-00003.*is damaged"),
    ],
)
def test_files_that_are_missing_or_damaged(
    copy: Callable[..., Path], spec: Spec, damage: Callable[[Path], object], named: str
) -> None:
    directory = copy(spec)
    damage(directory)
    with pytest.raises(CheckpointError, match=named) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


def test_shards_without_an_index_are_found(copy: Callable[..., Path]) -> None:
    directory = copy(SHARDED)
    whole = load_parameters(open_checkpoint(directory), dtype=torch.float32)
    (directory / checkpoints.INDEX).unlink()
    globbed = load_parameters(open_checkpoint(directory), dtype=torch.float32)
    assert all(torch.equal(whole[name], globbed[name]) for name in whole)


def test_quantized_checkpoints_are_refused_by_scheme(copy: Callable[..., Path]) -> None:
    directory = copy(TINY)
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="gptq"):
        open_checkpoint(directory)


# Finding a checkpoint.


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_embedded_names_point_into_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="does not contain tritium-dense"):
        resolve("tritium-dense")
    for kind in ("dense", "moe"):
        (tmp_path / "embedded" / kind).mkdir(parents=True)
        (tmp_path / "embedded" / kind / "config.json").touch()
        assert resolve(f"tritium-{kind}") == tmp_path / "embedded" / kind


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("no-such-thing", "there is no directory no-such-thing.*owner/name.*tritium-dense"),
        ("./no/such", r"there is no directory \./no/such"),
        ("/no/such", "there is no directory /no/such"),
        ("~/no-such-place/x", "there is no directory"),
        ("model.gguf", "GGUF is not supported"),
        ("owner/model-GGUF", "GGUF is not supported"),
        ("", "there is no directory"),
    ],
)
def test_what_is_no_checkpoint_is_said(name: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        resolve(name)


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file.*give the directory"):
        resolve(str(tmp_path / "model.safetensors"))


class Hub(BaseHTTPRequestHandler):
    """A model hub of one repository, owner/tiny, with the status codes that the real one answers with."""

    files: dict[str, bytes]
    commit = "0" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "gated" in path:
            return self.answer(403, {"X-Error-Code": "GatedRepo"}, b"{}")
        if "owner/tiny" not in path:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"}, b"{}")
        if "no-such-branch" in path:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        if path.startswith("/api/models/owner/tiny/tree/"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in self.files.items()]
            return self.answer(200, {}, json.dumps(tree).encode())
        if path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "owner/tiny", "sha": self.commit, "siblings": siblings, "private": False}
            return self.answer(200, {}, json.dumps(info).encode())
        name = path.rsplit("/", 1)[1]
        return self.answer(200, {"ETag": f'"{name}"', "X-Repo-Commit": self.commit}, self.files[name])

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def point_hub_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)


@pytest.fixture
def hub(written: Callable[[Spec], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hub on this machine, serving the tiny checkpoint (and a file that nobody needs)."""
    directory = written(TINY)
    Hub.files = {p.name: p.read_bytes() for p in directory.iterdir()} | {"pytorch_model.bin": b"unwanted"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    point_hub_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield directory
    server.shutdown()
    server.server_close()


def test_a_hub_name_is_downloaded_and_cached(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = resolve("owner/tiny", None, str(tmp_path))
    assert {p.name for p in directory.iterdir()} == {p.name for p in hub.iterdir()}
    assert open_checkpoint(directory).config == open_checkpoint(hub).config
    point_hub_at("http://127.0.0.1:9", monkeypatch)
    assert resolve("owner/tiny", None, str(tmp_path)) == directory


@pytest.mark.parametrize(
    ("name", "revision", "named"),
    [
        ("owner/absent", None, "no such model on the hub"),
        ("owner/gated", None, "owner/gated is gated.*hf auth login"),
        ("owner/tiny", "no-such-branch", "no revision no-such-branch"),
    ],
)
def test_what_the_hub_refuses_is_said(hub: Path, tmp_path: Path, name: str, revision: str | None, named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        resolve(name, revision, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_hub_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(CheckpointError, match="not in the local cache and the hub cannot be reached"):
        resolve("owner/tiny", None, str(tmp_path))


# The oracle of the MTP head is itself checked, against Transformers' generic MTP layer around its own decoder layer.


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_the_mtp_statement_agrees_with_transformers(tmp_path: Path, moe: bool, seed: int) -> None:
    from transformers.modeling_layers import MtpLayer

    spec = Spec(moe=moe, layer_types="fl", heads=4, kv_heads=2, seed=seed)
    directory = random_checkpoint(tmp_path, spec)
    tensors = {name: t.double() for name, t in read_tensors(directory).items()}
    config = checkpoints.hf_config(spec)
    config._attn_implementation = "eager"
    model = checkpoints.hf_model(spec).double()
    decoder = model.model
    layer = MtpLayer(config, type(decoder.layers[0]), type(decoder.norm), 0).double().eval()
    names = {"pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "fc": "eh_proj", "norm": "post_norm"}
    theirs = {f"{to}.weight": tensors[f"mtp.{at}.weight"] for at, to in names.items()}
    prefix = "mtp.layers.0."
    theirs |= {"mtp_block." + n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    layer.load_state_dict(theirs)

    generator = torch.Generator().manual_seed(seed)
    T = 23
    hidden = torch.randn(T, spec.hidden, generator=generator, dtype=torch.float64)
    next_ids = torch.randint(0, spec.vocab, (T,), generator=generator)
    positions = torch.arange(1, T + 1)[None]
    with torch.no_grad():
        rotary = decoder.rotary_emb(hidden, positions.expand(3, 1, T))
        mask = torch.full((T, T), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        out = layer(decoder.embed_tokens(next_ids)[None], hidden[None], rotary, mask, positions, None)[0]
        expected = model.lm_head(out)
    text = json.loads((directory / "config.json").read_text())
    logits, normed = mtp_logits(tensors, text, hidden, next_ids)
    # Transformers computes norms and frequencies in float32 even here.
    assert (normed - out).norm() / out.norm() < 1e-6
    assert (logits - expected).norm() / expected.norm() < 1e-6
