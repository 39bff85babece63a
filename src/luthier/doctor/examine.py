"""`luthier doctor`: what keeps a run from starting here, and the one command or setting that helps.

In the order of repair: Python and its libraries, the machine, the settings, then what has to be tried out, and the
hubs, which are asked meanwhile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.doctor import reach
from luthier.doctor.finding import Finding, reason
from luthier.doctor.libraries import libraries
from luthier.doctor.machine import disks, memory, processor, python, rights
from luthier.doctor.probe import stages
from luthier.doctor.settings import OFFLINE, is_on, settings
from luthier.doctor.trial import tried
from luthier.html import visible

if TYPE_CHECKING:
    from rich.console import Console

WHAT = 15
"""Columns of the screen for what a line is about."""
COLOURS = {"✓": "green", "!": "yellow", "✗": "bold red"}
PLAIN = {"✓": "+", "!": "!", "✗": "x"}
"""The marks for a screen that has no others."""
IN_JSON = {"✓": "ok", "!": "warn", "✗": "fail"}


def examine(root: Path, *, online: bool = True) -> Iterator[Finding]:
    """Findings as they are known, the slow ones last. `root`: where the folder of runs would be.

    `online`: ask the hubs as well, for six seconds at most, unless the environment says that they are not to be asked.
    """
    silent = next((name for name in OFFLINE if is_on(name)), None)
    asked = online and silent is None
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "Python": python,
        "libraries": libraries,
        "processor": processor,
        "memory": memory,
        "disk": partial(disks, root),
        "may write": partial(rights, root),
        "settings": partial(settings, asked),
    }
    for what, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # on a broken machine anything may fail: the other checks still tell
            fix = "see the ✗ lines; where there are none: pip install --force-reinstall luthier"
            yield Finding("!", what, f"could not be looked at: {reason(error)}", fix)
    silent = next((name for name in OFFLINE if is_on(name)), None)
    answers = reach.ask(reach.to_ask()) if asked else None
    yield from tried(stages())
    if answers is not None:
        yield from reach.findings(answers())
    elif online:
        yield Finding("✓", "hubs", f"not asked: {silent} is set")


def report(root: Path, *, online: bool = True, as_json: bool = False) -> int:
    """Print the findings; the exit status: 1 where a run could not start, else 0."""
    show = _as_json if as_json else _on_screen
    bad = show(examine(root, online=online))
    return 1 if bad else 0


def _as_json(findings: Iterator[Finding]) -> int:
    """A JSON object a line, the verdict last; how many keep a run from starting."""

    def tell(**line: str) -> None:
        print(json.dumps(line, ensure_ascii=False), flush=True)

    bad = 0
    for finding in findings:
        bad += finding.mark == "✗"
        tell(**finding._asdict() | {"mark": IN_JSON[finding.mark]})
    tell(mark="fail" if bad else "ok", what="verdict", found=_verdict(bad), fix="")
    return bad


def _verdict(bad: int) -> str:
    if not bad:
        return "a run can start here"
    return "1 thing keeps a run from starting" if bad == 1 else f"{bad} things keep a run from starting"


def _on_screen(findings: Iterator[Finding]) -> int:
    """Aligned lines, and the verdict; how many keep a run from starting."""
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    console = Console(highlight=False)
    marks = {mark: mark for mark in PLAIN} if _can_show("✓✗") else PLAIN
    spinner = Spinner("dots", "looking …")
    bad = 0
    # standard output stays as it is: rich's own, which it would put there, has no encoding to look at
    with Live(spinner, console=console, transient=True, redirect_stdout=False, redirect_stderr=False):
        for finding in findings:
            bad += finding.mark == "✗"
            _print(console, finding, marks[finding.mark])
    which = f": fix the {marks['✗']} line{'s from the top' * (bad > 1)}" if bad else ""
    console.print(_verdict(bad) + which, style=COLOURS["✗" if bad else "✓"])
    return bad


def _print(console: Console, finding: Finding, mark: str) -> None:
    """One finding. What to do stands on one line, however long, so that it can be copied."""
    from rich.text import Text

    start = Text.assemble((mark, COLOURS[finding.mark]), f" {visible(finding.what):{WHAT}} ")
    for row in Text(visible(finding.found)).wrap(console, max(20, console.width - WHAT - 3)):
        row.rstrip()
        console.print(start + row, soft_wrap=True)
        start = Text(" " * (WHAT + 3))
    if finding.fix:
        console.print(Text(f"    fix: {visible(finding.fix)}", style=COLOURS[finding.mark]), soft_wrap=True)


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
