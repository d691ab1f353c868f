"""The engine: plan, execute, commit. Token ids in, token ids out.

Not thread safe: one thread owns an engine. `tritium.api` is the door for everybody else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritium.cache import PagePool, PrefixCache, SlotPool, pages_for
from tritium.config import MAX_DRAFTS, EngineConfig, Speculation
from tritium.core import (
    CacheCall,
    CacheFileError,
    ConfigError,
    Constrain,
    EngineStats,
    Request,
    RequestError,
    StepPlan,
    TokenEvent,
)
from tritium.draft.depth import DepthPolicy
from tritium.draft.proposers import ChainedProposer, HeadProposer, NgramProposer, Proposer
from tritium.engine.memory_plan import MemoryPlan, plan_memory, size
from tritium.engine.persist import DEFAULT_NAME, CacheFiles
from tritium.models.checkpoint import Checkpoint, fingerprint
from tritium.models.config import ModelConfig
from tritium.runner import Flight, Runner
from tritium.sched import Limits, Scheduler

log = logging.getLogger(__name__)

_MANY_THREADS_BYTES = 64 << 20


@dataclass(eq=False, repr=False)
class Engine:
    """Requests in, `TokenEvent`s out, a step at a time.

    The api uses `load`, `add`, `abort`, `step`, `keep`, `stats`, `close`, `announce` and the properties below.
    """

    runner: Runner
    scheduler: Scheduler
    memory_plan: MemoryPlan
    directory: Path
    """Where the checkpoint's tokenizer and template are."""
    generation_defaults: Mapping[str, Any]
    """The checkpoint's generation_config.json; empty where it has none."""
    policy: DepthPolicy | None = None
    files: CacheFiles | None = None
    ahead: bool | None = None
    """As `EngineConfig.async_scheduling`."""
    attested: Mapping[str, float] = field(default_factory=dict)
    """Ops that kernels serve: relative difference from their references, on this device, at the start."""
    announce: Callable[[], object] = lambda: None
    """Called in a step when its tokens are known, a moment before they are given: whoever waits may get up."""

    def __post_init__(self) -> None:
        self._counts = {"prompt_tokens": 0, "generated_tokens": 0, "steps": 0, "decode_rows": 0}
        self._proposed, self._accepted = [0] * MAX_DRAFTS, [0] * MAX_DRAFTS
        self._schedule_seconds = 0.0
        self._following: Flight | None = None
        self._began = 0.0
        """When the step under way began: its launch, or the end of the one before."""
        if self.files is not None:
            self._restore(self.files)

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Finds the checkpoint, plans the memory, prints the plan, then loads.

        Raises `CheckpointError`, `ConfigError` or `CapacityError` before any weight is read where it can.
        """
        import torch

        from tritium.engine import selftest
        from tritium.hw import available_cores, probe
        from tritium.models.checkpoint import find_checkpoint, load_parameters, read_json
        from tritium.models.decoder import Decoder, allocate_caches

        target = probe(config.device)
        checkpoint = find_checkpoint(config)
        directory = checkpoint.directory
        speculation, proposer = _speculation(config, checkpoint.config.mtp_layers > 0)
        plan = plan_memory(checkpoint.config, config, target)
        log.info("%s", plan.table())
        if config.benchmark_force_acceptance is not None:
            log.warning("BENCHMARK ONLY: drafts are accepted at a rate of %g whether right or not; every answer is "
                        "wrong", config.benchmark_force_acceptance)
        if not target.is_gpu:
            torch.set_num_threads(config.num_threads or _threads(plan, target.cores))
        dtype, device = getattr(torch, plan.dtype), torch.device(target.device)
        if target.is_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        parameters = load_parameters(checkpoint, dtype=dtype, device=device, progress=config.show_progress)
        if target.is_gpu:
            log.info("weights loaded: %s of device memory at most meanwhile, %s planned to stay",
                     size(torch.cuda.max_memory_allocated(device)), size(plan.weights))
        model = Decoder(parameters, checkpoint.config, plan.max_model_len)
        pages, slots = PagePool(plan.num_pages), SlotPool(plan.num_slots + plan.num_checkpoints)
        caches = allocate_caches(checkpoint.config, pages=pages.num_total, slots=slots.num_total, dtype=dtype,
                                 device=device, drafts=speculation.most)
        host = SlotPool(plan.num_host_checkpoints)
        cache = PrefixCache(pages, slots, host=host) if config.enable_prefix_caching else None
        limits = Limits(config.max_num_seqs, config.batched_tokens(target.is_gpu), plan.max_model_len)
        policy = DepthPolicy(speculation.most) if speculation.adaptive else None
        depth = policy.depth if policy else lambda request: speculation.most
        generation = directory / "generation_config.json"
        runner = Runner(model, caches, run_head=speculation.mtp > 0, host_places=plan.num_host_checkpoints,
                        force_acceptance=config.benchmark_force_acceptance)
        attested: dict[str, float] = {}
        if target.is_gpu:
            runner.compile(config.max_num_seqs, speculation.most, limits.max_num_batched_tokens, available_cores(),
                           also=selftest.steps(speculation.most))
            attested = selftest.attest(model, speculation.most)
            if not config.enforce_eager:
                runner.capture(config.max_num_seqs, speculation.most, pages_for(plan.max_model_len))
        return cls(
            runner,
            Scheduler(limits, pages, slots, cache=cache, proposer=policy or proposer, depth=depth),
            memory_plan=plan,
            directory=directory,
            generation_defaults=read_json(generation) if generation.exists() else {},
            policy=policy,
            files=_files(config, checkpoint, plan, target.kind) if config.cache_dir is not None else None,
            ahead=config.async_scheduling,
            attested=attested,
        )

    # --- the loop --------------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent]:
        """One step for everything that can run: plan, execute, commit. Where the step after it can be known while the
        device works (`Scheduler.plan_next`), it is launched before this one's result is waited for.

        An exception from here means that the engine cannot go on.
        """
        flight, self._following = self._following or self._launched(self._planned(self.scheduler.plan)), None
        if flight is None:
            return []
        if flight.under_way if self.ahead is None else self.ahead:
            following = self._planned(lambda: self.scheduler.plan_next(flight.plan))
            self._following = self._launched(following, after=flight)
        begin, head_seconds = self._began, self.runner.seconds["draft"]
        result = flight.result()
        self.announce()
        self._began = time.perf_counter()
        if self.policy:
            head_seconds = self.runner.seconds["draft"] - head_seconds
            self.policy.observe(flight.plan, result, self._began - begin, head_seconds)
        events = self.scheduler.commit(flight.plan, result)
        self._count(events)
        self._schedule_seconds += time.perf_counter() - self._began
        return events

    def _planned(self, plan: Callable[[], StepPlan | None]) -> StepPlan | None:
        begin = time.perf_counter()
        made = plan()
        self._schedule_seconds += time.perf_counter() - begin
        return made

    def _launched(self, plan: StepPlan | None, after: Flight | None = None) -> Flight | None:
        if plan is None:
            return None
        if after is None:
            self._began = time.perf_counter()
        return self.runner.launch(plan, after)

    def add(self, request: Request) -> None:
        """Queues a request. Raises `RequestError` when it can never be served."""
        request.eos_ids = frozenset(self.model_config.eos_ids)
        self.scheduler.add(request)
        self._counts["prompt_tokens"] += len(request.prompt_ids)

    def abort(self, request_id: str) -> bool:
        """Ends a request at once and gives back all it holds; False when it is not (or no longer) known.
        No event follows."""
        return self.scheduler.abort(request_id)

    def hold_answers_with(self, constrain: Constrain) -> None:
        """What makes constraints of requests' rules; without it requests that have rules are refused."""
        self.scheduler.constrain = constrain

    def show_tokens_as(self, text_of: Callable[[Sequence[int]], str]) -> None:
        """How logs write token ids; without it, as numbers."""
        self.scheduler.reuse.text_of = text_of

    def keep(self, call: CacheCall) -> dict[str, Any]:
        """Saves, loads or flushes the prefix cache, between two steps; gives what was done, in numbers. Raises
        `CacheFileError` or `RequestError`, and then has changed nothing."""
        cache = self.scheduler.reuse.cache
        self.runner.states.move(cache.take_moves())
        if call.action == "flush":
            before = cache.num_pages, cache.num_checkpoints + cache.num_hosted
            cache.flush()
            after = cache.num_pages, cache.num_checkpoints + cache.num_hosted
            return {"pages": before[0] - after[0], "checkpoints": before[1] - after[1]}
        if self.files is None:
            raise RequestError("caches are neither saved nor loaded here", hint="start with --cache-dir")
        begin, name = time.perf_counter(), call.name or DEFAULT_NAME
        if call.action == "save":
            done = self.files.save(name, cache, self.runner, call.ids)
        else:
            done = self.files.load(name, cache, self.runner)
        return done | {"seconds": round(time.perf_counter() - begin, 3)}

    def _restore(self, files: CacheFiles) -> None:
        files.prepare()
        if not files.has(DEFAULT_NAME):
            return
        try:
            done = self.keep(CacheCall("start", "load"))
            log.info("%(tokens)d tokens and %(checkpoints)d checkpoints restored in %(seconds)g s", done)
        except CacheFileError as error:
            log.warning("starting with an empty prefix cache: %s", error)

    def close(self) -> None:
        """Nothing runs in the background and nothing is open; here for engines that have more."""

    # --- what it tells of itself -----------------------------------------------------------------------------

    @property
    def model_config(self) -> ModelConfig:
        return self.runner.model.config

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt plus output in one request."""
        return self.memory_plan.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Requests that run at once."""
        return self.memory_plan.num_slots

    @property
    def keeps_cache(self) -> bool:
        """Whether the prefix cache is to be saved at the end."""
        return self.files is not None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._following is not None

    def stats(self) -> EngineStats:
        reuse = self.scheduler.reuse
        return EngineStats(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            pages_used=reuse.pages.num_used - reuse.cache.num_evictable,
            pages_total=reuse.pages.num_total,
            slots_used=reuse.slots.num_used - reuse.cache.num_checkpoints,
            slots_total=reuse.slots.num_total,
            pages_cached=reuse.cache.num_evictable,
            checkpoints=reuse.cache.num_checkpoints,
            checkpoints_host=reuse.cache.num_hosted,
            prefix_hit_tokens=reuse.hit_tokens,
            prefix_miss_tokens=dict(reuse.missed_tokens),
            checkpoints_moved=dict(reuse.cache.num_moved),
            preemptions=self.scheduler.preemptions,
            **self._counts,
            draft_proposed=tuple(self._proposed),
            draft_accepted=tuple(self._accepted),
            draft_seconds_saved=self.policy.seconds_saved if self.policy else 0.0,
            forced_acceptance=self.runner.force_acceptance,
            seconds={"schedule": self._schedule_seconds, **self.runner.seconds},
        )

    def _count(self, events: list[TokenEvent]) -> None:
        self._counts["steps"] += 1
        for event in events:
            self._counts["generated_tokens"] += len(event.tokens)
            self._counts["decode_rows"] += bool(event.tokens)
            for i in range(event.num_drafts):
                self._proposed[i] += 1
                self._accepted[i] += i < event.num_accepted


def _files(config: EngineConfig, checkpoint: Checkpoint, plan: MemoryPlan, kind: str) -> CacheFiles:
    ring = checkpoint.config.conv_width + config.drafts(checkpoint.config.mtp_layers > 0)
    identity = {"quantization": plan.quantization or "none", "model": fingerprint(checkpoint), "dtype": plan.dtype,
                "device": kind, "ring": str(ring)}
    return CacheFiles(Path(str(config.cache_dir)).expanduser(), identity)


def _speculation(config: EngineConfig, has_head: bool) -> tuple[Speculation, Proposer | None]:
    """What is asked for, as far as the checkpoint can; auto means nothing where there is no MTP head."""
    asked = Speculation.parse(config.speculate)
    if asked.mtp and not has_head and not asked.adaptive:
        raise ConfigError(f"--speculate {config.speculate}: this checkpoint has no MTP head",
                          hint="ngram:K, auto or none")
    asked = asked.possible(has_head)
    head, ngram = HeadProposer() if asked.mtp else None, NgramProposer() if asked.ngram else None
    return asked, ChainedProposer(head, ngram) if head and ngram else head or ngram


def _threads(plan: MemoryPlan, cores: int) -> int:
    """Threads of a CPU. A small network's products are shorter than the barriers between threads: it takes one core
    and leaves the others to the server, whose event loop would otherwise stall every barrier."""
    return cores if plan.weights >= _MANY_THREADS_BYTES else 1
