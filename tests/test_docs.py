"""What the build of the documentation takes for granted, found without building it."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("[0-9]*.md"))
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```", re.M | re.S)

spec = importlib.util.spec_from_file_location("gallery", DOCS / "_ext" / "gallery.py")
gallery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gallery)
EXAMPLES = {path.stem for path in gallery.EXAMPLES.glob("*.py")}


def test_every_example_is_in_the_gallery():
    """In a group of gallery.py, with the output of a run: `make gallery` makes it."""
    assert len(gallery.names()) == len(set(gallery.names()))
    assert set(gallery.names()) == EXAMPLES
    missing = [name for name in gallery.names() if not gallery.kept(name)]
    assert not missing, f"make gallery NAMES={' '.join(missing)!r}"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_page_of_an_example(name):
    text = gallery.page(name)
    title, _ = gallery.docstring(name)
    assert text.startswith(f"# {title}\n")
    assert text.count("```") % 2 == 0
    assert gallery.kept(name)["command"] in text
    assert (gallery.KEPT / f"{name}.txt").read_text().strip()
    draws = '"--output"' in (gallery.EXAMPLES / f"{name}.py").read_text()
    assert (f"{name}.png)" in text) == draws


def test_indented_lines_of_a_docstring_keep_their_shape():
    text = "A formula,\n\n    a = b\n\nand a word.\n\n    last"
    fenced = "A formula,\n\n```text\n    a = b\n\n```\n\nand a word.\n\n```text\n    last\n```"
    assert gallery.as_markdown(text) == fenced


def cells(page):
    """The code of a notebook in MyST Markdown, without the options of its cells."""
    found = CELL.findall(page.read_text(encoding="utf-8"))
    return [re.sub(r"^(:.*\n|---\n.*?---\n)+", "", code, flags=re.S) for code in found]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_is_a_notebook_that_can_be_downloaded(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("---\n")
    assert "format_name: myst" in text
    assert "kernelspec" in text
    assert f"{{nb-download}}`Download this notebook <{page.stem}.ipynb>`" in text
    assert cells(page)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_imports_of_a_tutorial(page):
    """The build runs its cells; here a name that has gone is found at once."""
    lines = "\n".join(cells(page))
    for statement in re.findall(r"^(?:from|import) [^(\n]+$|^from [^\n]+\(\n[^)]*\)", lines, re.M):
        exec(statement, {})


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for code in cells(page):
        exec(compile(code, str(page), "exec"), namespace)
