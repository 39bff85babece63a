"""Execute docs/quickstart.ipynb anew and write it with its outputs: .venv/bin/python tools/make_notebook.py

It runs in an empty folder, whose path is in none of the outputs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"
SECONDS = 300  # for a cell


def execute(folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a real kernel that works in `folder`/here. Errors: CellExecutionError."""
    here = folder.resolve() / "here"
    here.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, record_timing=False, coalesce_streams=True)
    client.resources = {"metadata": {"path": str(here)}}
    client.execute(env=os.environ | {"LUTHIER_CACHE": str(folder / "cache"), "IPYTHONDIR": str(folder / "ipython")})
    text = nbformat.writes(notebook).replace(f"{here}/", "")
    return nbformat.reads(text, as_version=4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        NOTEBOOK.write_text(nbformat.writes(execute(Path(scratch))) + "\n", encoding="utf-8")
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size / 1000:,.0f} kB")
