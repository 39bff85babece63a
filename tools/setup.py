"""Makes .venv: the pinned torch for this machine, then Luthier, editable, with all that its tests need.

    python3 tools/setup.py

Does nothing when .venv already is what pyproject.toml and constraints.txt ask for. Standard library only, and syntax
that Python 3.7 reads, so that an old Python is answered with a sentence.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PIP = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    """Bring .venv up to date, saying what is done and how long it takes; exit 1, with pip's errors, when that fails."""
    python = "{}.{}.{}".format(*sys.version_info[:3])
    if sys.version_info < (3, 11):  # noqa: UP036 (this is the check that makes it true)
        sys.exit(f"Luthier needs Python 3.11 or newer; {sys.executable} is {python}. To name another: make PYTHON=…")
    driver = has_nvidia_driver()
    machine = "{}, Python {}.{}, {}".format(ROOT, *sys.version_info[:2], "CUDA" if driver else "CPU")
    wanted = [machine, digest()]
    stamp = VENV / "setup.stamp"
    found = stamp.read_text(encoding="utf-8").splitlines() if stamp.exists() else []
    alive = (VENV / "bin" / "python").exists()
    if alive and found == wanted:
        return

    began = time.monotonic()
    length = "10 minutes the first time, several GB" if driver else "2 minutes the first time, 1.6 GB"
    print(f"Setting up .venv with Python {python} (about {length}):")
    VENV.mkdir(exist_ok=True)
    # A virtual environment does not survive a move, another Python, or a driver that came or went: it is made anew.
    moved = found[:1] not in ([], [machine])
    if moved:
        print(f"  the old one was for {found[0]}: removed")
    step("virtual environment", [sys.executable, "-m", "venv", *(["--clear"] if moved or not alive else []), str(VENV)])
    stamp.write_text(machine, encoding="utf-8")  # the digest follows when all is done
    pin = torch_pin((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    if driver:
        step(f"{pin} for CUDA (an NVIDIA driver is there)", [*PIP, "--no-deps", pin])
    elif plain_brings_cuda(pin):
        step(f"{pin} for the CPU (no NVIDIA driver), {CPU_WHEELS}", [*PIP, "--no-deps", "--index-url", CPU_WHEELS, pin])
    else:
        step(f"{pin} for the CPU (no NVIDIA driver)", [*PIP, "--no-deps", pin])
    step("Luthier and what it needs", [*PIP, "-c", "constraints.txt", "-e", ".[dev]"])
    stamp.write_text("\n".join(wanted), encoding="utf-8")
    print(f"done in {time.monotonic() - began:.0f} s")


def has_nvidia_driver() -> bool:
    """Whether this process can reach an NVIDIA card. (/proc/driver/nvidia alone is seen in containers without one.)"""
    if Path("/dev/nvidiactl").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def digest() -> str:
    """What .venv is made from: changes when a requirement, a pin or this script does."""
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__)]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def torch_pin(constraints: str) -> str:
    """The line of constraints.txt that pins torch."""
    pin = re.search(r"^torch==\S+", constraints, re.MULTILINE)
    assert pin, "constraints.txt pins no torch"
    return pin.group()


def plain_brings_cuda(pin: str) -> bool:
    """Whether plain pip would fetch CUDA with torch: on Linux it does, unless it finds a CPU build of its own."""
    asked = subprocess.run([*PIP, "--quiet", "--dry-run", "--report", "-", pin], capture_output=True, text=True)
    if asked.returncode:
        fail(asked.stderr)
    return brings_cuda(json.loads(asked.stdout))


def brings_cuda(report: dict) -> bool:
    """Whether pip's installation report holds a distribution of CUDA's (nvidia-cublas, cuda-toolkit, …)."""
    names = [item["metadata"]["name"].lower() for item in report["install"]]
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def step(what: str, command: list[str]) -> None:
    """Run a command from the root; its output goes to .venv/setup.log, and its errors to the screen when it fails."""
    print(f"  {what} …", end="", flush=True)
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with (VENV / "setup.log").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    print(f" {time.monotonic() - began:.0f} s" if done.returncode == 0 else " failed", flush=True)
    if done.returncode:
        fail(done.stdout)


def fail(output: str) -> None:
    """Leave with a failed command's own errors, or the end of its output when it names none."""
    lines = output.splitlines()
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-20:]
    advice = "Set-up failed. All of the output is in .venv/setup.log; the same command tries again."
    sys.exit("\n".join([*errors, advice]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nSet-up stopped; the same command goes on with it.")
