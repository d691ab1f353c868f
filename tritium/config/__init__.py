"""Frozen user configuration: made once from flags or keyword arguments, never changed later."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from tritium.core.errors import ConfigError

MAX_DRAFTS = 8
"""Most drafts that a row verifies in a step."""
AUTO_DRAFTS = 3
HEAD_TOKENS = 512
"""Tokens that the MTP head looks back on, so that a guess costs the same in a long text as in a short one."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("safetensors", "auto", "dummy")
SCHEMES = ("int8", "fp8", "int4", "mxfp4")
"""What weights may be quantized to at load. See `tritium.ops.quantized`."""
TOOL_CALL_PARSERS = ("auto", "qwen3_xml", "qwen3_coder")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the engine is told by its user. Names are vLLM's where it has one.

    Raises `ConfigError`, naming the flag, for a value that cannot work on any machine; what does not fit *this*
    machine is refused by the memory plan.
    """

    model: str = "tritium-dense"
    """A directory, a hub name (owner/name), or an embedded model: tritium-dense, tritium-moe; with random weights also
    the name of a shape of the family: qwen3.6-27b, qwen3.6-35b-a3b, ..."""
    revision: str | None = None
    download_dir: str | None = None
    tokenizer: str | None = None
    tool_call_parser: str = "auto"
    """How tool calls are read out of the text; auto: by the chat template. vLLM's two names are one format here."""
    dtype: str = "auto"
    """auto: the checkpoint's dtype on a GPU; float32 on a CPU (exact, and faster there than bfloat16)."""
    device: str = "auto"
    max_model_len: int | None = None
    """Longest prompt + output in tokens; None: the checkpoint's limit, or what fits if that is less."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    """Tokens in a step: decode rows first, then prefill chunks in what is left. None: 8192, on a CPU 512."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory that the plan may use (on a CPU: of the memory that is available, at most)."""
    kv_cache_memory_bytes: int | None = None
    """Bytes of the KV pool; None: what is left, up to what max_num_seqs full contexts can use."""
    num_gpu_blocks_override: int | None = None
    """Pages of the KV pool, overriding both of the above (vLLM's name; here a page is 64 tokens)."""
    enable_prefix_caching: bool = True
    """Keep what requests computed for those that begin alike. Changes no token."""
    num_checkpoints: int | None = None
    """Recurrent states that the prefix cache keeps; None: as many as a share of the memory holds."""
    swap_space: float | None = None
    """GiB of host memory for recurrent states evicted from a GPU's; None: 4, or 1/8 of what is available if that is
    less, and none where the device has no memory of its own."""
    cache_dir: str | None = None
    """Directory of files with the prefix cache: `cache` is read at the start and written at the end, others by name."""
    enforce_eager: bool = False
    """No captured graphs (there are none on a CPU, where this changes nothing)."""
    async_scheduling: bool | None = None
    """Plan decode steps one ahead, while the device works. None: where it runs from graphs. Changes no token."""
    load_format: str = "safetensors"
    """dummy: random weights, for benchmarks; the answers are nonsense."""
    quantize: str | None = None
    """Scheme of the weights, of `SCHEMES`; None: as the checkpoint has them."""
    keep_bf16: tuple[str, ...] = ()
    """Globs on the checkpoint's tensor names: what `quantize` leaves as it is, beside what it always does."""
    quantize_also: tuple[str, ...] = ()
    """Globs on the checkpoint's tensor names: what it takes although it usually does not (lm_head.weight, ...)."""
    seed: int | None = None
    """Seed from which requests without one draw theirs; None: from the operating system."""
    num_threads: int | None = None
    speculate: str = "auto"
    """none, mtp:K, ngram:K, both (mtp:K,ngram:K), or auto: the MTP head where the checkpoint has one, each request as
    deep as pays. Changes no token, whatever it says."""
    benchmark_force_acceptance: float | None = None
    """For benchmarks only: accept drafts at this rate, right or wrong. The answers are then wrong."""
    show_progress: bool = True

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("load_format", LOAD_FORMATS), ("quantize", SCHEMES),
                            ("tool_call_parser", TOOL_CALL_PARSERS)):  # fmt: skip
            asked = getattr(self, name)
            if asked not in known and (name, asked) != ("quantize", None):
                raise ConfigError(f"{flag(name)} {asked} is not supported", hint=f"one of {', '.join(known)}")
        if self.quantize is None and (self.keep_bf16 or self.quantize_also):
            flags = "--keep-bf16" if self.keep_bf16 else "--quantize-also"
            raise ConfigError(f"{flags} is about what --quantize takes", hint="--quantize int8, fp8, int4 or mxfp4")
        Speculation.parse(self.speculate)
        for name in (
            "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_memory_bytes",
            "num_gpu_blocks_override", "num_checkpoints", "num_threads"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, got {value}")
        if self.benchmark_force_acceptance is not None and not 0.0 <= self.benchmark_force_acceptance <= 1.0:
            given = self.benchmark_force_acceptance
            raise ConfigError(f"--benchmark-force-acceptance must be within [0, 1], got {given}")
        if self.swap_space is not None and not 0.0 <= self.swap_space < float("inf"):
            raise ConfigError(f"--swap-space must be at least 0 (GiB), got {self.swap_space}")
        if self.cache_dir is not None and not self.enable_prefix_caching:
            raise ConfigError("--cache-dir keeps the prefix cache, which is off", hint="--enable-prefix-caching")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"--gpu-memory-utilization must be within (0, 1], got {self.gpu_memory_utilization}")

    def drafts(self, has_head: bool) -> int:
        """Most drafts that a row verifies, of a checkpoint with an MTP head or without."""
        return Speculation.parse(self.speculate).possible(has_head).most

    def batched_tokens(self, on_gpu: bool) -> int:
        """`max_num_batched_tokens`, or what it is where nothing was asked."""
        return self.max_num_batched_tokens or (8192 if on_gpu else 512)


@dataclass(frozen=True, slots=True)
class Speculation:
    """`EngineConfig.speculate` in parts: at most how many drafts of the MTP head, and of n-grams."""

    mtp: int = 0
    ngram: int = 0
    adaptive: bool = False
    """The depth follows what is measured, from 0 to `mtp`."""

    @classmethod
    def parse(cls, text: str) -> Speculation:
        """Raises `ConfigError` for anything but none, auto, mtp:K, ngram:K or both with a comma (1 <= K <= 8)."""
        if text in ("none", "auto"):
            return cls() if text == "none" else cls(mtp=AUTO_DRAFTS, adaptive=True)
        depths: dict[str, int] = {}
        for part in text.split(","):
            kind, _, depth = part.strip().partition(":")
            if kind not in ("mtp", "ngram") or kind in depths or not depth.isdecimal():
                raise ConfigError(f"--speculate {text} is not understood",
                                  hint="none, auto, mtp:K, ngram:K, or mtp:K,ngram:K")
            if not 1 <= int(depth) <= MAX_DRAFTS:
                raise ConfigError(f"--speculate {text}: K must be within 1 to {MAX_DRAFTS}")
            depths[kind] = int(depth)
        return cls(mtp=depths.get("mtp", 0), ngram=depths.get("ngram", 0))

    def possible(self, has_head: bool) -> Speculation:
        """What of it a checkpoint can: nothing that needs an MTP head, where it has none."""
        return self if has_head or not self.mtp else Speculation()

    @property
    def most(self) -> int:
        """Most drafts that a row verifies in a step."""
        return max(self.mtp, self.ngram)


def flag(name: str) -> str:
    """The command-line spelling of a field: max_num_seqs -> --max-num-seqs."""
    return "--" + name.replace("_", "-")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
