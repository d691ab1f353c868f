"""Sampling against a statement of its rules in plain Python, one id at a time, in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tritium import sampling
from tritium.core import RowPlan, SamplingParams, Site
from tritium.ops.sampling import _draw, logprobs, philox4x32, sample, uniform
from tritium.sampling import Sampled, prompt_logprobs

INF = math.inf


def row(
    params: SamplingParams,
    *,
    seed: int = 0,
    position: int = 10,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    banned: Sequence[int] = (),
) -> Site:
    plan = RowPlan(
        request_id="r",
        ids=(0,),
        start=position - 1,
        pages=(1,),
        slot=1,
        samples=True,
        sampling=params,
        seed=seed,
        eos_ids=frozenset(banned),
        prompt_len=len(prompt),
        history=(*prompt, *output) if params.uses_penalties else None,
    )
    return Site(plan)


def draw(logits: Sequence[float] | torch.Tensor, **params: object) -> int | None:
    """One draw from one row of logits."""
    where = {key: params.pop(key) for key in ("seed", "position", "prompt", "output", "banned") if key in params}
    x = torch.as_tensor(logits, dtype=torch.float32)
    [one] = sampling.draw([row(SamplingParams(**params), **where)], x[None])
    return one.token


# --- the rules, stated once more ---------------------------------------------------------------------------------


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def python_uniform(seed: int, position: int) -> float:
    words = python_philox([position % 2**32, position >> 32, 0, 0], [seed % 2**32, seed % 2**64 >> 32])
    return (words[0] * 2**32 + words[1] >> 11) / 2**53


def distribution(logits: Sequence[float], plan: Site) -> list[float]:
    """Probability of every id, rule after rule."""
    asked, x = plan.sampling, [float(value) for value in logits]
    for i, bias in asked.logit_bias.items():
        x[i] += bias
    output = list(plan.history or ())[plan.row.prompt_len :]
    for i in set(plan.history or ()):
        x[i] = x[i] / asked.repetition_penalty if x[i] > 0 else x[i] * asked.repetition_penalty
        x[i] -= asked.frequency_penalty * output.count(i) + asked.presence_penalty * (i in output)
    for i in plan.eos_ids:
        x[i] = -INF
    best = max(x)
    if asked.temperature == 0:
        return [float(i == x.index(best)) for i in range(len(x))]
    p = [math.exp((value - best) / asked.temperature) for value in x]
    floor = asked.min_p * max(p)
    p = [value if value >= floor else 0.0 for value in p]
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    ranked = ranked[: asked.top_k or len(p)]
    mass, kept, total = 0.0, set(), sum(p[i] for i in ranked)
    for i in ranked:
        kept.add(i)
        mass += p[i]
        if mass >= asked.top_p * total and asked.top_p < 1:
            break
    total = sum(p[i] for i in sorted(kept))
    return [value / total if i in kept else 0.0 for i, value in enumerate(p)]


def check_draw(got: Sampled, logits: Sequence[float], plan: Site) -> None:
    p = distribution(logits, plan)
    u, upto = python_uniform(plan.row.seed, plan.position), np.cumsum(p)
    assert got.token is not None
    assert p[got.token] > 0, "a token that the filters exclude"
    before = upto[got.token] - p[got.token]
    assert before - 1e-9 <= u <= upto[got.token] + 1e-9 or plan.sampling.temperature == 0


# --- Philox ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    """The vectors published with Random123 for philox4x32-10."""
    assert philox4x32(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])[:, 0].tolist() == words
    assert python_philox(counter, key) == words


def test_uniform_uses_all_64_bits_of_seed_and_position(seed):
    rng = random.Random(seed)
    pairs = [(rng.randrange(-(2**63), 2**63), rng.randrange(2**40)) for _ in range(200)]
    pairs += [(0, 0), (-1, 0), (2**63 - 1, 1), (-(2**63), 2**62), (1, 2**32), (2**32, 1)]
    got = uniform(torch.tensor([s for s, _ in pairs]), torch.tensor([p for _, p in pairs]))
    assert got.tolist() == [python_uniform(s, p) for s, p in pairs]
    assert len(set(got.tolist())) == len(pairs)


# --- each parameter against the plain statement ------------------------------------------------------------------

CASES = {
    "plain": {},
    "temperature": {"temperature": 0.3},
    "hot": {"temperature": 100.0},
    "top_k": {"top_k": 5},
    "top_k of everything": {"top_k": 10_000},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "frequency, rewarding": {"frequency_penalty": -2.0},
    "repetition": {"repetition_penalty": 1.7},
    "repetition, rewarding": {"repetition_penalty": 0.5},
    "logit_bias": {"logit_bias": {3: 4.0, 5: -100.0, 17: 2.5}},
    "greedy with everything": {
        "temperature": 0.0,
        "presence_penalty": 1.0,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.3,
        "logit_bias": {2: 3.0},
    },
    "min_p, top_k and top_p": {"min_p": 0.02, "top_k": 12, "top_p": 0.8},
    "everything": {
        "temperature": 0.8,
        "min_p": 0.01,
        "top_k": 20,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {1: 1.0, 30: -3.0},
    },
}


def random_row(rng: random.Random, vocab: int, params: SamplingParams) -> Site:
    return row(
        params,
        seed=rng.randrange(-(2**63), 2**63),
        position=rng.randrange(1, 10_000),
        prompt=[rng.randrange(vocab) for _ in range(rng.randrange(1, 12))],
        output=[rng.randrange(vocab) for _ in range(rng.randrange(12))],
        banned=rng.sample(range(vocab), rng.choice([0, 0, 3])),
    )


def random_logits(rng: random.Random, rows: int, vocab: int) -> torch.Tensor:
    """Some rows in coarse steps, so that equal logits are common."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rng.randrange(2**40))) * 2
    x[::3] = (x[::3] * 2).round() / 2
    return x


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_plain_statement(seed, case):
    rng = random.Random(f"{seed}/{case}")
    plans = [random_row(rng, 41, SamplingParams(**CASES[case])) for _ in range(60)]
    x = random_logits(rng, 60, 41)
    for got, logits, plan in zip(sampling.draw(plans, x), x.tolist(), plans, strict=True):
        check_draw(got, logits, plan)


def any_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 1e-4, 0.6, 1.0, 3.0, 100.0]),
        top_k=rng.choice([0, 0, 1, 7, 20, 500]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.5, 1e-9]),
        min_p=rng.choice([0.0, 0.0, 0.05, 1.0]),
        presence_penalty=rng.choice([0.0, 0.0, 1.0]),
        frequency_penalty=rng.choice([0.0, 0.0, -1.0, 0.4]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.4]),
        logit_bias=rng.choice([{}, {}, {0: 100.0}, {1: -100.0, 8: 2.0}]),
        logprobs=rng.choice([None, 0, 3]),
    )


def test_rows_that_ask_for_different_things_share_a_call(seed):
    rng = random.Random(seed)
    for vocab in (29, 300):
        plans = [random_row(rng, vocab, any_params(rng)) for _ in range(300)]
        x = random_logits(rng, 300, vocab)
        for got, logits, plan in zip(sampling.draw(plans, x), x.tolist(), plans, strict=True):
            check_draw(got, logits, plan)
            assert (got.logprob is None) == (plan.sampling.logprobs is None)


def test_a_flat_top_p_over_a_large_vocabulary(seed):
    """The cut lies far behind the first ids looked at."""
    rng = random.Random(seed)
    x = torch.randn(3, 250_001, generator=torch.Generator().manual_seed(seed)) * 0.1
    plans = [random_row(rng, 250_001, SamplingParams(top_p=top_p)) for top_p in (0.9, 0.01, 0.5)]
    for got, logits, plan in zip(sampling.draw(plans, x), x.tolist(), plans, strict=True):
        check_draw(got, logits, plan)


# --- small examples ----------------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id():
    assert draw([1.0, 3.0, 3.0, 2.0], temperature=0.0) == 1
    assert draw([-0.0, 0.0], temperature=0.0) == 0
    for vocab in (3, 64, 1000, 2049):
        x = torch.zeros(vocab)
        assert draw(x, temperature=0.0) == 0
        x[[vocab // 2, vocab - 1]] = 1.0
        assert draw(x, temperature=0.0) == vocab // 2


def test_of_equals_top_k_and_top_p_keep_the_lower_ids():
    assert {draw([0.0] * 9, top_k=3, position=p) for p in range(1, 60)} == {0, 1, 2}
    assert {draw([0.0] * 10, top_p=0.35, position=p) for p in range(1, 90)} == {0, 1, 2, 3}


def test_top_p_is_a_share_of_what_top_k_left():
    # 4 ids of probability 1/4 each; of the 2 that top_k keeps, one is half.
    assert {draw([0.0] * 4, top_k=2, top_p=0.5, position=p) for p in range(1, 40)} == {0}


@pytest.mark.parametrize("tight", [{"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 1e-4}])
def test_the_tightest_filters_leave_the_best(tight):
    assert {draw([0.0, 2.0, 1.9, -1.0], seed=s, **tight) for s in range(50)} == {1}


def test_min_p_1_leaves_all_that_are_equally_best():
    assert {draw([2.0, 0.0, 2.0], min_p=1.0, seed=s) for s in range(50)} == {0, 2}


def test_logit_bias_of_100_decides_and_of_minus_100_excludes():
    assert {draw([5.0, 1.0, 1.0], logit_bias={2: 100.0}, seed=s) for s in range(50)} == {2}
    assert {draw([50.0, 1.0, 1.0], logit_bias={0: -100.0}, seed=s) for s in range(50)} == {1, 2}


def test_presence_and_frequency_count_the_output_alone_and_repetition_the_prompt_too():
    x = [1.0, 0.9]
    assert draw(x, temperature=0.0, presence_penalty=0.2, prompt=[0], output=[]) == 0
    assert draw(x, temperature=0.0, presence_penalty=0.2, prompt=[], output=[0]) == 1
    assert draw(x, temperature=0.0, frequency_penalty=0.06, prompt=[0, 0], output=[0]) == 0
    assert draw(x, temperature=0.0, frequency_penalty=0.06, prompt=[], output=[0, 0]) == 1
    assert draw(x, temperature=0.0, repetition_penalty=1.2, prompt=[0], output=[]) == 1


def test_repetition_pushes_negative_logits_down_too():
    assert draw([-1.0, -1.1], temperature=0.0, repetition_penalty=1.5, prompt=[0]) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_banned_ids_are_not_drawn_even_with_the_largest_bias(temperature):
    got = {
        draw([9.0, 0.0, 8.0, 1.0], temperature=temperature, logit_bias={0: 100.0}, banned=[0, 2], seed=s)
        for s in range(60)
    }
    assert got <= {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_every_id_masked_but_one_that_one_is_drawn_and_with_all_masked_the_row_fails(temperature):
    x = torch.zeros(100)
    banned = [i for i in range(100) if i != 63]
    assert draw(x, temperature=temperature, banned=banned, top_p=0.9) == 63
    assert draw(torch.where(torch.arange(100) == 63, x, -INF), temperature=temperature) == 63
    assert draw(x, temperature=temperature, banned=range(100)) is None


def test_ids_outside_the_vocabulary_change_nothing():
    assert draw([1.0, 2.0], temperature=0.0, banned=[5, 99]) == 1


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(bad, temperature):
    x = torch.zeros(3, 50)
    x[1, 7] = bad
    params = SamplingParams(temperature=temperature, top_p=0.9, logprobs=2)
    clean = sampling.draw([row(params)], x[:1])[0]
    got = sampling.draw([row(params)] * 3, x)
    assert [one.token is None for one in got] == [False, True, False]
    assert got[0] == got[2] == clean
    assert (got[1].token, got[1].logprob) == (None, None)


def test_logits_are_left_as_they_are(seed):
    rng = random.Random(seed)
    x = random_logits(rng, 40, 60)
    before = x.clone()
    sampling.draw([random_row(rng, 60, any_params(rng)) for _ in range(40)], x)
    assert torch.equal(x, before)


def test_no_rows_no_draws():
    assert sampling.draw([], torch.empty(0, 10)) == []


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (1 - 2.0**-53, 4)])
def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_id_that_is_kept(u, token):
    one = torch.ones(1, dtype=torch.float64)
    x = torch.tensor([[-INF, 0.0, 1.0, -INF, 0.0, -INF]])
    assert _draw(x, one, one, one.long() * 0, one, one * 0, one * u).tolist() == [token]


# --- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_equals_the_row_among_31_others_to_the_bit(seed, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rng = random.Random(seed)
        for vocab in (77, 2048, 50_001):
            plans = [random_row(rng, vocab, any_params(rng)) for _ in range(32)]
            x = random_logits(rng, 32, vocab).to(dtype)
            together = sampling.draw(plans, x)
            assert together == [sampling.draw([plan], x[i : i + 1])[0] for i, plan in enumerate(plans)]
            order = rng.sample(range(32), 32)
            shuffled = sampling.draw([plans[i] for i in order], x[order])
            assert shuffled == [together[i] for i in order]
    finally:
        torch.set_num_threads(before)


def test_rows_beyond_one_slice_of_a_large_vocabulary_equal_each_alone(seed):
    rng = random.Random(seed)
    plans = [random_row(rng, 250_000, any_params(rng)) for _ in range(20)]
    x = random_logits(rng, 20, 250_000)
    together = sampling.draw(plans, x)
    for i in (0, 7, 16, 19):
        assert together[i] == sampling.draw([plans[i]], x[i : i + 1])[0]


def test_padding_the_vocabulary_changes_no_draw(seed):
    rng = random.Random(seed)
    plans = [random_row(rng, 100, any_params(rng)) for _ in range(64)]
    x = random_logits(rng, 64, 100)
    padded = torch.cat([x, torch.full((64, 28), -INF)], -1)
    assert [s.token for s in sampling.draw(plans, x)] == [s.token for s in sampling.draw(plans, padded)]


def test_a_draw_depends_on_seed_and_position_and_on_nothing_else():
    x = [0.0] * 1000
    once = [draw(x, seed=s, position=p) for s in range(6) for p in range(1, 7)]
    assert once == [draw(x, seed=s, position=p) for s in range(6) for p in range(1, 7)]
    assert len(set(once)) > 30
    assert draw(x, seed=5, position=3) == draw(x, seed=5, position=3, prompt=[1, 2], output=[3])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_many_draws_have_the_distribution_asked_for(seed, temperature, filters):
    count, logits = 20_000, [2.0, 0.5, 1.5, -1.0, 0.0, 1.0, -3.0, 0.7, 0.71, -0.5]
    params = SamplingParams(temperature=temperature, **filters)
    column = torch.ones(count, dtype=torch.float64)
    token = sample(
        logits_SV=torch.tensor(logits).expand(count, -1),
        temperature_S=column * temperature,
        top_k_S=(column * params.top_k).long(),
        top_p_S=column * params.top_p,
        min_p_S=column * params.min_p,
        seed_S=torch.full((count,), 1234 + seed),
        position_S=torch.arange(count),
    )
    seen = torch.bincount(token, minlength=10).double()
    expected = torch.tensor(distribution(logits, row(params))).double() * count
    assert not seen[expected == 0].any()
    seen, expected = seen[expected > 0], expected[expected > 0]
    statistic = ((seen - expected) ** 2 / expected).sum()
    p = torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), statistic / 2)
    assert p > 0.001 if seed == 0 else p > 1e-6  # other seeds are other experiments


# --- log-probabilities -------------------------------------------------------------------------------------------


def numpy_logprobs(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_ranks_and_alternatives(seed, dtype):
    rng = random.Random(seed)
    x = random_logits(rng, 30, 70).to(dtype)
    x[0, 5], x[0, 6] = 0.0, -0.0
    token = torch.tensor([rng.randrange(70) for _ in range(30)])
    logprob, rank, top, top_logprob = logprobs(logits_SV=x, token_S=token, k=8)
    want = numpy_logprobs(x)
    for i in range(30):
        best = sorted(range(70), key=lambda v: (-float(x[i, v]), v))
        assert top[i].tolist() == best[:8]
        assert rank[i] == best.index(int(token[i])) + 1
        np.testing.assert_allclose(logprob[i], want[i, token[i]], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(top_logprob[i], want[i, best[:8]], rtol=1e-6, atol=1e-7)


def test_logprobs_are_of_the_raw_distribution_whatever_the_filters_do():
    x = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    params = SamplingParams(temperature=0.1, top_k=1, logit_bias={3: 100.0}, repetition_penalty=2.0, logprobs=2)
    [got] = sampling.draw([row(params, prompt=[1], output=[1])], x)
    want = numpy_logprobs(x)[0]
    assert got.token == 3
    assert got.logprob is not None
    assert (got.logprob.token, got.logprob.rank) == (3, 4)
    assert got.logprob.logprob == pytest.approx(want[3], rel=1e-6)
    assert [t for t, _ in got.logprob.top] == [1, 0]
    assert [p for _, p in got.logprob.top] == pytest.approx([want[1], want[0]], rel=1e-6)


def test_each_row_gets_as_many_alternatives_as_it_asked_for():
    plans = [row(SamplingParams(logprobs=k)) for k in (None, 0, 3, 20)]
    got = sampling.draw(plans, torch.zeros(4, 6))
    assert [None if s.logprob is None else len(s.logprob.top) for s in got] == [None, 0, 3, 6]


def test_prompt_logprobs(seed):
    x = random_logits(random.Random(seed), 12, 33)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    got = prompt_logprobs(x, ids, 2)
    want = numpy_logprobs(x)
    assert [one.token for one in got] == ids
    np.testing.assert_allclose([one.logprob for one in got], want[np.arange(12), ids], rtol=1e-6, atol=1e-7)
    assert all(len(one.top) == 2 for one in got)
    assert prompt_logprobs(x[:0], (), 2) == ()
