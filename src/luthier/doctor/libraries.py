"""What is installed: against the bounds of pyproject.toml, and against what the tests ran on. Nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version

from luthier.doctor.driver import TORCH, find_driver
from luthier.doctor.finding import Finding

TESTED = {
    "torch": TORCH, "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0", "datasets": "5.2.0",
    "pyarrow": "26.0.1", "numpy": "2.4.6", "tokenizers": "0.23.3", "safetensors": "0.8.0", "sentencepiece": "0.2.3",
    "huggingface-hub": "2.4.0", "pydantic": "2.14.3", "pyyaml": "6.0.3", "typer": "0.29.2", "rich": "15.0.0",
    "jinja2": "3.1.6", "filelock": "4.2.11", "psutil": "7.2.2", "nvidia-ml-py": "13.615.71",
}  # fmt: skip
"""What the tests ran on: constraints.txt, which an installed Luthier does not have beside it."""


def libraries() -> Iterator[Finding]:
    """The requirements, the extras, and a package that should not be there."""
    try:
        lines = distribution("luthier").requires or []
    except PackageNotFoundError:
        yield Finding("✗", "luthier", "not installed: nothing says which libraries it needs", "pip install -e .")
        return
    yield from _requirements([_parted(line) for line in lines if "extra ==" not in line])
    yield from _extras(lines)
    if old := installed("pynvml"):
        fix = "pip uninstall -y pynvml && pip install nvidia-ml-py"
        yield Finding("!", "pynvml", f"{old}: torch warns of it; nvidia-ml-py has taken its place", fix)


def _requirements(needed: list[tuple[str, str]]) -> Iterator[Finding]:
    well, other = 0, []
    for name, bounds in needed:
        found = installed(name)
        if found is None or not within(found, bounds):
            fix = find_driver().torch_line() if name == "torch" else f"pip install '{name}{bounds}'"
            yield Finding("✗", name, f"{found or 'not installed'}; needed: {bounds}", fix)
            continue
        well += 1
        if name in TESTED and _numbers(found) != _numbers(TESTED[name]):
            other.append(f"{name} {found} ({TESTED[name]})")
    if well:
        count = f"all {well}" if well == len(needed) else f"{well} of {len(needed)}"
        tested = f"; other than tested: {', '.join(other)}" if other else ", as tested"
        yield Finding("✓", "versions", f"{count} libraries within their bounds{tested}")


def _extras(lines: list[str]) -> Iterator[Finding]:
    """The optional packages: which are there, what brings the others, and those outside their bounds."""
    extras: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        if (extra := re.search(r"extra == ['\"]([\w-]+)", line)) and extra[1] != "dev":
            extras.setdefault(extra[1], []).append(_parted(line))
    there, absent = [], []
    for extra_name, packages in extras.items():
        found = [(name, installed(name), bounds) for name, bounds in packages]
        for name, has, bounds in found:
            if has and not within(has, bounds):
                yield Finding("!", name, f"{has}; {extra_name} needs {bounds}", f"pip install '{name}{bounds}'")
        names = [name for name, has, _ in found if has]
        lacks = [name for name, has, _ in found if not has]
        if names:
            there.append(f"{extra_name} ({', '.join(names)}{'; not ' * bool(lacks)}{', '.join(lacks)})")
        else:
            absent.append(extra_name)
    brings = f"not there: {', '.join(absent)} (as: pip install 'luthier[{absent[0]}]')" if absent else ""
    yield Finding("✓", "extras", "; ".join(filter(None, [", ".join(there), brings])))


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is not there, or only its ruins are."""
    try:
        return version(name) or None
    except PackageNotFoundError:
        return None


def within(found: str, bounds: str) -> bool:
    """Does a version lie within bounds as ours are written (">=5.17,<6")? A pre-release counts as its release."""
    limits = re.findall(r"(>=|<)([\d.]+)", bounds)
    return all((_numbers(found) >= _numbers(limit)) == (sign == ">=") for sign, limit in limits)


def _parted(requirement: str) -> tuple[str, str]:
    """("numpy", ">=2,<3") of a line of the metadata, where the bounds' order is anyone's."""
    name = re.split(r"[^\w.-]", requirement)[0]
    bounds = re.findall(r"[<>=~!]+[\d.*]+", requirement.partition(";")[0])
    return name.lower(), ",".join(sorted(bounds, reverse=True))


def _numbers(text: str) -> tuple[int, ...]:
    """2.13.0+cpu → (2, 13): trailing zeros mean nothing."""
    release = re.match(r"[\d.]*", text)
    numbers = [int(part) for part in (release[0] if release else "").split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
