"""Write docs/recipe.md from the recipe's own vocabulary: `.venv/bin/python tools/make_docs.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from luthier.foreign import FOREIGN, FOREIGN_VALUES, FUTURE_KEYS, FUTURE_VALUES
from luthier.vocabulary import branches, expected, keys_below, node_of
from luthier.yamlfile import Key, dotted, write_value

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"

HEAD = """\
# The recipe

<!-- Written by tools/make_docs.py from src/luthier/sections.py and foreign.py. Edit those, then run it. -->

A recipe is one YAML file that says everything a run is made of. Two keys are required; all others have a default.

```yaml
model:
  name: hf:Qwen/Qwen2.5-0.5B-Instruct
data:
  train: data.jsonl
```

`luthier recipe new` prints one to start from, `luthier recipe show FILE` the recipe with every default filled in,
`luthier recipe schema` the JSON Schema for editors.

- **Strict.** A key that is not below, a value out of its bounds, two keys that contradict each other and a key that
  has no effect are errors. All are told at once, each with its line, and nothing is loaded before they are put right.
- **Overrides.** `key=value` behind the recipe on the command line, the value written as YAML: `train.lr=1e-4`,
  `generate.prompts='[Who are you?, 你是谁]'`, `data.columns.prompt='[instruction, input]'`, `train.epochs=null`.
- **Paths** are relative to the recipe's file, in overrides as well. `hf:` and `modelscope:` names are fetched.
- **YAML 1.2.** `2e-4` is a number; `yes`, `no`, `on` and `off` are texts, and a boolean is `true` or `false`.
- **Saved.** A run's folder holds `recipe.yaml` with every default filled in; it is a recipe like any other.
"""

FOREIGN_HEAD = """\
## Coming from another tool

A key of another tool, wherever it stands in a recipe, is answered with its translation.
"""


def recipe_page() -> str:
    """The whole page, as Markdown."""
    sections = [name for name in keys_below(()) or [] if keys_below((name,))]
    parts = [HEAD, "## Every key\n", _table(("key", "takes", "default", ""), [_row(("run",)), _row(("track",))])]
    for section in sections:
        parts += [f"### {section}\n", _about(node_of((section,))) + "\n", _keys((section,))]
        if section == "data":
            columns, file = branches(node_of(("data", "columns")))[0], branches(node_of(("data", "train", 0)))[1]
            parts += ["`data.columns`: " + _about(columns).lower() + "\n", _keys(("data", "columns"))]
            parts += ["An item of the list `data.train`: " + _about(file).lower() + "\n", _keys(("data", "train", 0))]
        if section == "model":
            keys = branches(node_of(("model", "quantize")))[1]
            parts += ["`model.quantize` as keys: " + _about(keys).lower() + "\n", _keys(("model", "quantize"))]
    theirs = [(f"`{name}`", said.tools, _cell(said.here)) for name, said in FOREIGN.items()]
    words = [
        (f"`{key}`", f"`{word}`", _cell(here)) for key, said in FOREIGN_VALUES.items() for word, here in said.items()
    ]
    later = [f"`{key}`" for key in FUTURE_KEYS]
    later += [f"`{key}: {value}`" for key, values in FUTURE_VALUES.items() for value in sorted(values)]
    parts += [FOREIGN_HEAD, _table(("there", "called so by", "here"), theirs)]
    parts += ["Words for values:\n", _table(("key", "there", "here"), words)]
    parts += ["## Not in this version yet\n", ", ".join(later) + ".\n"]
    return "\n".join(parts)


def _keys(key: Key) -> str:
    return _table(("key", "takes", "default", ""), [_row((*key, name)) for name in keys_below(key) or []])


def _row(key: Key) -> tuple[str, ...]:
    node = node_of(key)
    if key == ("train", "epochs"):
        default = "`1.0`, or `null` with `steps`"
    elif key == ("train", "betas"):
        default = "`[0.9, 0.999]`, with lion_8bit `[0.9, 0.99]`"
    else:
        default = f"`{write_value(node['default'])}`" if "default" in node else "required"
    return f"`{dotted(key)}`", _cell(expected(node)), default, _cell(_about(node))


def _about(node: dict[str, str]) -> str:
    found = node if "description" in node else branches(node)[0]
    return " ".join(found["description"].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(recipe_page(), encoding="utf-8")
    print(f"{PAGE} written")
