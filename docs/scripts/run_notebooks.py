"""Run the notebooks of docs/notebooks and keep what they print and show: `python docs/scripts/run_notebooks.py`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"


def run(file: Path) -> NotebookNode:
    """The notebook after a run from top to bottom, without warnings, progress bars and second copies of pictures.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message holds its code and traceback.
    """
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": file.parent}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)
    return notebook


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(run(path), path)
