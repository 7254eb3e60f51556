"""The wings of the package: which may import which, and how large they may be.

    files <- internals <- ops <- distributions <- models <- diagnostics <- mcmc <- normalizer
          <- evidence <- losses

An arrow ``a <- b`` means that b may import a, and all that is left of a. Every import counts: at
the top of a module, inside a function, and for the type checker alone.
"""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

import pyro_ebm

PACKAGE = Path(pyro_ebm.__file__).parent

WINGS = ["files", "internals", "ops", "distributions", "models", "diagnostics", "mcmc"]
WINGS += ["normalizer", "evidence", "losses"]
CHAIN = " <- ".join(WINGS)
MAY_IMPORT = {wing: set(WINGS[: i + 1]) for i, wing in enumerate(WINGS)}
# Beside the chain: no wing imports these.
MAY_IMPORT["nn"] = {"nn", "ops"}
MAY_IMPORT["datasets"] = {"datasets", *MAY_IMPORT["distributions"]}
MAY_IMPORT["plots"] = {"plots", *MAY_IMPORT["distributions"]}

# Third parties that these modules, or wings, import for all others.
DOORS = {
    "zuko": ["distributions.flow"],
    "arviz": ["diagnostics", "ops.pareto"],
    "arviz_stats": ["diagnostics", "ops.pareto"],
    "matplotlib": ["plots"],
    "sklearn": ["datasets"],
    "zarr": ["mcmc.running.storage.zarr_store"],
}

MAX_LINES = 400
MAX_MODULES = 10


class Import(NamedTuple):
    """One import: ``of`` is dotted below pyro_ebm if ``ours``, else a third party's module."""

    by: str
    of: str
    ours: bool
    line: int

    def complaint(self) -> str | None:
        """Why this import must not be, or None."""
        says = f"pyro_ebm.{self.by}:{self.line} imports {self.of or 'pyro_ebm'}"
        if not self.ours:
            doors = DOORS.get(self.of.partition(".")[0], [self.by])
            known = any(within(self.by, door) for door in doors)
            return None if known else f"{says}, which only pyro_ebm.{' and '.join(doors)} may"
        if self.by == "":  # the package itself shows every wing
            return None
        if self.of == "":
            return f"{says}: import from the module that defines the name"
        wing, other = self.by.partition(".")[0], self.of.partition(".")[0]
        if wing not in MAY_IMPORT:
            return f"{says}, and {wing!r} has no place in {CHAIN}"
        return None if other in MAY_IMPORT[wing] else f"{says}, against {CHAIN}"


def within(module: str, folder: str) -> bool:
    return module == folder or module.startswith(folder + ".")


def sources(root: Path) -> dict[str, Path]:
    """Every module below ``root``: dotted name, "" for the package itself, to file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        if path.name != "conftest.py":
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imports(modules: dict[str, Path]) -> list[Import]:
    """All imports in these modules."""
    return [
        Import(name, rest if top == "pyro_ebm" else target, top == "pyro_ebm", line)
        for name, path in modules.items()
        for target, line in targets(path, name, modules)
        for top, _, rest in [target.partition(".")]
    ]


def targets(path: Path, module: str, modules: dict[str, Path]):
    """The full name of each module that a file imports, and the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: climb from the package that holds the module
                parts = ["pyro_ebm", *filter(None, module.split("."))]
                climb = node.level - (path.name == "__init__.py")
                base = ".".join([*parts[: len(parts) - climb], *filter(None, [base])])
            for alias in node.names:
                # `from pyro_ebm.mcmc import ranks` imports a module, `... import MCMC` a name.
                full = f"{base}.{alias.name}"
                yield (full if full.removeprefix("pyro_ebm.") in modules else base), node.lineno


def complaints(modules: dict[str, Path]) -> list[str]:
    return [text for found in imports(modules) if (text := found.complaint()) is not None]


def circle(modules: dict[str, Path]) -> list[str]:
    """Modules that import each other in a circle, the first also at the end; or none."""
    graph = {name: set() for name in modules}
    for found in imports(modules):
        if found.ours and found.of in graph:
            graph[found.by].add(found.of)
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for name in sorted(graph[path[-1]] - done):
            if name in path:
                return [*path[path.index(name) :], name]
            if around := search([*path, name]):
                return around
        done.add(path[-1])
        return []

    return next((around for name in graph if (around := search([name]))), [])


MODULES = sources(PACKAGE)


def test_imports_point_one_way():
    assert {"", *WINGS, "nn", "datasets", "plots"} <= set(MODULES)
    assert complaints(MODULES) == []


def test_no_modules_import_each_other():
    assert circle(MODULES) == []


def test_modules_and_folders_are_small():
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}
    folders = [path.parent for path in MODULES.values() if path.name == "__init__.py"]
    sizes = {
        f.name: len({*f.glob("*.py")} - {f / "__init__.py", f / "conftest.py"}) for f in folders
    }
    assert {name: n for name, n in sizes.items() if n > MAX_MODULES} == {}


def test_every_folder_says_what_lives_there():
    for path in MODULES.values():
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert len(text) > 60, path


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("mcmc/langevin.py", "from pyro_ebm.ops.score import score"),
        ("mcmc/langevin.py", "from ..ops import score"),
        ("mcmc/langevin.py", "from .kernel import Kernel"),
        ("mcmc/__init__.py", "from .langevin import LangevinKernel"),
        ("mcmc/kernel.py", "from pyro_ebm import files, diagnostics"),
        ("losses/base.py", "from pyro_ebm.normalizer import ais"),
        ("distributions/flow.py", "import zuko\nfrom .energy import UnnormalizedEnergy"),
        ("diagnostics/__init__.py", "import arviz as az"),
        ("nn.py", "from pyro_ebm.ops import score"),
        ("__init__.py", "from pyro_ebm.losses import base\nfrom .diagnostics import to_arviz"),
    ],
)
def test_imports_that_may_be(tmp_path, module, statement):
    modules = _fake(tmp_path, module, statement)
    assert complaints(modules) == []
    assert circle(modules) == []


@pytest.mark.parametrize(
    ("module", "statement", "because"),
    [
        ("ops/score.py", "import pyro_ebm.mcmc.kernel", "against"),
        ("ops/score.py", "from .. import mcmc", "against"),
        ("files.py", "from pyro_ebm.ops import score", "against"),
        ("ops/score.py", "def f():\n    from ..distributions import energy", "against"),
        ("distributions/energy.py", "if TYPE_CHECKING:\n    from ..mcmc import kernel", "against"),
        ("models/sites.py", "class A:\n    from pyro_ebm import diagnostics", "against"),
        ("diagnostics/__init__.py", "from pyro_ebm import mcmc", "against"),
        ("normalizer/__init__.py", "from ..losses.base import Loss", "against"),
        ("nn.py", "from pyro_ebm.distributions import energy", "against"),
        ("losses/base.py", "from pyro_ebm import nn", "against"),
        ("mcmc/kernel.py", "import arviz", "only pyro_ebm.diagnostics"),
        ("distributions/energy.py", "if True:\n    from zuko.flows import NSF", "only pyro_ebm"),
        ("mcmc/kernel.py", "from pyro_ebm import MCMC", "defines the name"),
        ("helpers.py", "from pyro_ebm import files", "has no place"),
    ],
)
def test_imports_that_must_not_be(tmp_path, module, statement, because):
    (text,) = complaints(_fake(tmp_path, module, statement))
    assert because in text
    name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert text.startswith(f"pyro_ebm.{name}:")


def test_a_circle_is_found(tmp_path):
    modules = _fake(tmp_path, "mcmc/kernel.py", "def f():\n    from .langevin import step")
    assert circle(modules) == []
    (tmp_path / "mcmc/langevin.py").write_text("if TYPE_CHECKING:\n    from .kernel import Kernel")
    assert circle(modules) == ["mcmc.kernel", "mcmc.langevin", "mcmc.kernel"]
    modules = _fake(tmp_path, "mcmc/__init__.py", "from .kernel import Kernel")
    (tmp_path / "mcmc/kernel.py").write_text("from pyro_ebm.mcmc import Kernel")
    assert circle(modules) == ["mcmc", "mcmc.kernel", "mcmc"]


def _fake(root: Path, module: str, statement: str) -> dict[str, Path]:
    """A package of empty modules in which one says `statement`."""
    for name in [
        *("__init__.py", "files.py", "nn.py", "helpers.py"),
        *(f"{wing}/__init__.py" for wing in WINGS if wing != "files"),
        *("ops/score.py", "losses/base.py", "models/sites.py"),
        *("distributions/energy.py", "distributions/flow.py"),
        *("mcmc/kernel.py", "mcmc/langevin.py"),
    ]:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (root / module).write_text(statement + "\n")
    return sources(root)


def test_the_help_of_the_package_lists_every_name():
    rows = (pyro_ebm.__doc__ or "").splitlines()
    words = {word.strip(",") for row in rows if row.startswith("    ") for word in row[:30].split()}
    assert {*pyro_ebm.__all__, "nn", "datasets", "plots"} - {"__version__"} <= words
    assert len(rows) <= 60  # two screens


def test_importing_the_package_changes_no_global_state():
    # In a process of its own: here everything is imported already.
    script = """
        import random
        import numpy, torch, pyro

        def state():
            return dict(
                validate_args=torch.distributions.Distribution._validate_args,
                pyro_validates=pyro.distributions.is_validation_enabled(),
                dtype=torch.get_default_dtype(),
                device=torch.get_default_device(),
                grad=torch.is_grad_enabled(),
                threads=torch.get_num_threads(),
                torch_rng=torch.get_rng_state().tolist(),
                numpy_rng=repr(numpy.random.get_state(legacy=False)),
                python_rng=random.getstate(),
                params=list(pyro.get_param_store()),
            )

        {prepare}
        before = state()
        import importlib, pkgutil
        import pyro_ebm
        for module in pkgutil.walk_packages(pyro_ebm.__path__, "pyro_ebm."):
            if not module.name.endswith("conftest"):
                importlib.import_module(module.name)
        after = state()
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, changed
    """
    # Whatever the state was, it stays: with validation on, and with validation off.
    for prepare in ["", "torch.distributions.Distribution.set_default_validate_args(False)"]:
        code = textwrap.dedent(script).replace("{prepare}", prepare)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_importing_the_package_brings_nothing_heavy():
    """A proxy for its time: it should cost 0.3 s at most over Pyro."""
    code = textwrap.dedent("""
        import sys, pyro
        before = set(sys.modules)
        import pyro_ebm
        brought = {name.partition(".")[0] for name in set(sys.modules) - before}
        heavy = {"zuko", "arviz", "arviz_base", "matplotlib", "sklearn", "scipy", "zarr", "xarray"}
        assert not brought & heavy, brought & heavy
        torch_heavy = {"torch._inductor", "torch._dynamo"} & (set(sys.modules) - before)
        assert not torch_heavy, torch_heavy
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_shows_every_wing():
    # ... and a star import leaves `from torch import nn` alone
    code = (
        "import pyro_ebm; print(pyro_ebm.nn.MLPEnergy, pyro_ebm.ops, pyro_ebm.datasets);"
        "from torch import nn; from pyro_ebm import *; nn.Module"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
