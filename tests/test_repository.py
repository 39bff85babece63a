"""The promises that the repository makes about itself: what is installed, what README says, who imports whom."""

from __future__ import annotations

import ast
import os
import re
import resource
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent
SOURCE = REPOSITORY / "src" / "luthier"
LUTHIER = Path(sys.executable).parent / "luthier"

# Imports go only downward: a module imports from lines above its own, or from its own package.
ORDER = [
    {"errors", "words"},
    {"sections"},
    {"folder", "hub", "html", "quiet", "foreign", "yamlfile", "replies", "methods"},
    {"history", "scores", "matrix"},
    {"data", "vocabulary", "conflicts"},
    {"engine", "checks"},
    {"models"},
    {"generate"},
    {"training"},
    {"rehearsal", "structure"},
    {"recipe", "loaded"},
    {"resume", "runs"},
    {"view"},
    {"workbench"},
    {"run"},
    {"plan", "compare", "merge", "verify", "doctor"},
    {"plantext", "export", "strength"},
    {"judge"},
    {"bakeoff", "verbs"},
    {"cli"},
    {"__init__", "__main__"},
]
UPWARD = {"run.py imports luthier.verbs", "replies.py imports luthier.view.notebook"}  # methods: imported when called
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


# What is installed


def test_no_cuda_without_a_driver() -> None:
    if runpy.run_path(str(REPOSITORY / "tools" / "setup.py"))["has_nvidia_driver"]():
        pytest.skip("an NVIDIA driver is there: torch is the CUDA build")
    names = {canonicalize_name(distribution.metadata["Name"]) for distribution in distributions()}
    names.discard("nvidia-ml-py")  # reads a card's state through its driver: Python alone, without CUDA
    assert {name for name in names if name.startswith(("nvidia-", "cuda-"))} == set()


def test_constraints_lie_within_the_bounds() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = project_table()
    tested = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    requirements = [requirement for requirement in map(Requirement, tested) if requirement.name != "luthier"]
    outside = [
        f"{requirement} (constraints.txt: {pins.get(canonicalize_name(requirement.name), 'not there')})"
        for requirement in requirements
        if pins.get(canonicalize_name(requirement.name), "") not in requirement.specifier
    ]
    assert outside == []


def test_what_is_imported_is_a_stated_requirement() -> None:
    project = project_table()
    stated = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    named = {"pydantic-core", "mlflow"}  # pinned by pydantic; what mlflow-skinny is imported as
    names = {canonicalize_name(Requirement(line).name) for line in stated} | named
    owners = packages_distributions()
    unstated = {
        f"{path.relative_to(SOURCE)}: {package}"
        for path in sources()
        for package in {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names - {"luthier"}
        if names.isdisjoint(map(canonicalize_name, owners.get(package, [package])))
    }
    assert unstated == set()


# What the source promises


def test_no_file_passes_400_lines() -> None:
    lengths = {str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_imports_go_only_downward() -> None:
    upward = set()
    for path in sources():
        here = path.relative_to(SOURCE).with_suffix("").parts[0]
        assert here in RANK, f"{here} has no place in ORDER: give it one, here and in the README"
        for module in imports(path):
            there = (module.split(".") + ["__init__"])[1]
            if module.split(".")[0] == "luthier" and there != here and RANK[there] >= RANK[here]:
                upward.add(f"{path.relative_to(SOURCE)} imports {module}")
    assert upward <= UPWARD


def test_data_knows_neither_torch_nor_transformers() -> None:
    known = {
        f"{path.name} imports {module}"
        for path in (SOURCE / "data").glob("*.py")
        for module in imports(path)
        if module.split(".")[0] in {"torch", "transformers"}
    }
    assert known == set()


@pytest.mark.parametrize(
    "statement",
    [
        "import luthier",
        "from luthier.cli.main import main; import contextlib\nwith contextlib.suppress(SystemExit): main()",
        "import luthier.view.runsview",
    ],
    ids=["import", "--help", "the list of runs"],
)
def test_the_start_imports_nothing_heavy(statement: str) -> None:
    """pydantic takes a tenth of a second."""
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'pandas', 'pyarrow', 'pydantic'}"
    code = f"import sys\n{statement}\nprint('\\nheavy:', sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_takes_under_half_a_second() -> None:
    """Processor time, best of three: the machine may be busy."""
    assert min(processor_seconds([LUTHIER, "--help"]) for _ in range(3)) < 0.5


# What the README promises


def test_readme_lists_every_file_and_no_other() -> None:
    tree = readme_tree()
    assert [name for name in tree if not (REPOSITORY / name).exists()] == []
    parents = {name for name in tree if any(other != name and other.startswith(name) for other in tree)}
    assert [name for name in tree if not tree[name] and name not in parents] == [], "these have no comment"
    whole = tuple(name for name in tree if name.endswith("/") and name not in parents)
    there = [path for path in SOURCE.rglob("*") if path.is_file() and path.stat().st_size and path.suffix != ".pyc"]
    names = {str(path.relative_to(REPOSITORY)) for path in there}
    assert {name for name in names if name not in tree and not name.startswith(whole)} == set()


def test_readme_commands_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    commands = readme_commands()
    made = {words[1] for words in commands if words[0] == "make" and "=" not in words[1]}
    assert {"quickstart", "test", "check", "test-full"} <= made
    assert made - targets == set()
    verbs = {
        " ".join(words[1:3] if words[1] == "recipe" else words[1:2]) for words in commands if words[0] == "luthier"
    }
    assert {"look", "train", "generate", "compare", "merge", "quickstart"} <= verbs
    unknown = [verb for verb in sorted(verbs) if not is_verb(verb)]
    assert unknown == []


def test_readme_recipes_load(tmp_path: Path) -> None:
    from luthier.recipe import load_recipe

    recipes = [block for block in readme_blocks("yaml") if re.search(r"^model:", block, re.MULTILINE)]
    assert recipes, "the README explains no recipe (a ```yaml block with `model:`)"
    for recipe in recipes:
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe, encoding="utf-8")
        load_recipe(path, check_files=False)


def test_ci_can_be_run_from_anywhere() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make check" in script.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


# Readers


def project_table() -> dict[str, dict]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """All that a file imports, also inside functions but not for types alone; `from luthier import x` is luthier.x."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (
                [f"luthier.{alias.name}" for alias in node.names] if node.module == "luthier" else [str(node.module)]
            )
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def processor_seconds(command: list[str | Path]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def readme_blocks(language: str) -> list[str]:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def readme_tree() -> dict[str, str]:
    """Path from the root -> comment, from the ```text block that begins with src/luthier/.

    One file or folder (with a / at its end) a line, two blanks deeper than its folder, then its comment. A folder with
    nothing listed below it stands for all that is in it.
    """
    block = next(block for block in readme_blocks("text") if block.startswith("src/luthier/"))
    tree: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        depth, odd = divmod(len(line) - len(line.lstrip()), 2)
        assert not odd and depth <= len(folders), f"README's tree: indent by two blanks a level: {line!r}"
        name, _, comment = line.strip().partition(" ")
        folders[depth:] = [name]
        tree["".join(folders)] = comment.strip()
    return tree


def readme_commands() -> list[list[str]]:
    """The words of every `luthier …` and `make …` that is a code span, or a line of a console or bash block."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = [line for block in readme_blocks("(?:console|bash)") for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", readme, flags=re.MULTILINE | re.DOTALL))
    starts = [
        re.fullmatch(r"(?:\$ )?(?:\.venv/bin/)?((?:luthier|make) [a-z].*)", text.strip()) for text in lines + spans
    ]
    return [start.group(1).split() for start in starts if start]


def is_verb(verb: str) -> bool:
    return subprocess.run([LUTHIER, *verb.split(), "--help"], capture_output=True).returncode == 0
