"""The machine that a run would have: Python, cores, memory, disks, and whether it may write there."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from luthier.doctor.finding import GIB, Finding, short

CACHE_WANTS, WANTED = 10 * GIB, GIB
"""Free bytes below which the hub's cache, and any other folder, is worth a line: a model of 4 B has 8 GB in bf16."""
MEMORY_WANTED = 2 * GIB
"""Free bytes of RAM: torch and its friends take half a GiB before the model comes."""
GROUPS = Path("/sys/fs/cgroup")


def python() -> Iterator[Finding]:
    """Which it is. (An older one than 3.11 does not come as far as this.)"""
    own = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    where = f"in {short(Path(sys.prefix))}" if own else "not in a virtual environment"
    yield Finding("✓", "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}, {where}")


def processor() -> Iterator[Finding]:
    """Cores that this process may use, against the threads that OMP_NUM_THREADS asks for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = container_cores(GROUPS)
    found = f"{cores} core{'s'[: cores != 1]}"
    if share is not None and share < cores:
        found += f", of which this container may use {share:g}"
        cores = max(1, int(share))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked.split(",")[0]) if re.fullmatch(r"\d+(,\d+)*", asked) else None
    found += f"; OMP_NUM_THREADS={asked}" if asked else ""
    if asked and threads is None:
        yield Finding("!", "processor", f"{found} is no number", "unset OMP_NUM_THREADS")
    elif (threads or 0) > cores or (threads is None and "may use" in found):
        yield Finding("!", "processor", f"{found}: more threads than cores are slow", f"export OMP_NUM_THREADS={cores}")
    else:
        yield Finding("✓", "processor", found)


def memory() -> Iterator[Finding]:
    """Total and free, of the machine or of the container where that has less."""
    import psutil

    machine, swap = psutil.virtual_memory(), psutil.swap_memory()
    total, free, whose = machine.total, machine.available, ""
    container = container_memory(GROUPS)
    if container and container[0] < total:
        total, free, whose = container[0], min(free, container[0] - container[1]), " of this container"
    swapped = f"swap {swap.total / GIB:.1f} GiB" if swap.total else "no swap"
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}{whose}; {swapped}"
    if free < MEMORY_WANTED:
        yield Finding("!", "memory", found, "end what holds it: ps aux --sort=-rss | head")
    else:
        yield Finding("✓", "memory", found)


def container_memory(groups: Path, own: Path = Path("/proc/self/cgroup")) -> tuple[int, int] | None:
    """(limit, used) in bytes, without what the kernel would give back; None where nothing limits it."""
    limit_name, used_name, cached_name = "memory.max", "memory.current", "inactive_file"
    folders = _own_groups(groups, own)
    if not folders:  # version 1 of control groups
        limit_name, used_name, cached_name = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        folders = [groups / "memory"]
    found = [(int(text), folder) for folder in folders if (text := _text(folder / limit_name)).isdigit()]
    if not found:
        return None
    limit, folder = min(found)
    cached = re.search(rf"^{cached_name} (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
    return limit, max(0, int(_text(folder / used_name) or 0) - int(cached[1] if cached else 0))


def container_cores(groups: Path, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many cores' time the container may take; None where nothing limits it."""
    shares = [_text(folder / "cpu.max").split() for folder in _own_groups(groups, own)]
    shares.append([_text(groups / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")])
    limits = [int(share[0]) / int(share[1]) for share in shares if len(share) == 2 and share[0].isdigit()]
    return min(limits, default=None)


def _own_groups(groups: Path, own: Path) -> list[Path]:
    """This process's control group and those above it (version 2); empty where there are none."""
    line = re.search(r"^0::/(.*)$", _text(own), re.MULTILINE)
    if line is None or not (groups / "cgroup.controllers").exists():
        return []
    folder = groups / line[1]
    return [folder, *(above for above in folder.parents if above.is_relative_to(groups))]


def _text(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


# ---- disks


def disks(root: Path) -> Iterator[Finding]:
    """A line for each disk: what of ours it holds, and what it has free."""
    places = _places(root)
    together: dict[int, list[str]] = {}
    for name, (folder, _) in places.items():
        together.setdefault(_there(folder).stat().st_dev, []).append(name)
    for names in together.values():
        free = shutil.disk_usage(_there(places[names[0]][0])).free
        found = f"{free / GIB:,.1f} GiB free for {', '.join(names)}"
        short_of = next((name for name in names if free < (CACHE_WANTS if name == "hub cache" else WANTED)), None)
        if short_of:
            yield Finding("!", "disk", found, f"{places[short_of][1]}  (on a disk with more room)")
        else:
            yield Finding("✓", "disk", found)


def rights(root: Path) -> Iterator[Finding]:
    """A file is made, and gone again, in each place or in the folder that it would be made in."""
    well = []
    for name, (folder, move) in _places(root).items():
        there = _there(folder)
        if not there.is_dir():
            fix = f"mv {short(there)} {short(there)}.old"
            yield Finding("✗", name, f"{short(there)} is a file, where a folder is needed", fix)
            continue
        try:
            with tempfile.TemporaryFile(dir=there):
                well.append(f"{name} ({short(folder)})")
        except OSError as error:
            found = f"{short(there)} cannot be written: {error.strerror}"
            local = name in ("hub cache", "data cache")  # a run from local folders needs neither
            yield Finding("!" if local else "✗", name, found, move)
    if well:
        yield Finding("✓", "may write", ", ".join(well))


def _places(root: Path) -> dict[str, tuple[Path, str]]:
    """Where a run writes, with what moves it."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    from luthier.data.cache import cache_folder

    data = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets"))
    scratch = next((os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), "/tmp")
    return {
        "runs": (root / "runs", "cd FOLDER  (one that is yours)"),
        "hub cache": (Path(HF_HUB_CACHE), "export HF_HOME=FOLDER"),
        "data cache": (data, "export HF_DATASETS_CACHE=FOLDER"),
        "rows cache": (cache_folder(), "export LUTHIER_CACHE=FOLDER"),
        "temporary files": (Path(scratch), "export TMPDIR=FOLDER"),
    }


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.access(place, os.F_OK))
