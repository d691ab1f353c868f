"""The generator of problems: right by construction, the same for the same seed, and split in two that never meet."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from tritium.eval import tasks

KINDS = ("word_problems", "tool_calls", "small_talk", "conversations", "arithmetic")


def _calls(reply: tasks.Message) -> list[tuple[str, tasks.Arguments]]:
    return [(c["function"]["name"], c["function"]["arguments"]) for c in reply.get("tool_calls", [])]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_reference_reply_is_graded_right(kind: str, split: tasks.Split) -> None:
    for sample in tasks.samples(kind, split, seed=3, n=300):
        reply = sample.reply
        assert tasks.grade(sample.task, reply["content"], reply.get("reasoning_content", ""), _calls(reply)), sample


def test_recall_is_graded_right_and_as_long_as_asked() -> None:
    for sample in tasks.samples("recall", "heldout", seed=3, n=3, tokens=4000):
        assert tasks.grade(sample.task, sample.reply["content"], "", [])
        assert 9_000 < len(sample.task.messages[-1]["content"]) < 20_000


HASHES = {
    "word_problems": "3670bc9804347f0c",
    "tool_calls": "355110715f2a8e61",
    "small_talk": "c18f2b4d6954867f",
    "conversations": "126aa93d4cf57548",
    "arithmetic": "9e2e7be40eccf1be",
    "recall": "d89e6cf86ff4bc0a",
}
"""Of the first hundred samples of each kind, held-out, seed 20,000."""


@pytest.mark.parametrize("kind", [*KINDS, "recall"])
def test_problems_stay_what_they_were(kind: str) -> None:
    """To the character: figures of another day compare, and a training run can be made again."""
    drawn = tasks.samples(kind, "heldout", 20_000, 100, tokens=400)
    text = json.dumps([dataclasses.asdict(sample) for sample in drawn])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == HASHES[kind]


def test_same_seed_same_tasks() -> None:
    assert tasks.tasks("word_problems", "heldout", 5, 20) == tasks.tasks("word_problems", "heldout", 5, 20)
    assert tasks.tasks("word_problems", "heldout", 5, 20) != tasks.tasks("word_problems", "heldout", 6, 20)
    assert tasks.tasks("tool_calls", "heldout", 5, 8)[:4] == tasks.tasks("tool_calls", "heldout", 5, 4)


def test_the_splits_share_no_problem() -> None:
    train = {t.messages[-1]["content"] for t in tasks.tasks("word_problems", "train", 0, 3000)}
    held = {t.messages[-1]["content"] for t in tasks.tasks("word_problems", "heldout", 0, 500)}
    assert not train & held


def test_wrong_answers_are_graded_wrong() -> None:
    word = tasks.Task("word_problem", [], [], True, 9, 27)
    assert tasks.grade(word, "3 * 12 = 36, so 27 apples are left.", "", [])
    assert not tasks.grade(word, "27 - 9 = 18.", "", [])
    assert not tasks.grade(word, "", "27", [])
    call = tasks.Task("tool_call", [], [], True, 9, ("timer", {"minutes": 5}))
    assert tasks.grade(call, "", "", [("timer", {"minutes": 5})])
    assert not tasks.grade(call, "", "", [("timer", {"minutes": 6})])
    assert not tasks.grade(call, "", "", [("timer", {"minutes": 5, "unit": "s"})])
    assert not tasks.grade(call, "5", "", [])
    assert not tasks.grade(call, "", "", [("timer", {"minutes": 5})] * 2)
    recall = tasks.Task("recall", [], [], False, 9, "482")
    assert tasks.grade(recall, "The code is 482.", "", [])
    assert not tasks.grade(recall, "The code is 4821.", "", [])
