"""The documentation site builds without warnings, its notebooks have outputs, and the quickstart runs."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
PLUGINS = ("mkdocs", "material", "mkdocstrings_handlers", "mkdocs_jupyter", "latex2mathml")


def cells(path: Path) -> list[dict]:
    """Returns the code cells of a notebook that contain code."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with every warning as an error."""
    if missing := [name for name in PLUGINS if find_spec(name) is None]:
        pytest.skip(f'not installed: {", ".join(missing)}; pip install ".[docs]"')
    out = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return out


def test_every_public_name_is_in_the_reference(site):
    import rlsedit_fast

    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    found = set(re.findall(r'id="rlsedit_fast\.(?:\w+\.)*(\w+)"', pages))
    assert set(rlsedit_fast.__all__) - {"__version__"} <= found


def test_formulas_are_mathml(site):
    page = (site / "mathematics.html").read_text(encoding="utf-8")
    assert page.count("<math") > 50
    assert "\\(" not in page
    assert 'class="arithmatex"' not in page


def test_pages_load_nothing_from_other_hosts(site):
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]+src="(https?:)?//[^"]*"|<link[^>]+href="https?://[^"]*\.(?:css|js)'
    )
    for page in site.rglob("*.html"):
        assert not (found := loaded.search(page.read_text(encoding="utf-8"))), (page.name, found[0])


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"edit", "store", "calibrate", "rules", "serve"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_executed_in_order_without_errors(path):
    code = cells(path)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    for output in outputs:
        assert output["output_type"] != "error", output.get("evalue")
        assert output.get("name") != "stderr", "".join(output["text"])[:500]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_imports_exist(path):
    import importlib

    for cell in cells(path):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlsedit_fast"):
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    said = capsys.readouterr().out
    assert "banjo True" in said
    assert [record.state for record in names["editor"].history()] == ["replaced", "undone", "active"]
    for path in ("edited/model.safetensors", "edits.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / path).exists()
