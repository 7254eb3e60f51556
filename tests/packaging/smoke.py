"""What a user does first with an installed pyro_ebm. `make check-dist` runs this file by itself.

It runs away from the checkout, with what the package itself requires and nothing more: it imports
every module, runs the example of the page that a package index shows, and compares the draws with
quadrature.
"""

import importlib
import math
import pkgutil
import re
import sys
import warnings
from importlib.metadata import metadata, version
from pathlib import Path


def import_everything() -> int:
    """Import every module; return their number."""
    import pyro_ebm

    modules = list(pkgutil.walk_packages(pyro_ebm.__path__, "pyro_ebm."))
    for module in modules:
        importlib.import_module(module.name)
    return len(modules)


def first_example() -> str:
    """The first Python block of the installed README."""
    page = metadata("pyro-ebm").get_payload()
    found = re.search(r"^```python\n(.*?)^```", str(page), re.M | re.S)
    assert found, "the long description has no Python block"
    return found[1]


def mean_radius(y: tuple[float, float], noise: float = 0.5) -> float:
    r"""E[|x| | y] in the example, exp(-8 (|x| - 2)^2) N(y | x, noise^2), by a sum over a grid."""
    grid = [i / 50 for i in range(-200, 201)]
    total = weighted = 0.0
    for a in grid:
        for b in grid:
            radius = math.hypot(a, b)
            misfit = ((a - y[0]) ** 2 + (b - y[1]) ** 2) / (2 * noise**2)
            weight = math.exp(-8 * (radius - 2) ** 2 - misfit)
            total += weight
            weighted += weight * radius
    return weighted / total


def main() -> None:
    import pyro_ebm

    assert version("pyro-ebm") == pyro_ebm.__version__
    folder = Path(pyro_ebm.__file__).parent
    assert folder.is_relative_to(sys.prefix), f"{folder} is no installed package"
    assert (folder / "py.typed").is_file()
    modules = import_everything()

    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pyro_ebm.ConvergenceWarning)
        exec(first_example(), names)
    radius = names["x"].norm(dim=-1)
    # Its standard deviation is .23: five standard errors, of 1,500 effective draws.
    assert abs(float(radius.mean()) - mean_radius((1.0, 1.5))) < 0.03
    assert names["idata"]["posterior"]["x"].shape == (16, 500, 2)
    print(
        f"pyro_ebm {pyro_ebm.__version__}: {modules} modules and the README's example run",
        f"on Python {sys.version.split()[0]}, torch {version('torch')}, ArviZ {version('arviz')}",
    )


if __name__ == "__main__":
    main()
