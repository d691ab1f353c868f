"""The prefix cache: what it finds, what it keeps, why it misses; that it changes no token; and how much it saves."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import torch
from byte_chat import byte_chat_format
from checkpoints import edit_config, random_checkpoint
from scripted import llm_over
from serving import VOCAB, Logits, again, assemble, mixed_requests, prompt, replace_tokens, request, run, serve

from tritium.api import LLM
from tritium.cache import PagePool, PrefixCache, SlotPool, pages_for
from tritium.cache.prefix import may_resume
from tritium.config import EngineConfig
from tritium.core import Request, SamplingParams, StateMove, StepPlan
from tritium.draft.proposers import HeadProposer
from tritium.engine import Engine

# ---- the tree ----------------------------------------------------------------------------------------------------


class Tree:
    """A cache, and sequences that are computed and left to it."""

    def __init__(self, pages: int = 100, slots: int = 20, host: int = 0) -> None:
        self.pages, self.slots = PagePool(pages), SlotPool(slots)
        self.cache = PrefixCache(self.pages, self.slots, host=SlotPool(host))

    def leave(self, ids: tuple[int, ...], *positions: int, cold: bool = False) -> None:
        """A request computes `ids` and leaves them, with checkpoints at `positions`."""
        found = self.cache.match(cut(ids), len(ids) - 1)
        lease = self.cache.acquire(found)
        own = pages_for(len(ids)) - found.node.end // 64
        assert self.cache.make_room(own)
        table = self.cache.path_pages(found.node) + self.pages.allocate(own)
        self.cache.settle(lease)
        self.cache.publish(lease, cut(ids), table, len(ids), tail=True)
        for position in positions:
            slot = self.cache.take_slot()
            assert slot is not None
            self.cache.attach(lease, cut(ids), position, slot, cold=cold)
        self.cache.release(lease, table)

    def reuse(self, ids: tuple[int, ...], **options: int) -> int:
        return self.cache.match(cut(ids), len(ids) - 1, **options).position


def cut(ids: tuple[int, ...]):
    return lambda start, stop: ids[start:stop]


def text(count: int, kind: int = 0) -> tuple[int, ...]:
    return tuple(1000 * kind + i for i in range(count))


@pytest.mark.parametrize(("position", "limit", "align", "expected"), [
    (0, 0, 1, True), (63, 100, 1, True), (101, 100, 1, False), (63, 100, 64, False), (64, 100, 64, True),
])  # fmt: skip
def test_the_rule_for_reuse(position: int, limit: int, align: int, expected: bool) -> None:
    assert may_resume(position, limit, align) is expected


def test_the_deepest_checkpoint_with_all_its_kv() -> None:
    tree = Tree()
    tree.leave(text(300), 10, 128, 200, 299)
    assert tree.reuse(text(300)) == 299
    assert tree.reuse(text(299)) == 200
    assert tree.reuse(text(250) + text(50, 1)) == 200
    assert tree.reuse(text(199) + text(50, 1)) == 128
    assert tree.reuse(text(128) + text(50, 1)) == 128
    assert tree.reuse(text(127) + text(50, 1)) == 10
    assert tree.reuse(text(9) + text(50, 1)) == 0
    assert tree.reuse(text(300), align=64) == 128
    assert tree.reuse(()) == tree.reuse((0,)) == 0


def test_siblings_that_part_within_a_page() -> None:
    """However many there are, and in whatever order: each finds what it shares."""
    tree = Tree(pages=200)
    beginning = text(100)
    tree.leave((*beginning, 5), 100)
    for i in range(40):
        ids = (*beginning, 5000 + 37 * i % 41, i)
        assert tree.reuse(ids) == 100
        tree.leave(ids)
    assert tree.cache.num_pages == 1 + 41
    found = tree.cache.match(cut((*beginning, 5037, 99)), 102)
    assert (found.kv_length, found.parted) == (101, (1,))
    assert found.partial is not None
    assert found.partial.key[:36] == beginning[64:]


def test_a_page_that_says_more_replaces_one_that_says_less() -> None:
    tree = Tree()
    for length in (70, 90, 128, 80, 200):
        tree.leave(text(length), length - 1)
    assert tree.cache.num_pages == tree.pages.num_used == pages_for(200)
    assert [tree.reuse(text(n)) for n in (70, 80, 90, 128, 200)] == [69, 79, 89, 127, 199]


def test_a_match_is_told_that_its_page_is_gone() -> None:
    """One who waits keeps its match while `version` stays; a page given back as a duplicate must change it."""
    tree, ids = Tree(), text(64)
    lease = tree.cache.acquire(tree.cache.match(cut(ids), 0))
    [page] = table = tree.pages.allocate(1)
    tree.cache.publish(lease, cut(ids), table, 40, tail=True)
    tree.leave(ids)
    seen, found = tree.cache.version, tree.cache.match(cut((*text(40), 5, 6)), 41)
    tree.cache.publish(lease, cut(ids), table, 64, tail=False)
    assert table != [page], "the tree had all of it"
    assert tree.cache.version != seen
    assert found.kv_length == 40
    tree.cache.release(lease, table)
    assert tree.pages.num_used == tree.cache.num_pages == 1


def test_pages_go_from_the_leaves_up_and_take_their_checkpoints_along() -> None:
    tree = Tree(pages=4)
    tree.leave(text(128), 64, 128)
    tree.leave(text(128, 1), 64, 128)
    assert tree.cache.make_room(1)
    assert tree.reuse(text(200)) == 64
    assert tree.reuse(text(200, 1)) == 128
    assert tree.slots.num_used == tree.cache.num_checkpoints == 3
    assert tree.cache.make_room(2)
    assert tree.reuse(text(200)) == 0


def test_nothing_in_use_is_evicted() -> None:
    tree = Tree(pages=4, slots=2)
    tree.leave(text(130), 130)
    found = tree.cache.match(cut(text(200)), 199)
    lease = tree.cache.acquire(found)
    assert not tree.cache.make_room(2)
    assert tree.cache.take_slot() is not None
    assert tree.cache.take_slot() is None
    assert tree.reuse(text(200)) == 130
    tree.cache.settle(lease)
    assert tree.cache.make_room(2)
    assert tree.reuse(text(200)) == 0
    assert not tree.cache.make_room(3), "two full pages are still read"
    tree.cache.release(lease, ())
    assert tree.cache.make_room(4)


def test_the_least_recently_used_goes_first_and_cold_ones_before() -> None:
    tree = Tree(slots=3)
    for kind in range(3):
        tree.leave(text(70, kind), 69)
    tree.leave(text(71), cold=True)  # uses 0 again, and only from its checkpoint on
    tree.cache.settle(tree.cache.acquire(tree.cache.match(cut(text(80)), 79)))
    tree.leave(text(70, 3), 69)
    assert [tree.reuse(text(80, kind)) for kind in range(4)] == [69, 0, 69, 69]
    tree.cache.flush()
    tree.leave(text(70, 1), 69)
    tree.leave(text(70, 2), 66, cold=True)
    tree.leave(text(70, 3), 66, 67)
    assert [tree.reuse(text(80, kind)) for kind in (1, 2, 3)] == [69, 0, 67]


def test_an_evicted_checkpoint_goes_to_host_memory_while_there_is_room() -> None:
    tree = Tree(slots=1, host=1)
    tree.leave(text(70), 69)
    tree.leave(text(70, 1), 69)
    assert tree.cache.take_moves() == (StateMove(slot=1, host=1, out=True),)
    assert tree.reuse(text(80)) == tree.reuse(text(80, 1)) == 69
    tree.leave(text(70, 2), 69)  # the oldest of those in host memory is gone for good
    assert [tree.reuse(text(80, kind)) for kind in range(3)] == [0, 69, 69]
    assert (tree.cache.num_checkpoints, tree.cache.num_hosted) == (1, 1)


def test_a_state_comes_back_into_the_request_s_slot_and_the_second_time_for_all() -> None:
    tree = Tree(slots=3, host=2)
    for kind in range(4):
        tree.leave(text(70, kind), 69)
    tree.cache.take_moves()

    def start() -> tuple[int, int | None]:
        lease = tree.cache.acquire(tree.cache.match(cut(text(80)), 79))
        slot = tree.cache.take_slot()
        assert slot is not None
        source = tree.cache.bring_back(lease, slot)
        tree.cache.settle(lease)
        return slot, source

    slot, source = start()
    out, back = tree.cache.take_moves()
    assert (source, out.out, back) == (None, True, StateMove(slot, 1, out=False))
    assert (tree.cache.num_checkpoints, tree.cache.num_hosted) == (2, 2)
    _, source = start()
    moves = tree.cache.take_moves()
    assert [move.out for move in moves] == [True, True, False]
    assert moves[-1].slot == moves[-2].slot == source
    assert tree.cache.num_moved == {"evicted": 4, "restored": 2}
    assert tree.reuse(text(80)) == 69


def test_a_miss_is_explained() -> None:
    tree = Tree(pages=8, slots=4)
    tree.leave(text(300), 64, 280)

    def why(ids: tuple[int, ...]) -> dict[str, int]:
        return tree.cache.explain(tree.cache.match(cut(ids), len(ids) - 1), cut(ids), len(ids))

    assert why(text(290, 1)) == {"never_seen": 290}
    assert why(text(200) + text(100, 1)) == {"parted": 136, "never_seen": 100}
    assert why(text(281)) == {"never_seen": 1}
    tree.leave(text(60, 2), *range(57, 61))  # four slots: those of the first are gone
    assert why(text(290)) == {"checkpoint_evicted": 280, "parted": 9, "never_seen": 1}
    tree.leave(text(7 * 64, 3))
    assert why(text(300)) == {"pages_evicted": 256, "never_seen": 44}


# ---- identities --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["dense", "moe"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, seed: int) -> Engine:
    directory = tmp_path_factory.mktemp(request.param)
    random_checkpoint(
        directory, moe=request.param == "moe", layer_types="lfl", nk=1, nv=2, heads=2, kv_heads=1, seed=seed
    )
    return Engine.load(
        EngineConfig(
            model=str(directory),
            max_num_seqs=32,
            num_gpu_blocks_override=200,
            num_checkpoints=64,
            max_model_len=1024,
            speculate="mtp:2",
            show_progress=False,
        )
    )


def sharing(rng: random.Random, count: int, longest: int = 150) -> list[Request]:
    """Requests most of which begin like another one, up to some place."""
    requests = mixed_requests(rng, count, longest)
    for i, each in enumerate(requests):
        if i and rng.random() < 0.8:
            other = rng.choice(requests[:i]).prompt_ids
            at = rng.choice([len(other), rng.randint(0, len(other))])
            each.prompt_ids = other[:at] + each.prompt_ids[: rng.randint(1, 40)]
    return requests


def same_bits(got: Logits, want: Logits) -> int:
    """Checks all logits that both computed; how many the first did not need to."""
    for position, logits in got.rows.items():
        assert torch.equal(logits, want.rows[position]), position
    return len(want.rows) - len(got.rows)


def test_on_is_off_to_the_bit(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    requests = sharing(rng, 24)
    arrivals = [rng.randrange(60) for _ in requests]
    on, off = Logits(), Logits()
    want, _ = serve(engine, again(requests), arrive=lambda i: arrivals[i], observe=off)
    got, stats = serve(
        engine, again(requests), budget=96, arrive=lambda i: arrivals[i], observe=on, checkpoints=64
    )
    assert got == want
    assert same_bits(on, off) >= stats.prefix_hit_tokens > 200


@pytest.mark.parametrize("drafts", [0, 2])
def test_on_is_off_where_everything_is_evicted_all_the_time(engine: Engine, seed: int, drafts: int) -> None:
    """Few pages, few slots, preemptions, aborts midway; the same engine three times over."""
    rng = random.Random(seed + 1)
    requests = [replace_tokens(r, 70) for r in sharing(rng, 16, longest=120)]
    want, _ = serve(engine, again(requests))
    small = assemble(
        engine, budget=70, pages=8, seqs=6, checkpoints=3, proposer=HeadProposer() if drafts else None,
        depth=lambda request: drafts,
    )  # fmt: skip
    for _ in range(3):
        arrivals = [rng.randrange(60) for _ in requests]
        leaves = [rng.choice([None, None, None, rng.randrange(80)]) for _ in requests]
        got, stats = run(small, again(requests), arrive=arrivals.__getitem__, leave=leaves.__getitem__)
        assert got == {name: want[name] for name in got}
        assert len(got) >= sum(leave is None for leave in leaves)
    assert stats.preemptions >= 5
    assert stats.prefix_hit_tokens > 0
    assert stats.prefix_miss_tokens.keys() >= {"never_seen", "pages_evicted"}


def test_chats_of_many_turns(engine: Engine, seed: int) -> None:
    """Every turn is all that was said before and something new, and computes that and the last token before it."""
    rng = random.Random(seed + 2)
    chats = [prompt(rng, rng.randint(1, 100)) for _ in range(4)]
    turns, off = [], Logits()
    for turn in range(6):
        asked = [
            request(f"{turn}/{i}", ids, max_tokens=rng.randint(1, 40), temperature=i % 2, seed=turn)
            for i, ids in enumerate(chats)
        ]
        want, _ = serve(engine, again(asked), observe=off)
        turns.append((asked, want))
        chats = [r.prompt_ids + want[r.id][0] + prompt(rng, rng.randint(1, 50)) for r in asked]
    cached, on, said = assemble(engine, checkpoints=64), Logits(), [1] * 4
    for asked, want in turns:
        assert run(cached, asked, observe=on)[0] == want
        assert [r.num_cached for r in asked] == [length - 1 for length in said]  # its last token was not computed
        said = [r.num_tokens for r in asked]
    assert same_bits(on, off) > 1000


def test_prompt_logprobs_are_the_same_and_still_feed_the_cache(engine: Engine, seed: int) -> None:
    ids = prompt(random.Random(seed + 3), 200)
    cached = assemble(engine, checkpoints=8)
    told = []
    for _ in range(2):
        cached.add(each := request("told", ids, prompt_logprobs=2, max_tokens=1))
        [event] = cached.step()
        told.append(event.prompt_logprobs)
        assert each.num_cached == 0
    assert told[0] == told[1]
    assert len(told[0]) == 199
    run(cached, [after := request("after", ids)])
    assert after.num_cached == 199


def test_of_a_long_prompt_not_all_logits_are_there(
    engine: Engine, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, sizes, logits = prompt(random.Random(seed), 300), [], engine.runner.model.logits

    def counted(hidden_SH: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden_SH))
        return logits(hidden_SH)

    monkeypatch.setattr(engine.runner.model, "logits", counted)
    whole = assemble(engine)
    whole.add(request("told", ids, prompt_logprobs=2, max_tokens=1))
    [event] = whole.step()
    assert sizes == [1, 128, 128, 43]
    assert [about.token for about in event.prompt_logprobs] == list(ids[1:])


def test_those_that_arrive_together_compute_what_they_share_once(engine: Engine, seed: int) -> None:
    rng = random.Random(seed + 4)
    shared, other = prompt(rng, 300), prompt(rng, 100)
    requests = [request(f"r{i}", shared + prompt(rng, 20)) for i in range(8)]
    requests.insert(1, request("other", other))
    counted: list[int] = []

    def count(plan: StepPlan, _: object) -> None:
        counted.append(sum(len(row.ids) for row in plan.rows))

    got, stats = serve(engine, again(requests), budget=128, checkpoints=16, observe=count)
    assert got == serve(engine, again(requests))[0]
    assert stats.prefix_hit_tokens >= 7 * (300 - 64)  # up to 64 tokens are not worth waiting for
    assert sum(counted) == stats.prompt_tokens - stats.prefix_hit_tokens + 9 * 7


def test_one_that_shares_nothing_overtakes_those_that_wait(engine: Engine, seed: int) -> None:
    rng = random.Random(seed + 5)
    shared = prompt(rng, 400)
    requests = [request("first", shared), request("second", shared), request("stranger", prompt(rng, 10))]
    order: list[str] = []
    run(
        assemble(engine, budget=100, checkpoints=8), requests,
        observe=lambda plan, _: order.extend(row.request_id for row in plan.rows if row.request_id not in order),
    )  # fmt: skip
    assert order.index("first") < order.index("second")
    assert order.index("stranger") < 2, "within the first step, short rows come first"
    assert requests[1].num_cached == 399


def test_the_log_names_the_token_where_prompts_part(
    engine: Engine, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    ids = prompt(random.Random(seed + 6), 100)
    cached = assemble(engine, checkpoints=8)
    cached.show_tokens_as(lambda tokens: "".join(f"<{token}>" for token in tokens))
    run(cached, [request("before", ids)])
    changed = [*ids[:80], (ids[80] + 1) % VOCAB, *ids[81:]]
    with caplog.at_level(logging.DEBUG, logger="tritium.cache"):
        run(cached, [request("drifted", changed)])
    [record] = caplog.records
    line = record.getMessage()
    assert "drifted: 64 of 100 tokens reused; token 80 is the first that differs from the nearest" in line
    assert f"'<{changed[80]}><{ids[81]}>" in line
    assert f"there it was '<{ids[80]}><{ids[81]}>" in line


# ---- how much it saves -------------------------------------------------------------------------------------------

CHAT = byte_chat_format()


@pytest.fixture(scope="module", params=["none", "mtp:3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, seed: int) -> Engine:
    """As small as the family gets, with a long context and a token a byte; drafts change no figure below."""
    directory = tmp_path_factory.mktemp("tiny")
    random_checkpoint(directory, layer_types="lf", vocab=CHAT.tokenizer.vocab_size, seed=seed)
    edit_config(directory, max_position_embeddings=16384)
    return load(directory, speculate=request.param)


def load(directory: Path, **options: object) -> Engine:
    return Engine.load(
        EngineConfig(
            model=str(directory), max_num_seqs=64, max_num_batched_tokens=1024, num_gpu_blocks_override=1500,
            show_progress=False, **options,  # type: ignore[arg-type]
        )
    )  # fmt: skip


@pytest.fixture
def llm(tiny: Engine) -> LLM:
    """Over the tiny engine, with nothing cached."""
    tiny.scheduler.reuse.cache.flush()
    return llm_over(tiny, CHAT)


def ids_of(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(256) for _ in range(count)]


def computed(llm: LLM, *prompts: list[int]) -> list[int]:
    """Prompt tokens that each, asked at once, is not told to be cached. Answers are long enough for drafts."""
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    usages = [completion.usage for completion in llm.generate(list(prompts), sampling)]
    return [usage.prompt_tokens - usage.cached_tokens for usage in usages]


def test_a_prompt_and_a_short_suffix(llm: LLM, seed: int) -> None:
    prompt_ids = ids_of(random.Random(seed), 777)
    assert computed(llm, prompt_ids) == [777]
    assert computed(llm, prompt_ids) == [1]
    assert computed(llm, prompt_ids + [1, 2, 3]) == [4]  # from the checkpoint at its last token


def test_two_thousand_prompts_of_370_tokens_that_share_369(tiny: Engine, llm: LLM, seed: int) -> None:
    rng = random.Random(seed)
    shared = ids_of(rng, 369)
    before = llm.stats()
    counts = computed(llm, *([*shared, rng.randrange(256)] for _ in range(2000)))
    assert sum(counts) <= 370 + 1999 + 64 <= 0.02 * 2000 * 370
    after = llm.stats()
    assert after.prefix_hit_tokens - before.prefix_hit_tokens == 2000 * 370 - sum(counts)
    assert sum(after.prefix_miss_tokens.values()) - sum(before.prefix_miss_tokens.values()) == sum(counts)
    assert (sum(after.draft_proposed) > sum(before.draft_proposed)) is tiny.runner.run_head


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("suffixes", [(40, 376, 1296), (1296, 376, 40), (376, 1296, 40)], ids=str)
def test_a_long_prefix_with_suffixes_that_part(llm: LLM, seed: int, together: bool, suffixes: tuple[int, ...]) -> None:
    """The second request parts where nobody expected it, the longest suffix furthest from the end of the first."""
    rng = random.Random(seed)
    shared = ids_of(rng, 6476)
    prompts = [shared + ids_of(rng, count) for count in suffixes]
    counts = computed(llm, *prompts) if together else [computed(llm, each)[0] for each in prompts]
    assert counts[0] == 6476 + suffixes[0]
    for ids, count in zip(prompts[1:], counts[1:], strict=True):
        assert len(ids) - count >= 0.98 * 6476
    assert len(prompts[2]) - counts[2] >= 6476 - 16  # where the first two parted, if that was worth keeping


def test_choices_of_one_prompt(llm: LLM, seed: int) -> None:
    sampling = SamplingParams(n=4, seed=seed, max_tokens=2)
    usages = [c.usage for c in llm.generate([ids_of(random.Random(seed), 500)], sampling)]
    assert [usage.cached_tokens for usage in usages] == [0, 499, 499, 499]


def conversation(rng: random.Random, turns: int) -> list[list[dict[str, object]]]:
    """The messages of each request of a chat with tools: an answer calls a tool twice of three times, and thinks."""
    def words(count: int) -> str:
        return " ".join(rng.choice(("sun", "moon", "river", "stone", "wind")) for _ in range(count))

    messages: list[dict[str, object]] = [
        {"role": "system", "content": words(40)}, {"role": "user", "content": words(20)}
    ]  # fmt: skip
    requests = []
    for turn in range(turns):
        requests.append(list(messages))
        answer: dict[str, object] = {"role": "assistant", "content": words(8), "reasoning_content": words(12)}
        if turn % 3 < 2:
            call = {"name": "look", "arguments": {"where": words(3)}}
            messages.append(answer | {"tool_calls": [{"id": f"c{turn}", "type": "function", "function": call}]})
            messages.append({"role": "tool", "tool_call_id": f"c{turn}", "content": words(15)})
        else:
            messages += [answer, {"role": "user", "content": words(10)}]
    return requests


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks somewhere",
            "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
        },
    }
]


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def talk(engine: Engine, template: str, rng: random.Random) -> list[tuple[int, int]]:
    """(tokens that no prompt or answer before had, tokens computed) of each request of a chat with tools: 30 turns, the
    last one again, with another last message, and back to an earlier place."""
    llm, seen, out = llm_over(engine, byte_chat_format(template)), [list[int]()], []
    requests = conversation(rng, 30)
    edited = [*requests[-1][:-1], requests[-1][-1] | {"content": "Something else, then."}]
    for messages in (*requests, requests[-1], edited, requests[12]):
        [answer] = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), tools=TOOLS)
        new = len(answer.prompt_ids) - max(common(answer.prompt_ids, ids) for ids in seen)
        out.append((new, answer.usage.prompt_tokens - answer.usage.cached_tokens))
        seen.append(answer.prompt_ids + answer.token_ids)
    return out


def test_a_chat_with_tools_of_thirty_turns(tiny: Engine, llm: LLM, shared_data: Path, seed: int) -> None:
    """Rendered by the family's own template, which drops what the model thought once the user speaks again."""
    template = (shared_data / "qwen3.5-chat-template.jinja").read_text()
    turns = talk(tiny, template, random.Random(seed))
    assert len(turns) == 33
    assert all(count <= new + 64 for new, count in turns)


def test_drafts_cost_at_most_64_tokens_of_it(tmp_path: Path, shared_data: Path, seed: int) -> None:
    random_checkpoint(tmp_path, layer_types="lf", vocab=CHAT.tokenizer.vocab_size, seed=seed)
    edit_config(tmp_path, max_position_embeddings=16384)
    template = (shared_data / "qwen3.5-chat-template.jinja").read_text()
    counted = []
    for speculate in ("none", "mtp:3"):
        engine, rng = load(tmp_path, speculate=speculate), random.Random(seed)
        llm, one, long = llm_over(engine, CHAT), ids_of(rng, 777), ids_of(rng, 6476)
        prompts = [one, one + ids_of(rng, 16), *(long + ids_of(rng, count) for count in (40, 376, 1296))]
        prompts += [long[:369] + ids_of(rng, 1) for _ in range(100)]
        counted.append([computed(llm, ids)[0] for ids in prompts] + [count for _, count in talk(engine, template, rng)])
        assert (sum(engine.stats().draft_proposed) > 0) is (speculate != "none")
    assert all(with_drafts <= without + 64 for without, with_drafts in zip(*counted, strict=True))


def test_without_it_nothing_is_reused(tmp_path: Path, seed: int) -> None:
    random_checkpoint(tmp_path, layer_types="lf", vocab=CHAT.tokenizer.vocab_size, seed=seed)
    engine = load(tmp_path, enable_prefix_caching=False)
    assert engine.memory_plan.num_checkpoints == 0
    ids = ids_of(random.Random(seed), 100)
    assert computed(llm_over(engine, CHAT), ids, ids, ids) == [100, 100, 100]
    stats = engine.stats()
    assert (stats.prefix_hit_tokens, stats.pages_cached, stats.checkpoints) == (0, 0, 0)
