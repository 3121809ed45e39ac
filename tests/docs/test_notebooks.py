"""The notebooks of examples/ are clean, use what pages say, and run."""

import ast
import importlib
import json
import re

import pytest

import stemtomo
from tests.docs.blocks import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def by_name(path):
    return path.stem


def code(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_every_notebook_is_on_a_page():
    page = (ROOT / "docs" / "howto" / "notebooks.md").read_text(encoding="utf-8")
    assert {f"{path.stem}.ipynb" for path in NOTEBOOKS} == set(re.findall(r"`(\w+\.ipynb)`", page))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_notebooks_hold_no_outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_notebooks_name_what_is_there_and_what_pages_tell(path):
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    for node in ast.walk(ast.parse(code(path))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "stemtomo":
            assert node.attr in stemtomo.__all__
            assert f"stemtomo.{node.attr}" in pages, f"stemtomo.{node.attr} is on no page"
        if isinstance(node, ast.ImportFrom) and node.module.startswith("stemtomo"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
    linked = re.findall(r"`(docs/[\w/]+\.md)`", path.read_text(encoding="utf-8"))
    assert linked
    assert all((ROOT / page).is_file() for page in linked)


@pytest.mark.heavy
@pytest.mark.timeout(900)  # a minute or two on an idle machine
@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_notebooks_run(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    errors = [out for cell in notebook.cells for out in cell.get("outputs", ()) if out["output_type"] == "error"]
    assert not errors
    assert list(tmp_path.iterdir()) == []  # nothing is left beside the notebook
