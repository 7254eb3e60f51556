"""Check the files of a release in dist/: `make check-dist` builds them and runs this.

Their contents first. Then the wheel goes into a new environment, with what it requires, and a
program runs that uses it (smoke.py); then the source distribution in its place, and again. The
versions of what is required come from constraints.txt; `--instead "arviz==0.23.*"` puts another
requirement in the place of its line.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.packaging.contents import ROOT, sdist_complaints, wheel_complaints


def version() -> str:
    text = (ROOT / "pyro_ebm" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "([^"]+)"$', text, re.M)
    return found


def project(requirement: str) -> str:
    return re.match(r"[\w.-]*", requirement)[0]


def constraints(instead: list[str]) -> str:
    """constraints.txt, with other requirements in the place of some."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = {project(requirement) for requirement in instead}
    kept = [line for line in lines if project(line) not in names]
    return "\n".join([*kept, *instead, ""])


def run(*command, **kwargs) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **kwargs)


def check(files: list[Path], instead: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        venv.create(work / "env", with_pip=True)
        python = work / "env" / "bin" / "python"
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        (work / "constraints.txt").write_text(constraints(instead), encoding="utf-8")
        for extra, file in zip([[], ["--no-deps", "--force-reinstall"]], files, strict=True):
            run(*pip, "install", "-q", "-c", work / "constraints.txt", *extra, file)
            run(*pip, "check")
            run(python, "-I", ROOT / "tests" / "packaging" / "smoke.py", cwd=work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--instead", action="append", default=[], metavar="REQUIREMENT")
    parser.add_argument("--contents-only", action="store_true", help="install nothing")
    args = parser.parse_args()
    dist, now = ROOT / "dist", version()
    wheel = dist / f"pyro_ebm-{now}-py3-none-any.whl"
    sdist = dist / f"pyro_ebm-{now}.tar.gz"
    found = {path for path in dist.iterdir() if path.name != ".gitignore"}
    if found != {wheel, sdist}:
        names = sorted(path.name for path in found)
        sys.exit(f"dist/ should hold {wheel.name} and {sdist.name}, and holds {names}: make dist")
    wrong = [f"{wheel.name} {text}" for text in wheel_complaints(wheel, now)]
    wrong += [f"{sdist.name} {text}" for text in sdist_complaints(sdist, now)]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{wheel.name} and {sdist.name} hold what they should")
    if not args.contents_only:
        check([wheel, sdist], args.instead)


if __name__ == "__main__":
    main()
