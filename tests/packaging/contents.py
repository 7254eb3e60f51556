"""What the files of a release hold: the package and its licence, and nothing by accident."""

import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]

# An sdist is what a distribution's packagers build and test from.
IN_SDIST = ["CITATION.cff", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"]
IN_SDIST += [".github/workflows/ci.yml", "docs/changelog.md", "tests/conftest.py"]
NEVER = ["__pycache__", ".venv", ".git", "_build", "output", ".DS_Store"]

MAX_MB = {".whl": 2, ".gz": 20}


def package_files() -> set[str]:
    """The files of the package, without what serves its doctests alone."""
    found = {path for path in (ROOT / "pyro_ebm").rglob("*.py") if path.name != "conftest.py"}
    found.add(ROOT / "pyro_ebm" / "py.typed")
    return {path.relative_to(ROOT).as_posix() for path in found}


def wheel_complaints(wheel: Path, version: str) -> list[str]:
    """What is wrong with a wheel: a sentence each."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        info = f"pyro_ebm-{version}.dist-info"
        fields = Parser().parsestr(file.read(f"{info}/METADATA").decode())
    wrong = differences(names, package_files())
    package, metadata = "pyro_ebm/", f"{info}/"
    wrong += [f"has {name}" for name in names if not name.startswith((package, metadata))]
    wrong += [f"has {name}" for name in names & {"pyro_ebm/conftest.py"}]
    if f"{info}/licenses/LICENSE" not in names:
        wrong.append("lacks the licence")
    wanted = {
        "Version": version,
        "License-Expression": "Apache-2.0",
        "Requires-Python": ">=3.11",
        "Description-Content-Type": "text/markdown",
    }
    wrong += [
        f"says {fields[name]!r} as {name}" for name, is_ in wanted.items() if fields[name] != is_
    ]
    return wrong + common_complaints(wheel, names)


def sdist_complaints(sdist: Path, version: str) -> list[str]:
    """What is wrong with a source distribution: a sentence each."""
    with tarfile.open(sdist) as file:
        names = {member.name for member in file if member.isfile()}
    top = f"pyro_ebm-{version}/"
    wrong = [f"has {name}" for name in names if not name.startswith(top)]
    names = {name.removeprefix(top) for name in names}
    wrong += differences(names, package_files() | {*IN_SDIST})
    return wrong + common_complaints(sdist, names)


def differences(names: set[str], wanted: set[str]) -> list[str]:
    return [f"lacks {name}" for name in sorted(wanted - names)]


def common_complaints(path: Path, names: set[str]) -> list[str]:
    wrong = [f"has {name}" for name in sorted(names) if {*NEVER} & {*name.split("/")}]
    size = path.stat().st_size / 2**20
    limit = MAX_MB[path.suffix]
    if size > limit:
        wrong.append(f"takes {size:.1f} MB, and should take {limit} at most")
    return wrong
