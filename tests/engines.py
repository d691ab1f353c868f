"""Engines that a child process can make: what the tests of processes hand over, by name."""

from __future__ import annotations

import functools
import time

from scripted import ScriptedEngine
from served import rambles, scripted

from tritium.core import CheckpointError


def slow_rambler(step_seconds: float = 0.005, **options) -> ScriptedEngine:
    return rambles(step_seconds=step_seconds, **options)


def broken() -> ScriptedEngine:
    raise CheckpointError("the file is torn", hint="fetch it again")


def surprised() -> ScriptedEngine:
    raise ValueError("what is this?")


def never_ready() -> ScriptedEngine:
    time.sleep(600)
    return scripted(lambda request: [])


rambler = functools.partial(slow_rambler)
mortal = functools.partial(slow_rambler, die_after=20)
