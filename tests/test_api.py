"""The api over a scripted engine: offline and async doors say the same, stop exactly, and give everything back."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing

import pytest
from byte_chat import byte_chat_format
from scripted import ScriptedEngine, llm_over, session_over

from tritium.api import LLM, Completion, ContextLengthError, Session, TextOptions
from tritium.core import ConfigError, EngineDeadError, FinishReason, RequestError, SamplingParams

CHAT = byte_chat_format()
EOS = CHAT.tokenizer.token_id("<|im_end|>")
assert EOS is not None
BYTES = {"eos_ids": (EOS,), "vocab_size": CHAT.tokenizer.vocab_size + 3}


def says(text: str, **options) -> ScriptedEngine:
    """An engine that answers everything with `text`, then eos."""
    return ScriptedEngine(lambda request: [*CHAT.encode(text), EOS], **BYTES, **options)


def rambles(**options) -> ScriptedEngine:
    """Random bytes that depend on the seed alone, as a sampler's would."""
    return ScriptedEngine(lambda request: random.Random(request.seed).choices(range(256), k=5000), **BYTES, **options)


async def collect(events) -> list[Completion]:
    completions: dict[int, Completion] = {}
    async for event in events:
        completions.setdefault(event.index, Completion(event.index, [])).absorb(event)
    return [completions[index] for index in sorted(completions)]


def through_session(engine: ScriptedEngine, prompt, sampling: SamplingParams, **options) -> list[Completion]:
    async def run() -> list[Completion]:
        async with session_over(engine, CHAT, seed=0) as session:
            return await collect(session.generate(prompt, sampling, **options))

    return asyncio.run(run())


# Offline.


def test_text_in_text_out_with_exact_usage():
    [done] = llm_over(says("Hello"), CHAT).generate("Hi")
    assert (done.text, done.finish_reason, done.stop_reason) == ("Hello", FinishReason.STOP, EOS)
    assert done.token_ids == [*b"Hello", EOS]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, 6)  # eos counts, but has no text


def test_ids_in_ids_out():
    [done] = llm_over(ScriptedEngine(**BYTES), CHAT).generate([72, 105])
    assert done.prompt_ids == [72, 105]
    assert done.token_ids == [72, 105, EOS]


def test_max_tokens_ends_with_length():
    [done] = llm_over(says("Hello"), CHAT).generate("Hi", SamplingParams(max_tokens=3))
    assert (done.text, done.finish_reason, done.usage.completion_tokens) == ("Hel", FinishReason.LENGTH, 3)


def test_prompts_and_samplings_are_paired():
    llm = llm_over(ScriptedEngine(**BYTES), CHAT)
    done = llm.generate(["abc", "xyz"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert [completion.text for completion in done] == ["a", "xy"]
    with pytest.raises(RequestError, match="2 prompts need one sampling or 2, got 3"):
        llm.generate(["abc", "xyz"], [SamplingParams()] * 3)


def test_n_is_n_separate_seeds():
    llm = llm_over(rambles(), CHAT)
    together = llm.generate("x", SamplingParams(n=4, seed=7, max_tokens=50))
    apart = [llm.generate("x", SamplingParams(seed=7 + i, max_tokens=50))[0] for i in range(4)]
    assert [done.token_ids for done in together] == [done.token_ids for done in apart]
    assert len({tuple(done.token_ids) for done in together}) == 4


def test_requests_without_a_seed_differ_and_follow_the_engine_seed():
    first, second = (llm_over(rambles(), CHAT, seed=3).generate(["x", "x"], SamplingParams(max_tokens=20))
                     for _ in range(2))
    assert [done.token_ids for done in first] == [done.token_ids for done in second]
    assert first[0].token_ids != first[1].token_ids


def test_chat_splits_reasoning_and_tool_calls():
    call = "<tool_call>\n<function=clock>\n<parameter=zone>\nUTC\n</parameter>\n</function>\n</tool_call>"
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
    llm = llm_over(says("hmm\n</think>\n\n" + call), CHAT)
    [done] = llm.chat([{"role": "user", "content": "What time is it?"}], tools=tools)
    assert done.reasoning == "hmm"
    assert done.text == ""
    assert [(each.name, each.arguments) for each in done.tool_calls] == [("clock", {"zone": "UTC"})]
    assert done.finish_reason is FinishReason.TOOL_CALLS
    assert done.usage.reasoning_tokens == len("hmm\n")


def test_several_conversations():
    llm = llm_over(ScriptedEngine(**BYTES), CHAT)  # repeats the prompt up to the end of its first message
    talks = [[{"role": "user", "content": text}] for text in ("one", "two")]
    assert [done.reasoning for done in llm.chat(talks)] == ["user\none", "user\ntwo"]


def test_defaults_come_from_generation_config():
    config = {"temperature": 0.6, "top_k": 20, "top_p": None, "transformers_version": "5"}
    llm = llm_over(ScriptedEngine(**BYTES, generation_defaults=config), CHAT)
    assert llm.default_sampling(top_k=5, seed=None) == SamplingParams(temperature=0.6, top_k=5)
    greedy = llm_over(ScriptedEngine(**BYTES, generation_defaults={"do_sample": False, "temperature": 0.6}), CHAT)
    assert greedy.default_sampling().temperature == 0


def test_every_eos_id_of_generation_config_ends_a_generation():
    llm = llm_over(ScriptedEngine(**BYTES, generation_defaults={"eos_token_id": [98, EOS]}), CHAT)
    [done] = llm.generate("abc")
    assert (done.text, done.stop_reason) == ("a", 98)


def test_an_interrupted_run_gives_everything_back():
    engine = says("Hello" * 50, step_seconds=0.0)
    steps = iter(range(3))
    step = engine.step
    engine.step = lambda: step() if next(steps, None) is not None else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        llm_over(engine, CHAT).generate(["a", "b"])
    assert not engine.has_work
    assert engine.stats().pages_used == 0


def test_progress_goes_to_stderr(capsys):
    llm_over(says("x"), CHAT).generate("y", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "1/1" in err


# Stop strings: matched on text, at any chunking, counted exactly.


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_at_the_token_that_completes_it(chunk, include):
    engine = says("one STOP two", chunk=chunk)
    options = TextOptions(include_stop_str_in_output=include)
    [done] = llm_over(engine, CHAT).generate("x", SamplingParams(stop=("never", "STOP")), options=options)
    assert done.text == ("one STOP" if include else "one ")
    assert (done.finish_reason, done.stop_reason) == (FinishReason.STOP, "STOP")
    assert done.usage.completion_tokens == len("one STOP") == len(done.token_ids)
    assert not engine.has_work


def test_min_tokens_holds_off_stop_strings_and_eos():
    [done] = llm_over(says("a.b.c"), CHAT).generate("x", SamplingParams(stop=(".",), min_tokens=3))
    assert done.text == "a.b"


def test_a_stop_token_is_counted_but_not_shown():
    [done] = llm_over(says("abc"), CHAT).generate("x", SamplingParams(stop_token_ids=(98,)))
    assert (done.text, done.stop_reason, done.usage.completion_tokens) == ("a", 98, 2)


def test_ignore_eos_goes_on():
    [done] = llm_over(says("ab"), CHAT).generate("x", SamplingParams(ignore_eos=True, max_tokens=5))
    assert (done.finish_reason, done.usage.completion_tokens) == (FinishReason.LENGTH, 5)


# The door.


@pytest.mark.parametrize(("prompt", "fields", "message"), [
    ("", {}, "the prompt is empty"),
    ([], {}, "the prompt is empty"),
    (["a", ""], {}, "the prompt is empty"),
    ([[1], []], {}, "the prompt is empty"),
    (["a", 1], {}, "prompt must be a string"),
    ({"a": 1}, {}, "prompt must be a string"),
    ([1, -1], {}, "token id -1 outside the vocabulary"),
    ([1, 10**6], {}, "token id 1000000 outside the vocabulary"),
    ([1, True], {}, "prompt must be a string"),
    ("\ud800", {}, "lone surrogate"),
    ("x", {"logit_bias": {10**6: 1.0}}, "logit_bias has a token id 1000000 outside"),
    ("x", {"stop_token_ids": (-1,)}, "stop_token_ids has a token id -1 outside"),
    (["x"] * 17, {"n": 128}, "17 prompts with n = 128 are 2176 answers"),
    ("x" * 64, {}, "context is 64 tokens and the prompt has 64"),
    ("x" * 60, {"max_tokens": 5}, "the prompt has 60 and max_tokens asks for 5 more.*at most 4"),
])
def test_nothing_bad_reaches_the_engine(prompt, fields, message):
    engine = ScriptedEngine(**BYTES, max_model_len=64)
    with pytest.raises(RequestError, match=message) as caught:
        llm_over(engine, CHAT).door.prompted(prompt, SamplingParams(**fields))
    if not isinstance(prompt, list):
        with pytest.raises(RequestError, match=message):
            through_session(engine, prompt, SamplingParams(**fields))
    assert "\n" not in str(caught.value)
    assert caught.value.param in ("prompt", "max_tokens", *fields)
    assert isinstance(caught.value, ContextLengthError) == ("context is" in message or "max_tokens asks" in message)
    assert not engine.has_work


@pytest.mark.parametrize(("field", "value", "message"), [
    ("temperature", -0.5, "must be within [0, 100], got -0.5"),
    ("temperature", 10**400, "must be within [0, 100], got 1000"),
    ("temperature", float("inf"), "must be a finite number, got inf"),
    ("temperature", None, "must be a finite number, got None"),
    ("top_p", 0.0, "must be within (0, 1], got 0"),
    ("repetition_penalty", float("nan"), "must be a finite number, got nan"),
    ("top_k", -2, "must be within [0, "),
    ("n", 10**400, "must be within [1, 128], got 1000"),
    ("n", True, "must be an integer, got True"),
    ("logprobs", 21, "must be within [0, 20], got 21"),
    ("max_tokens", 2.5, "must be an integer, got 2.5"),
    ("logit_bias", {7: 10**400}, "of token 7 must be within [-100, 100]"),
], ids=lambda value: f"{value!r:.20}")
def test_numbers_out_of_their_range_are_named(field, value, message):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert f"{field} {message}" in caught.value.message
    assert caught.value.param == field
    assert len(caught.value.message) < 150


def test_a_full_context_is_served():
    [done] = llm_over(rambles(max_model_len=64), CHAT).generate("x" * 60, SamplingParams(max_tokens=4))
    assert done.usage.completion_tokens == 4


def test_images_are_refused():
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(RequestError, match="text only"):
        llm_over(says("x"), CHAT).chat(image)


@pytest.mark.parametrize("text", ["a", "é", "€", "🙂", "\n", " ", "<think>"])
def test_token_bytes_add_up_to_the_text(text):
    door = llm_over(says("x"), CHAT).door
    assert b"".join(door.token_bytes(token) for token in door.encode(text)[0]) == text.encode()


# Async.


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_streamed_is_offline(chunk, seed):
    sampling = SamplingParams(n=3, seed=seed, max_tokens=40, stop=("q",), logprobs=2, prompt_logprobs=1)
    offline = llm_over(rambles(chunk=chunk), CHAT).generate("hello", sampling)
    streamed = through_session(rambles(chunk=chunk), "hello", sampling)
    for a, b in zip(offline, streamed, strict=True):
        assert (a.text, a.token_ids, a.finish_reason, a.usage) == (b.text, b.token_ids, b.finish_reason, b.usage)
        assert (a.logprobs, a.prompt_logprobs) == (b.logprobs, b.prompt_logprobs)


def test_a_slow_reader_loses_nothing():
    async def run() -> Completion:
        async with session_over(says("The quick brown fox. " * 20), CHAT) as session:
            done = Completion(0, [])
            async for event in session.generate("x"):
                done.absorb(event)
                await asyncio.sleep(0.01)
            return done

    done = asyncio.run(run())
    assert done.text == "The quick brown fox. " * 20
    assert done.usage.completion_tokens == len(done.token_ids) == 421


@pytest.mark.parametrize("busy", [0.0, 0.003])
def test_a_sink_and_the_generator_share_a_stream_in_order(busy, seed):
    """What a reader does with an event takes time (`busy`): until it asks for the next, nothing passes it by."""
    rng = random.Random(seed)

    class Sink:
        def __init__(self) -> None:
            self.taken = 0

        @property
        def ready(self) -> bool:
            return rng.random() < 0.7

        def take(self, event) -> None:
            self.taken += 1
            done.absorb(event)

    done, sink = Completion(0, []), Sink()

    async def run() -> int:
        left = 0
        async with session_over(rambles(step_seconds=0.004), CHAT, seed=0) as session:
            async for event in session.generate("x", SamplingParams(seed=seed, max_tokens=400), sink=sink):
                await asyncio.sleep(busy)
                done.absorb(event)
                left += 1
        return left

    left = asyncio.run(run())
    [whole] = llm_over(rambles(), CHAT).generate("x", SamplingParams(seed=seed, max_tokens=400))
    assert (done.text, done.token_ids, done.usage) == (whole.text, whole.token_ids, whole.usage)
    assert min(left, sink.taken) > 5


def test_an_answer_whose_sink_fails_ends_alone():
    class Sink:
        ready = True

        def take(self, event) -> None:
            raise ValueError("torn")

    async def run() -> Completion:
        async with session_over(rambles(step_seconds=0.001), CHAT, seed=0) as session:
            other = asyncio.ensure_future(collect(session.generate("x", SamplingParams(max_tokens=100))))
            with pytest.raises(ValueError, match="torn"):
                await collect(session.generate("x", SamplingParams(max_tokens=100), sink=Sink()))
            await until(lambda: session.stats().running <= 1)
            return (await other)[0]

    assert len(asyncio.run(run()).token_ids) == 100


async def until(condition, seconds: float = 2.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    assert condition()


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_early_frees_everything(how):
    async def run() -> None:
        engine = rambles(max_num_seqs=2, step_seconds=0.002)
        async with session_over(engine, CHAT) as session:
            ended = []
            session.observer = lambda reason, event: ended.append(reason)
            events = session.generate("x", SamplingParams(n=3))  # two run, one waits
            if how == "close":
                async with aclosing(events):
                    await anext(events)
            else:
                task = asyncio.ensure_future(collect(events))
                await until(lambda: session.stats().running == 2)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await until(lambda: not engine.has_work)
            stats = session.stats()
            assert (stats.running, stats.waiting, stats.pages_used, stats.slots_used) == (0, 0, 0, 0)
            assert ended == [FinishReason.ABORT] * 3

    asyncio.run(run())


def test_a_dying_engine_fails_what_runs_and_refuses_what_comes():
    async def run() -> None:
        engine = rambles(die_after=5)
        async with session_over(engine, CHAT) as session:
            ended = []
            session.observer = lambda reason, event: ended.append(reason)
            results = await asyncio.gather(
                *(collect(session.generate("x")) for _ in range(3)), return_exceptions=True)
            assert [type(result) for result in results] == [EngineDeadError] * 3
            assert "scripted death" in str(results[0])
            assert not session.alive
            assert ended == [FinishReason.ERROR] * 3
            with pytest.raises(EngineDeadError):
                await collect(session.generate("x"))
        assert engine.closed

    asyncio.run(run())


def test_what_the_engine_refuses_is_refused_alone():
    async def run() -> None:
        engine = says("fine")
        add = engine.add

        def picky(request):
            if request.prompt_ids == [66]:
                raise RequestError("never fits", param="prompt")
            add(request)

        engine.add = picky
        async with session_over(engine, CHAT) as session:
            good, bad = await asyncio.gather(collect(session.generate("A")), collect(session.generate("B")),
                                             return_exceptions=True)
            assert good[0].text == "fine"
            assert isinstance(bad, RequestError)
            assert session.alive

    asyncio.run(run())


@pytest.mark.parametrize("drain", [0.0, 5.0])
def test_close_aborts_or_drains(drain):
    async def run() -> None:
        engine = says("slow and steady", step_seconds=0.005)
        session = session_over(engine, CHAT)
        task = asyncio.ensure_future(collect(session.generate("x")))
        await until(lambda: session.stats().running == 1)
        await session.close(drain_seconds=drain)
        if drain:
            assert (await task)[0].text == "slow and steady"
        else:
            with pytest.raises(EngineDeadError):
                await task
        assert engine.closed

    asyncio.run(run())


def test_random_traffic_is_answered_exactly(seed):
    """Requests come, go, stop on strings and are abandoned at random; each that stays gets what it gets alone."""
    rng = random.Random(seed)
    samplings = [SamplingParams(seed=i, max_tokens=rng.randint(1, 60), n=rng.randint(1, 3),
                                stop=rng.choice([(), ("a",), ("\x07b", "e")])) for i in range(60)]
    alone = [llm_over(rambles(), CHAT).generate("x", sampling) for sampling in samplings]

    async def client(session: Session, i: int) -> None:
        await asyncio.sleep(rng.random() * 0.1)
        events = session.generate("x", samplings[i])
        if rng.random() < 0.3:
            async with aclosing(events):
                async for _ in events:
                    if rng.random() < 0.2:
                        return
        else:
            done = await collect(events)
            assert [(d.text, d.token_ids, d.usage) for d in done] == [(d.text, d.token_ids, d.usage) for d in alone[i]]

    async def run() -> None:
        engine = rambles(max_num_seqs=8, chunk=2)
        async with session_over(engine, CHAT) as session:
            await asyncio.gather(*(client(session, i) for i in range(60)))
            await until(lambda: not engine.has_work)
            await until(lambda: session.stats().slots_used == 0)

    asyncio.run(run())


def test_a_field_that_the_engine_does_not_have_is_named() -> None:
    with pytest.raises(ConfigError, match="max_model_length is not a field") as caught:
        LLM("tritium-dense", max_model_length=64)
    assert "max_model_len" in (caught.value.hint or "")
