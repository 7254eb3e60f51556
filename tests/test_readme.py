"""The Python blocks of the README and of the pages in docs/ run, in order, as a reader types."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted([*DOCS.glob("*.md"), *DOCS.glob("coming_from/*.md")])]

FENCE = re.compile(r"^(?P<indent> *)```python[ \t]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)


def blocks(text: str) -> list[tuple[int, str]]:
    """The ```python blocks of a page: (first line number, code), the code at column 0."""
    found = []
    for match in FENCE.finditer(text):
        margin = len(match["indent"])
        code = "".join(line[margin:] for line in match["code"].splitlines(keepends=True))
        found.append((text.count("\n", 0, match.start("code")) + 1, code))
    return found


def run(page: Path) -> None:
    """Execute a page's blocks in one namespace; an error points at the page's own line."""
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page.read_text(encoding="utf-8")):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.filterwarnings("error:these draws may be wrong")
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p.read_text(encoding="utf-8"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block that writes a file leaves nothing behind
    run(page)


def test_the_readme_has_an_example():
    assert blocks(PAGES[0].read_text(encoding="utf-8"))


def test_blocks_share_a_namespace_and_errors_say_where(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```python\na = 1\n```\n\n- item\n  ```python\n  assert a == 2\n  ```\n"
    )
    assert blocks(page.read_text()) == [(4, "a = 1\n"), (9, "assert a == 2\n")]
    with pytest.raises(AssertionError) as caught:
        run(page)
    assert caught.traceback[-1].lineno + 1 == 9
