"""The memory plan: published numbers, every refusal, and never more than the budget."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tritium.cache import pages_for
from tritium.config import EngineConfig
from tritium.core import CapacityError, ConfigError, TritiumError
from tritium.engine.memory_plan import bytes_per_page, bytes_per_slot, plan_memory, size
from tritium.hw import Target
from tritium.models.config import ModelConfig, MoeConfig, RopeConfig

GIB = 1 << 30
H200 = Target("cuda", "cuda:0", "NVIDIA H200", "sm_90", 132, 140 * GIB, 139 * GIB)
LAPTOP = Target("cpu", "cpu", "a laptop", "avx512", 8, 32 * GIB, 20 * GIB)


def family(
    hidden: int, layers: int, nq: int, nkv: int, nv: int, inner: int, moe: MoeConfig | None = None
) -> ModelConfig:
    """A Qwen3.5 model of the given width: every fourth layer is attention, head dims 256 and 128."""
    return ModelConfig(
        architecture="Qwen3_5ForCausalLM",
        vocab_size=248320,
        hidden_size=hidden,
        layer_types=tuple("full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)),
        num_heads=nq,
        num_kv_heads=nkv,
        head_dim=256,
        gdn_key_heads=16,
        gdn_value_heads=nv,
        gdn_key_dim=128,
        gdn_value_dim=128,
        conv_width=4,
        rope=RopeConfig(theta=1e7, rotary_dim=64),
        rms_eps=1e-6,
        max_position=262144,
        tied_embeddings=False,
        dtype="bfloat16",
        intermediate_size=inner,
        moe=moe,
    )


M08B = replace(family(1024, 24, 8, 2, 16, 3584), tied_embeddings=True)
M9B = family(4096, 32, 16, 4, 32, 12288)
M27B = family(5120, 64, 24, 4, 48, 17408)
M35B = family(2048, 40, 16, 2, 32, 0, MoeConfig(256, 8, 512, 512))
MODELS = {"0.8B": M08B, "9B": M9B, "27B": M27B, "35B-A3B": M35B}


@pytest.mark.parametrize(
    ("model", "kv_kib_a_token", "state_mib"),
    [("0.8B", 12, 18), ("9B", 32, 48), ("27B", 64, 144), ("35B-A3B", 20, 60)],
)
def test_the_familys_published_numbers(model: str, kv_kib_a_token: int, state_mib: int) -> None:
    config = MODELS[model]
    assert bytes_per_page(config, 2) == 64 * kv_kib_a_token << 10
    convolution = 4 * config.conv_channels * 2 * len(config.gdn_layers)
    assert bytes_per_slot(config, 2) - convolution == state_mib << 20


def test_the_mtp_layer_has_kv_of_its_own() -> None:
    assert bytes_per_page(replace(M27B, mtp_layers=1), 2) * 16 == bytes_per_page(M27B, 2) * 17


def test_27b_on_one_h200() -> None:
    plan = plan_memory(M27B, EngineConfig(), H200)
    assert plan.dtype == "bfloat16"
    assert 50e9 < plan.weights < 56e9
    assert plan.num_slots == 64
    assert plan.max_model_len == 262144
    assert plan.full_length_requests == plan.max_tokens // 262144 == 3
    assert plan.total <= plan.budget == int(0.9 * H200.memory_total)
    assert not plan.notes


def test_auto_is_the_checkpoints_dtype_on_a_gpu_and_float32_on_a_cpu() -> None:
    on_cpu = plan_memory(M08B, EngineConfig(max_num_seqs=4), LAPTOP)
    assert on_cpu.dtype == "float32"
    as_asked = plan_memory(M08B, EngineConfig(max_num_seqs=4, dtype="bfloat16"), LAPTOP)
    assert as_asked.dtype == "bfloat16"
    assert on_cpu.bytes_per_page == 2 * as_asked.bytes_per_page


def test_a_pool_is_no_larger_than_its_requests_can_use() -> None:
    small = EngineConfig(max_num_seqs=3, max_model_len=1000, enable_prefix_caching=False)
    plan = plan_memory(M08B, small, H200)
    assert (plan.num_pages, plan.num_slots, plan.num_checkpoints) == (3 * 16, 3, 0)
    assert plan.full_length_requests == 3


def test_a_prefix_cache_gets_pages_and_checkpoints_of_its_own() -> None:
    plan = plan_memory(M08B, EngineConfig(max_num_seqs=3, max_model_len=1000), H200)
    assert (plan.num_pages, plan.num_slots, plan.num_checkpoints) == (2 * 3 * 16, 3, 256)
    assert "3 requests and 256 checkpoints" in plan.table()
    assert plan_memory(M08B, EngineConfig(num_checkpoints=5), H200).num_checkpoints == 5
    on_cpu = plan_memory(M08B, EngineConfig(max_num_seqs=4), LAPTOP)
    assert on_cpu.num_checkpoints * on_cpu.bytes_per_slot <= 256 << 20
    with pytest.raises(CapacityError, match=r"--num-checkpoints 9999 asks for .* of state"):
        plan_memory(M27B, EngineConfig(num_checkpoints=9999), H200)


def test_a_cpu_takes_4_gib_of_kv_unless_told_otherwise() -> None:
    short = EngineConfig(max_num_seqs=4)
    plan = plan_memory(M08B, short, LAPTOP)
    assert 0 <= 4 * GIB - plan.kv_bytes < plan.bytes_per_page
    assert plan.max_model_len == plan.num_pages * 64 < 262144
    assert "lowered from 262,144" in plan.notes[0]
    assert plan.notes[0] in plan.table()
    told = plan_memory(M08B, replace(short, kv_cache_memory_bytes=8 * GIB), LAPTOP)
    assert 0 <= 8 * GIB - told.kv_bytes < told.bytes_per_page
    one_long = plan_memory(M08B, replace(short, max_model_len=200_000), LAPTOP)
    assert one_long.num_pages == pages_for(200_000)


def test_pages_by_number() -> None:
    plan = plan_memory(M27B, EngineConfig(num_gpu_blocks_override=100, kv_cache_memory_bytes=GIB), H200)
    assert plan.num_pages == 100
    assert plan.max_model_len == 6400


@pytest.mark.parametrize(
    ("config", "options", "target", "error", "message", "hint"),
    [
        (M27B, {}, LAPTOP, CapacityError, "the model does not fit: 1", "--gpu-memory-utilization"),
        (M27B, {"max_num_seqs": 512}, H200, CapacityError, "512 requests need 74 GiB", "--max-num-seqs 4"),
        (M27B, {"max_model_len": 262145}, H200, ConfigError, "limit of 262144", "--max-model-len 262144"),
        (M27B, {"max_num_batched_tokens": 8}, H200, ConfigError, "less than --max-num-seqs 64", "at least"),
        (
            M27B,
            {"max_model_len": 262144, "kv_cache_memory_bytes": GIB},
            H200,
            CapacityError,
            "one request of 262,144 tokens needs 16 GiB",
            "--max-model-len 16320 at most, or a larger --kv-cache-memory-bytes",
        ),
        (
            M27B,
            {"max_model_len": 65, "num_gpu_blocks_override": 1},
            H200,
            CapacityError,
            "needs 8 MiB of KV (2 pages); 1 pages fit",
            "a larger --num-gpu-blocks-override",
        ),
        (M27B, {"kv_cache_memory_bytes": 1000}, H200, CapacityError, "holds no page", "8388608"),
        (M27B, {"kv_cache_memory_bytes": 200 * GIB}, H200, CapacityError, "asks for 200 GiB", "pages ("),
        (M27B, {"num_gpu_blocks_override": 10**6}, H200, CapacityError, "1000000 asks for", "at most"),
        (
            M9B,
            {"max_model_len": 262144, "dtype": "bfloat16", "max_num_seqs": 1},
            replace(LAPTOP, memory_available=26 * GIB),
            CapacityError,
            "one request of 262,144 tokens needs 8 GiB",
            "--max-model-len",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_flag_to_change(
    config: ModelConfig,
    options: dict[str, object],
    target: Target,
    error: type[TritiumError],
    message: str,
    hint: str,
) -> None:
    with pytest.raises(error) as caught:
        plan_memory(config, EngineConfig(**options), target)  # type: ignore[arg-type]
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert "\n" not in str(caught.value)


def test_the_hint_for_too_many_requests_is_the_largest_number_that_works() -> None:
    with pytest.raises(CapacityError) as caught:
        plan_memory(M27B, EngineConfig(max_num_seqs=512), H200)
    most = int((caught.value.hint or "").split()[1])
    assert plan_memory(M27B, EngineConfig(max_num_seqs=most), H200).num_slots == most
    with pytest.raises(CapacityError):
        plan_memory(M27B, EngineConfig(max_num_seqs=most + 1), H200)


def test_a_plan_never_exceeds_its_budget_and_always_serves_one_full_request(seed: int) -> None:
    rng = random.Random(seed)
    planned = refused = 0
    for _ in range(1000):
        engine = EngineConfig(
            dtype=rng.choice(["auto", "float32", "bfloat16"]),
            max_model_len=rng.choice([None, rng.randint(1, 300_000)]),
            max_num_seqs=rng.choice([1, 4, 64, 256, 1024]),
            max_num_batched_tokens=rng.choice([512, 2048, 8192]),
            gpu_memory_utilization=rng.uniform(0.05, 1.0),
            kv_cache_memory_bytes=rng.choice([None, None, rng.randint(1, 64 * GIB)]),
            num_gpu_blocks_override=rng.choice([None, None, rng.randint(1, 10_000)]),
        )
        total = rng.randint(GIB // 2, 300 * GIB)
        free = rng.randint(total // 4, total)
        target = replace(rng.choice([H200, LAPTOP]), memory_total=total, memory_available=free)
        config = replace(rng.choice([M08B, M9B, M27B]), mtp_layers=rng.randint(0, 1))
        try:
            plan = plan_memory(config, engine, target)
        except TritiumError:
            refused += 1
            continue
        planned += 1
        assert plan.total <= plan.budget <= target.memory_available
        assert plan.full_length_requests >= 1
        assert plan.num_slots == engine.max_num_seqs
        assert plan.max_model_len <= (engine.max_model_len or config.max_position)
        if engine.max_model_len is not None:
            assert plan.max_model_len == engine.max_model_len
    assert planned > 100 < refused


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (144 << 20, "144 MiB"), (3 << 50, "3072 TiB")],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert size(count) == words
