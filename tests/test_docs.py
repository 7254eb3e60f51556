"""What the build of the documentation takes for granted, found without building it."""

import importlib
import importlib.util
import inspect
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
    text = "A formula,\n\n    a = b\n\nand\n\n- an item\n  goes on\n\n    last"
    fenced = "A formula,\n\n```text\n    a = b\n\n```\n\nand\n\n- an item\n  goes on\n\n"
    assert gallery.as_markdown(text) == fenced + "```text\n    last\n```"


# Results, states and bases, which the examples of what returns or extends them show.
SHOWN_ELSEWHERE = {
    *(
        "BlockGibbs",
        "ChainDiagnostics",
        "CurvatureAdjustment",
        "EnergySite",
        "Finding",
        "FitResult",
    ),
    *(
        "Info",
        "InnerStepsReport",
        "Kernel",
        "MinibatchKernel",
        "Results",
        "Sampler",
        "Site",
        "State",
    ),
}


def public_classes():
    """Every class with an entry on a page of api/: its name and its docstring."""
    for page in sorted((DOCS / "api").glob("*.md")):
        module = "pyro_ebm"
        text = page.read_text(encoding="utf-8")
        for kind, name in re.findall(r"^\.\. (currentmodule|autoclass):: (\S+)", text, re.M):
            if kind == "currentmodule":
                module = name
                continue
            path, _, name = (name if "." in name else f"{module}.{name}").rpartition(".")
            yield name, inspect.getdoc(getattr(importlib.import_module(path), name)) or ""


def test_every_public_class_has_an_example():
    without = {name for name, text in public_classes() if ">>> " not in text}
    assert without == SHOWN_ELSEWHERE


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
@pytest.mark.filterwarnings("error:these draws may be wrong")
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(page, tmp_path, monkeypatch):
    """Without a warning: one that a tutorial shows is caught by its cell."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for code in cells(page):
        exec(compile(code, str(page), "exec"), namespace)
