"""What a user does in a shell: the luthier command in an empty folder with a tiny real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tiny import tiny_llama

LUTHIER = Path(sys.executable).parent / "luthier"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"}


def luthier(folder: Path, *arguments: str | Path, said: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LUTHIER, *map(str, arguments)], cwd=folder, env=ENVIRONMENT, input=said or "", capture_output=True, text=True
    )


def well(folder: Path, *arguments: str | Path, said: str | None = None) -> str:
    """The output of a verb that ends well, with nothing of our dependencies on the error stream."""
    done = luthier(folder, *arguments, said=said)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    return done.stdout


def begin(folder: Path, **changes: Any) -> Path:
    """A folder with a tiny model, 24 rows and a recipe; `changes` go into the recipe's sections."""
    tiny_llama(folder / "model")
    rows = [{"prompt": f"Where is {i}?", "response": f"In town {i % 3}."} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "model": {"name": "./model"},
        "data": {"train": "rows.jsonl", "eval": 4, "max_length": 64},
        "method": {"r": 4, "dropout": 0.1},
        "train": {"batch": 6, "steps": 8, "lr": 5e-3, "eval_every": 4, "save_every": 2, "warmup": 0},
        "generate": {"prompts": ["Where is 7?", "你好，谁？"], "max_new_tokens": 8},
    }
    for section, values in changes.items():
        recipe[section] = recipe.get(section, {}) | values
    path = folder / "town.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True))
    return path
