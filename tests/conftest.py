"""What every test file may rely on: `--seed`, one thread a worker, GPU tests skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of every random test (default 0)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # Seed 0 runs the same examples every time; another seed explores new ones.
    hypothesis.settings.register_profile(
        "tritium", deadline=None, derandomize=config.getoption("--seed") == 0, print_blob=True
    )
    hypothesis.settings.load_profile("tritium")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run; two numbers drawn from different seeds give different cases."""
    return int(request.config.getoption("--seed"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data files that may lie beside the checkout; tests skip where it does not."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return path
