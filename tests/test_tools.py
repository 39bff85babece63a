"""The pure parts of tools/setup.py and tools/full_summary.py."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
SETUP: dict[str, Callable[..., Any]] = runpy.run_path(str(TOOLS / "setup.py"))
SUMMARY: dict[str, Callable[..., Any]] = runpy.run_path(str(TOOLS / "full_summary.py"))


def report(*names: str) -> dict[str, Any]:
    return {"install": [{"metadata": {"name": name}} for name in names]}


def test_a_plain_torch_brings_cuda_when_pip_says_so() -> None:
    assert SETUP["brings_cuda"](report("torch", "nvidia-cublas", "sympy"))
    assert SETUP["brings_cuda"](report("torch", "Cuda-Toolkit"))
    assert not SETUP["brings_cuda"](report("torch", "sympy", "triton"))
    assert not SETUP["brings_cuda"](report())


def test_torch_is_pinned_in_one_place() -> None:
    assert SETUP["torch_pin"]("# torch==1.0\ntorchvision==0.1\ntorch==2.13.0\ntqdm==4.0\n") == "torch==2.13.0"
    assert SETUP["torch_pin"]((TOOLS.parent / "constraints.txt").read_text(encoding="utf-8")).startswith("torch==2.")


@pytest.mark.parametrize(("status", "there"), [(0, True), (9, False)])
def test_a_driver_is_one_that_answers(
    status: int, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("an NVIDIA driver is there")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nexit {status}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert SETUP["has_nvidia_driver"]() is there


def test_a_failed_step_shows_pips_errors_and_the_log() -> None:
    with pytest.raises(SystemExit) as raised:
        SETUP["fail"]("Collecting x\nWARNING: slow\nERROR: No matching distribution found for x\n")
    assert str(raised.value) == (
        "ERROR: No matching distribution found for x\n"
        "Set-up failed. All of the output is in .venv/setup.log; the same command tries again."
    )


def test_the_summary_of_a_full_run(tmp_path: Path) -> None:
    """A real report of pytest's, with one test of each outcome."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "@pytest.mark.skip(reason='no card')\n"
        "def test_card(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_error(broken): pass\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=full.xml", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    lines = SUMMARY["summary"]((tmp_path / "full.xml").read_text(encoding="utf-8"), "Linux").splitlines()
    assert "**1 passed, 2 failed, 1 skipped** in 0 min" in lines[2]
    assert lines[3:10] == [
        "Linux",
        "",
        "## Failed",
        "- `test_it.test_bad`",
        "- `test_it.test_error`",
        "",
        "## Skipped",
    ]
    assert lines[10] == "- 1 in `test_it`: no card"
    assert lines.count("- 0 s `test_it.test_good`") == 1
