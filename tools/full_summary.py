"""Writes the summary of a full test run, which is committed as tests/FULL.md.

python tools/full_summary.py build/test-full.xml tests/FULL.md
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tomllib
from collections import Counter
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent


def summary(report: str, machine: str) -> str:
    """Markdown of a JUnit report: counts, duration, what failed, skips and reasons, the ten slowest tests."""
    suite = ElementTree.fromstring(report)[0]
    tests = suite.findall("testcase")
    failed = [name(test) for test in tests if test.find("failure") is not None or test.find("error") is not None]
    skips = Counter(
        f"`{file(test)}`: {skipped.get('message')}" for test in tests if (skipped := test.find("skipped")) is not None
    )
    slowest = sorted(tests, key=lambda test: -float(test.get("time", 0)))[:10]
    passed = len(tests) - len(failed) - skips.total()
    minutes, seconds = divmod(round(float(suite.get("time", 0))), 60)
    when = datetime.fromisoformat(suite.get("timestamp", "")).date()
    return "\n".join(
        [
            "# The full test run",
            "",
            f"`make test-full` on {when}: **{passed} passed, {len(failed)} failed, {skips.total()} skipped**"
            f" in {minutes} min {seconds} s.",
            machine,
            *section("Failed", [f"`{test}`" for test in failed]),
            *section("Skipped", [f"{count} in {skip}" for skip, count in skips.items()]),
            *section("Slowest", [f"{float(test.get('time', 0)):.0f} s `{name(test)}`" for test in slowest]),
            "",
        ]
    )


def section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", *[f"- {line}" for line in lines or ["none"]]]


def file(test: ElementTree.Element) -> str:
    return test.get("classname", "").removeprefix("tests.")


def name(test: ElementTree.Element) -> str:
    return f"{file(test)}.{test.get('name')}"


def machine() -> str:
    """The platform, and the versions of what Luthier depends on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[<>=\[]", requirement)[0] for requirement in project["dependencies"]]
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{system}; {versions}."


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(summary(source.read_text(encoding="utf-8"), machine()), encoding="utf-8")
    print(f"Summary in {target}")
