"""The NVIDIA driver as its own tools tell it, and which build of torch fits it. Without torch."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

TORCH = "2.13.0"
"""The torch that the tests ran on, as in constraints.txt."""
WHEELS = "https://download.pytorch.org/whl"
PATIENCE = 10.0
"""Seconds for nvidia-smi, which hangs where the driver does."""
NEWER_DRIVER = "install a newer NVIDIA driver: https://www.nvidia.com/drivers"
REBOOT = "reboot, or install NVIDIA's driver anew; a container needs: docker run --gpus all"

Version = tuple[int, int]


class Driver(NamedTuple):
    """version: None where there is none. cuda: the newest that it can run. problem: why it does not answer."""

    version: str | None = None
    cuda: Version | None = None
    cards: tuple[str, ...] = ()
    oldest: Version | None = None
    """The lowest compute capability of the cards."""
    problem: str = ""

    @property
    def there(self) -> bool:
        return self.version is not None and not self.problem

    def wheels(self) -> str | None:
        """The folder of torch's wheels for this machine; None where only a newer driver helps.

        torch 2.13 comes for CUDA 12.6 (cards up to Hopper, Pascal and Volta too) and 13.0 (Turing to Blackwell); a
        driver runs every minor version of its CUDA.
        """
        if not self.there:
            return "cpu"
        cuda, oldest = self.cuda or (13, 0), self.oldest or (8, 0)
        if oldest < (7, 5) or (cuda[0] == 12 and oldest < (10, 0)):
            return "cu126" if cuda[0] >= 12 else None
        return "cu130" if cuda[0] >= 13 else None

    def torch_line(self) -> str:
        """The command that brings the torch for this machine, or what has to be there first."""
        folder = self.wheels()
        if folder is None:
            return NEWER_DRIVER
        return f"pip uninstall -y torch && pip install torch=={TORCH} --index-url {WHEELS}/{folder}"

    def unfit(self, build: str | None, available: bool) -> tuple[str, str]:
        """What does not fit between driver and torch, and what to do; both empty where all is well.

        `build`: the CUDA version that torch was built for, None for a CPU build. `available`: torch finds a GPU.
        """
        if self.problem:
            return f"the NVIDIA driver does not answer ({self.problem}), runs go to the CPU", REBOOT
        if not self.there:
            fix = "a card needs its driver (a container: docker run --gpus all); without a card nothing is wrong"
            return ("there is no NVIDIA driver, runs go to the CPU", fix) if build and not available else ("", "")
        if build is None:
            return f"but there is {self.named()}: runs go to the CPU", self.torch_line()
        if self.cuda and self.cuda[0] < int(build.partition(".")[0]):
            limit = f"{self.cuda[0]}.{self.cuda[1]}"
            return f"but the driver {self.version} goes up to CUDA {limit}: runs go to the CPU", self.torch_line()
        if not available:
            fix = "unset CUDA_VISIBLE_DEVICES; if it is not set: reboot"
            return f"but torch finds no GPU, where the driver has {self.named()}: runs go to the CPU", fix
        return "", ""

    def named(self) -> str:
        """The first card and how many more."""
        if not self.cards:
            return f"an NVIDIA driver ({self.version})"
        more = f" and {len(self.cards) - 1} more" if len(self.cards) > 1 else ""
        return f"{self.cards[0]}{more} (driver {self.version})"

    def repair(self, error: str, capability: Version) -> str:
        """What to do about a GPU that fails with this error."""
        if "out of memory" in error:
            return "nvidia-smi  lists who holds the memory; end them, or name another: export CUDA_VISIBLE_DEVICES=…"
        if "no kernel image" in error:
            return self._replace(oldest=capability).torch_line()
        return REBOOT


@cache
def find_driver() -> Driver:
    """Ask nvidia-smi, or NVML where it is not there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return _by_nvml()
    try:
        told = subprocess.run([tool], capture_output=True, text=True, timeout=PATIENCE)
        query = [tool, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
        cards = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE)  # old drivers do not know it
    except subprocess.TimeoutExpired:
        return Driver("?", problem=f"nvidia-smi is silent for {PATIENCE:g} s")
    except OSError as error:
        return Driver("?", problem=f"nvidia-smi: {error.strerror}")
    version = re.search(r"(?:Driver|KMD) Version: *([\d.]+)", told.stdout)
    if told.returncode or version is None:
        said = (told.stdout + told.stderr).strip().splitlines()
        return Driver("?", problem=said[0] if said else f"nvidia-smi ends with status {told.returncode}")
    cuda = re.search(r"CUDA (?:UMD )?Version: *(\d+)\.(\d+)", told.stdout)
    found = re.findall(r"^(.+), *(\d+)\.(\d+)$", cards.stdout, re.MULTILINE)
    return Driver(
        version[1],
        (int(cuda[1]), int(cuda[2])) if cuda else None,
        tuple(name for name, _, _ in found),
        min(((int(major), int(minor)) for _, major, minor in found), default=None),
    )


def _by_nvml() -> Driver:
    """By nvidia-ml-py; where that is not there either, the device file tells that there is a driver."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an old package of the same name
            nvml = importlib.import_module("pynvml")
    except ImportError:
        return Driver("unknown") if Path("/dev/nvidiactl").exists() else Driver()
    try:
        nvml.nvmlInit()
        cuda = nvml.nvmlSystemGetCudaDriverVersion()  # 13000 for 13.0
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        oldest = min((tuple(nvml.nvmlDeviceGetCudaComputeCapability(one)) for one in handles), default=None)
        cards = tuple(_text(nvml.nvmlDeviceGetName(one)) for one in handles)
        return Driver(_text(nvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10), cards, oldest)
    except nvml.NVMLError as error:
        is_absent = isinstance(error, nvml.NVMLError_LibraryNotFound)
        return Driver() if is_absent else Driver("?", problem=str(error))


def _text(value: str | bytes) -> str:
    """Old versions of NVML's package give bytes."""
    return value if isinstance(value, str) else value.decode()
