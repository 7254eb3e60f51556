"""What a release says of itself: one version, links that work anywhere, forms and workflows."""

import re
import tomllib
import zipfile
from datetime import date

import pytest
import yaml

import pyro_ebm
from tests.packaging.__main__ import constraints, version
from tests.packaging.contents import ROOT, package_files, wheel_complaints

SITE = "https://pyro-ebm.readthedocs.io/en/latest/"
REPOSITORY = "https://github.com/pyro-ebm/pyro_ebm"
RAW = "https://raw.githubusercontent.com/pyro-ebm/pyro_ebm/main/"

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)
LINK = re.compile(
    r"""\]\(([^)\s]+)[^)]*\)         # [text](target "title")
    |   ^\[[^]]+\]:\ *(\S+)         # [name]: target
    |   (?:src|href)="([^"]+)"     # <img src="target">
    |   <(https?:[^>]+)>           # <target>
    """,
    re.M | re.X,
)


def links(text):
    """Where the links and pictures of a page of Markdown point to."""
    return ["".join(found) for found in LINK.findall(CODE.sub("", text))]


def local_file(url):
    """The file of this checkout that a link into the site or the repository shows, or None."""
    url = url.partition("#")[0]
    if url.startswith(SITE):
        page = url.removeprefix(SITE).removesuffix(".html")
        folder, _, name = page.rpartition("/")
        if folder == "gallery" and name not in ["", "index"]:  # the build makes it of the example
            return ROOT / "examples" / f"{name}.py"
        if folder == "gallery":
            return ROOT / "docs" / "_ext" / "gallery.py"
        return ROOT / "docs" / folder / f"{name or 'index'}.md"
    if url.startswith(RAW):
        return ROOT / url.removeprefix(RAW)
    match = re.fullmatch(rf"{REPOSITORY}/(?:blob|tree)/main/(.*)", url)
    return ROOT / match[1] if match else None


def read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_links_are_found():
    text = """
[a](b.md#c) ![d](e.png "f") `[g](h)` <https://i>
```
[j](k)
```
[l]: m
<img src="n">
"""
    assert links(text) == ["b.md#c", "e.png", "https://i", "m", "n"]


def test_the_names_of_links_in_the_readme_are_defined():
    text = CODE.sub("", README)
    used, defined = re.findall(r"\]\[([^]]+)\]", text), re.findall(r"^\[([^]]+)\]:", text, re.M)
    assert {*used} == {*defined}
    assert len(defined) == len({*defined})


@pytest.mark.parametrize("url", links(README))
def test_a_link_of_the_readme_works_on_a_package_index(url):
    """An index shows the README away from its repository: a relative link leads nowhere there."""
    assert url.startswith(("https://", "#"))
    path = local_file(url)
    assert path is None or path.is_file()


def test_one_version():
    """It stands in pyro_ebm/__init__.py; other places agree."""
    assert version() == pyro_ebm.__version__
    assert PROJECT["dynamic"] == ["version"]
    assert str(read_yaml(ROOT / "CITATION.cff")["version"]) == pyro_ebm.__version__


def test_the_changelog_has_the_version_and_its_date():
    text = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+) \((.*)\)$", text, re.M)
    released = read_yaml(ROOT / "CITATION.cff")["date-released"]
    assert (pyro_ebm.__version__, released.isoformat()) == headings[0]
    assert all(date.fromisoformat(when) <= released for _, when in headings)


def test_urls_of_the_project():
    citation = read_yaml(ROOT / "CITATION.cff")
    assert PROJECT["urls"]["Source"] == citation["repository-code"] == REPOSITORY
    assert PROJECT["urls"]["Documentation"] == citation["url"] == SITE
    assert all(path is None or path.is_file() for path in map(local_file, PROJECT["urls"].values()))
    for name in ["SECURITY.md", "CODE_OF_CONDUCT.md"]:
        assert links((ROOT / ".github" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow(path):
    """It parses, and runs `make` targets that there are."""
    workflow = read_yaml(path)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, job in workflow["jobs"].items():
        assert {"runs-on", "uses"} & set(job), name
        assert job.get("needs", name) in workflow["jobs"]
        for step in job.get("steps", []):
            assert {"run", "uses"} & set(step), name
            for target in re.findall(r"^make (?:\S+=\S* )*([\w-]+)", step.get("run", ""), re.M):
                assert re.search(rf"^{target}:", makefile, re.M), target


def test_a_release_publishes_what_was_checked_and_without_a_password():
    jobs = read_yaml(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert jobs["publish"]["needs"] == "ci"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "password" not in str(jobs["publish"])


def test_the_site_is_built_from_the_docs_extra():
    settings = read_yaml(ROOT / ".readthedocs.yaml")
    assert (ROOT / settings["sphinx"]["configuration"]).is_file()
    assert '".[docs]"' in settings["build"]["jobs"]["install"][0]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form(path):
    form = read_yaml(path)
    if path.name == "config.yml":
        assert all({"name", "url", "about"} == set(link) for link in form["contact_links"])
        return
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_constraints_with_another_requirement():
    lines = constraints(["arviz==0.23.*"]).splitlines()
    assert [line for line in lines if line.startswith("arviz")] == [
        *[f'arviz-{part}==0.8.0; python_version < "3.12"' for part in ["base", "stats"]],
        "arviz==0.23.*",
    ]
    assert (
        constraints([]).splitlines() == (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    )


def test_a_wheel_that_is_not_right(tmp_path):
    info = "pyro_ebm-0.0.dist-info"
    wheel = tmp_path / "pyro_ebm-0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in package_files() - {"pyro_ebm/py.typed"}:
            file.writestr(name, "")
        file.writestr("tests/test_nn.py", "")
        file.writestr(
            f"{info}/METADATA",
            "Version: 0.0\nLicense-Expression: MIT\n"
            "Requires-Python: >=3.11\nDescription-Content-Type: text/markdown\n\n",
        )
    assert wheel_complaints(wheel, "0.0") == [
        "lacks pyro_ebm/py.typed",
        "has tests/test_nn.py",
        "lacks the licence",
        "says 'MIT' as License-Expression",
    ]
