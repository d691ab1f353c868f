"""`python scripted_server.py NAME`: a server as `tritium serve` starts it, over an engine of `engines`."""

from __future__ import annotations

import logging
import sys

import engines
from served import CHAT, MODEL

from tritium.api import Limits, Session
from tritium.api.door import Door
from tritium.api.process import EngineProcess
from tritium.server import Server, ServerSettings
from tritium.server.app import listen


def main(name: str) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    driver = EngineProcess(getattr(engines, name))
    settings = ServerSettings(patience=2.0, drain_seconds=5.0, log_format="none",
                              limits=Limits(max_queued_requests=32))
    session = Session(driver, Door(driver.facts, CHAT, seed=0), limits=settings.limits)
    with listen("127.0.0.1", 0) as listener:
        print(f"serving on http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        Server(session, [MODEL], settings).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
