"""What the build of the documentation takes for granted, found without building it."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("[0-9]*.md"))
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```", re.M | re.S)


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
