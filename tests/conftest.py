"""One thread a test process: the suite runs with as many workers as there are cores."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and tokenizers; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("LUTHIER_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "tokenizers").is_dir():
        pytest.skip(f"needs the shared folder ({folder} is not there; set LUTHIER_SHARED)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The journeys first, whose files take minutes: the workers come to their end together."""
    items.sort(key=lambda item: "journeys" not in item.path.parts)
