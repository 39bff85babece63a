"""A real kernel: the notebook of docs/ from its first cell to its last, and a run that is interrupted."""

from __future__ import annotations

import json
import os
import re
import runpy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import start_new_kernel

REPOSITORY = Path(__file__).parent.parent.parent
TOOL = runpy.run_path(str(REPOSITORY / "tools" / "make_notebook.py"))
COPY = """
import shutil, sys, threading
from importlib import resources
import luthier
with resources.as_file(resources.files("luthier") / "assets") as assets:
    shutil.copytree(assets / "quickstart", "quickstart")
    shutil.copytree(assets / "tiny", "quickstart/tiny")
before = threading.active_count()
"""


@pytest.fixture(autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel keeps of its own stays out of the home folder."""
    folder = tmp_path_factory.mktemp("jupyter")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "LUTHIER_CACHE"):
        monkeypatch.setenv(name, str(folder / name))


# -- docs/quickstart.ipynb -------------------------------------------------------------------------------------------


@pytest.mark.full
def test_the_notebook_of_the_docs(tmp_path: Path) -> None:
    cells = [cell for cell in TOOL["execute"](tmp_path).cells if cell.cell_type == "code"]
    found = [output for cell in cells for output in cell.outputs]
    assert [o for o in found if o.output_type == "error" or o.get("name") == "stderr"] == []
    looked, trained, opened, outcome, compared, answers, merged = (cell.outputs for cell in cells[1:])

    assert [o.output_type for o in looked] == ["execute_result"], "it is shown, and nothing is printed beside it"
    assert "480</dd><dt>rows to train on" in looked[0].data["text/html"]
    assert "next: luthier.train(&quot;quickstart/recipe.yaml&quot;)" in looked[0].data["text/html"]

    assert [o.output_type for o in trained] == ["display_data"], "one output, however often it was drawn"
    for shown in (trained[0], opened[0]):
        html = shown.data["text/html"]
        assert 'class="state done">done</span>' in html and "step 30 of 30" in html
        assert "<svg" in html and "<mark>在灰水镇，</mark>托本<mark>带大麦粥</mark>" in html
    assert "sample: What is Jarla&#x27;s job? → Jarla is a carpenter." in trained[0].data["text/html"]
    assert opened[0].data["text/plain"] == "<run runs/quickstart: done, step 30 of 30>"
    steps, best, loss = json.loads(outcome[0].data["text/plain"].replace("(", "[").replace(")", "]"))
    assert (steps, best) == (30, 30) and loss < 0.2

    report = json.loads((tmp_path / "here/runs/quickstart/compare.json").read_text(encoding="utf-8"))["figures"]
    assert [o.output_type for o in compared] == ["stream", "execute_result"]
    assert (
        f"<dd>{100 * report['base']['exact_share']:.3g} % → {100 * report['tuned']['exact_share']:.3g} %</dd>"
        in (compared[1].data["text/html"])
    )
    assert report["tuned"]["exact_share"] > 0.8
    assert answers[0].data["text/plain"] == "['In Windgate, and Zeno brings walnut cake.', '在灰水镇，托本带大麦粥。']"
    assert "quickstart/merged: verified: at 1,0" in merged[0].text
    assert str(tmp_path) not in json.dumps(found)


def test_the_notebook_in_docs_was_executed_and_is_small() -> None:
    text = TOOL["NOTEBOOK"].read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells[1:])
    assert len(text.encode()) < 200_000
    assert re.findall(r"/(?:home|root|tmp|work|Users)/", text) == []


# -- interrupted -----------------------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """A kernel, and what its last cell gave: its reply, each drawing, what it said, its value as HTML."""

    manager: Any
    client: Any
    reply: dict[str, Any] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)
    said: str = ""
    shown: str | None = None

    def run(self, code: str, interrupt: str | None = None) -> str:
        """Run a cell; interrupt it once what it displays matches. Gives what it printed and returned."""
        self.client.execute(code)
        self.drawn, self.said, self.shown, deadline = [], "", None, time.monotonic() + 120
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=120)
            kind, content = message["msg_type"], message["content"]
            if kind in ("display_data", "update_display_data"):
                self.drawn.append(content["data"]["text/html"])
                if interrupt and re.search(interrupt, self.drawn[-1]):
                    self.manager.interrupt_kernel()
                    interrupt = None
            elif kind == "execute_result":
                self.said += content["data"]["text/plain"]
                self.shown = content["data"].get("text/html")
            elif kind == "stream":
                self.said += content["text"]
            elif kind == "error":
                self.said += "\n".join(content["traceback"])
            elif kind == "status" and content["execution_state"] == "idle":
                break
        self.reply = self.client.get_shell_msg(timeout=10)["content"]
        return self.said


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    manager, client = start_new_kernel(cwd=str(tmp_path), env=dict(os.environ))
    yield Kernel(manager, client)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_interrupt_is_a_clean_stop(kernel: Kernel, tmp_path: Path) -> None:
    kernel.run(COPY)
    said = kernel.run(
        'run = luthier.train("quickstart/recipe.yaml", ["train.epochs=400"])\nrun',
        interrupt=r"step [1-9]\d* of 12,000",
    )
    steps = len((tmp_path / "runs/quickstart/metrics.jsonl").read_text().splitlines()) - 1
    assert kernel.reply["status"] == "ok", said
    assert said == f"<run runs/quickstart: stopped, step {steps} of 12,000>"
    assert kernel.shown is None, "the cell shows it already"
    assert 'class="state stopped">stopped</span>' in kernel.drawn[-1]
    assert "luthier.train(&quot;runs/quickstart&quot;, resume=True)" in kernel.drawn[-1]
    assert (tmp_path / f"runs/quickstart/checkpoints/step-{steps:06}").is_dir()
    assert kernel.run("run.outcome.stopped, run.outcome.steps") == f"(2, {steps})"
    assert kernel.run("threading.active_count() - before, 'torch' in sys.modules") == "(0, False)"
    assert kernel.run("run") == said
    assert kernel.shown is not None and "state stopped" in kernel.shown
    said = kernel.run('luthier.train("quickstart/recipe.yaml", ["train.lr=-1"])')
    assert said == "RecipeError: override: train.lr: must be a number > 0 or auto, is -1"
