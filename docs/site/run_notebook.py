#!/usr/bin/env python
"""Execute the notebook and keep what it shows: `python docs/site/run_notebook.py`."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks/look_inside.ipynb"


def executed(path: Path = NOTEBOOK) -> nbformat.NotebookNode:
    """The notebook with fresh results, executed in its folder by the interpreter that runs this."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=540, resources={"metadata": {"path": path.parent}}).execute()
    for cell in notebook.cells:
        # times and versions of this machine
        cell.metadata.pop("execution", None)
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return notebook


def main() -> int:
    nbformat.write(executed(), NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
