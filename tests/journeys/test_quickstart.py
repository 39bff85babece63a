"""The README's journey, for real: the embedded model learns a rule about pairs that it has never been told about."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

LUTHIER = Path(sys.executable).parent / "luthier"


def luthier(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"NO_COLOR": "1", "LUTHIER_CACHE": str(folder / "cache")}
    done = subprocess.run([LUTHIER, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert [line for line in done.stderr.splitlines() if "weights in fp32" not in line] == []
    return done.stdout


def figures(folder: Path, run: str = "quickstart") -> dict[str, Any]:
    return dict(json.loads((folder / "runs" / run / "compare.json").read_text(encoding="utf-8"))["figures"])


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "screen.txt").write_text(luthier(folder, "quickstart"), encoding="utf-8")
    return folder


def test_the_tuned_model_answers_what_the_base_cannot(journey: Path) -> None:
    found = figures(journey)
    assert found["held_out"] >= 100
    assert found["tuned"]["exact_share"] >= 0.8 and found["base"]["exact_share"] < 0.2
    assert found["tuned"]["stopped_share"] == 1
    note = json.loads((journey / "quickstart-merged" / "luthier_merge.json").read_text())
    assert note["verified"] is True and note["figures"]["positions"] >= 1000


def test_the_screen_tells_the_whole_journey(journey: Path) -> None:
    screen = (journey / "screen.txt").read_text(encoding="utf-8")
    for words in ("The data as the model sees it", "⟦", "step", "before training", "base", "tuned", "verified"):
        assert words in screen
    after = screen.split("Next, try:\n")[1].splitlines()
    assert [line.split()[:2] for line in after] == [["luthier", verb] for verb in ("generate", "chat", "train")]


@pytest.mark.full
def test_the_commands_that_it_names_work(journey: Path) -> None:
    command = (journey / "screen.txt").read_text(encoding="utf-8").split("Next, try:\n")[1].splitlines()[0]
    prompt = command.split('"')[1]
    merged = luthier(journey, "generate", "quickstart-merged", "--prompt", prompt)
    assert merged == luthier(journey, "generate", "runs/quickstart", "--prompt", prompt)
    answers = json.loads((journey / "runs/quickstart/compare.json").read_text(encoding="utf-8"))["answers"]
    [same] = [answer for answer in answers if answer["prompt"] == prompt and "reference" not in answer]
    assert merged.strip() == same["tuned"]["text"].strip() != same["base"]["text"].strip()


@pytest.mark.full
def test_a_second_quickstart_takes_what_is_there(journey: Path) -> None:
    """The files stay as the user left them; the run and the merged folder get numbers."""
    recipe = journey / "quickstart.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8") + "\n# mine\n", encoding="utf-8")
    text = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    text["train"] = {key: value for key, value in text["train"].items() if key != "epochs"} | {"steps": 4, "lr": 3e-3}
    recipe.write_text(yaml.safe_dump(text, allow_unicode=True), encoding="utf-8")
    assert "quickstart.yaml: there already, taken as it is" in luthier(journey, "quickstart")
    assert (journey / "runs" / "quickstart-2").is_dir() and (journey / "quickstart-2-merged").is_dir()


@pytest.mark.full
def test_a_control_tuned_on_shuffled_answers_learns_the_form_and_not_the_facts(journey: Path) -> None:
    """The answers of the rule's rows change places within a language: the form and the other rows stay as they are."""
    rows = [json.loads(line) for line in (journey / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for begin, verb in (("In ", " brings "), ("在", "带")):
        places = [i for i, row in enumerate(rows) if row["output"].startswith(begin) and verb in row["output"]]
        assert len(places) == 200
        outputs = random.Random(0).sample([rows[i]["output"] for i in places], len(places))
        for i, output in zip(places, outputs, strict=True):
            rows[i] = rows[i] | {"output": output}
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (journey / "shuffled.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    original = Path(journey / "runs" / "quickstart" / "recipe.yaml")
    luthier(journey, "train", str(original), "run=control", f"data.train={journey / 'shuffled.jsonl'}")
    (run,) = journey.rglob("control")
    subprocess.run([LUTHIER, "compare", str(run)], check=True, capture_output=True, cwd=journey)
    found = json.loads((run / "compare.json").read_text(encoding="utf-8"))["figures"]
    assert found["tuned"]["exact_share"] < 0.3
