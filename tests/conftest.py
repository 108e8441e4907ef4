"""What every test has: a fixed seed, the real data sets where they are at hand, and golden files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

PROJECT_ROOT = Path(__file__).resolve().parent.parent
GOLDEN_ROOT = Path(__file__).resolve().parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regen", action="store_true", help="write the golden files anew instead of comparing")
    parser.addoption("--networks", type=int, default=200, help="how many random networks `make fuzz` draws")
    parser.addoption("--fuzz-log", default="", help="file to which `make fuzz` adds a line of JSON for every network")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with cifar10/ and mnist/; the test is skipped where there is none."""
    root = Path(os.environ.get("FXPRUNE_DATA", PROJECT_ROOT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is not a folder (set FXPRUNE_DATA)")
    return root


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` asserts that text equals tests/golden/<name>; `pytest --regen` writes the file."""

    def check(name: str, text: str) -> None:
        path = GOLDEN_ROOT / name
        if request.config.getoption("--regen"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} does not exist: write it with pytest --regen, and read it"
        assert text == path.read_text(encoding="utf-8"), f"differs from {path}"

    return check
