"""The rooms of the package, and which may import which.

    files <- ops <- distributions <- mcmc <- normalizer <- losses

An arrow `a <- b` means: b may import a. Everything else is an error, but for the few local
imports (inside a function, so that importing the package does not follow them) in `LOCAL`.
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

CHAIN = ["files", "ops", "distributions", "mcmc", "normalizer", "losses"]

# Leaves: nothing in the package imports them at module level, but for `pyro_ebm/__init__.py`
# (and a leaf inside a room may be exported by that room's own `__init__.py`).
LEAVES = ["diagnostics", "distributions.flow", "nn"]

# Local imports that go against the arrows: (module that imports, module imported).
LOCAL = {
    ("distributions.energy", "mcmc"),  # UnnormalizedEnergy.sample reaches its default kernel
    ("mcmc.results", "diagnostics"),  # MCMC.to_arviz
    ("normalizer", "diagnostics"),  # ESS and R-hat beside an estimate of log Z
}

# Third parties that have one door into the package.
DOORS = {
    "zuko": "distributions.flow",
    "arviz": "diagnostics",
    "arviz_stats": "diagnostics",
    "zarr": "mcmc.store",
}


class Arrow(NamedTuple):
    """One import statement: who imports, what, and whether inside a function."""

    importer: str  # "mcmc.langevin"; "" is pyro_ebm/__init__.py
    imported: str  # "ops.score", or "zuko.flows" for a third party
    inside: bool  # in the package, or from a third party
    local: bool  # within a function
    line: int


def arrows(source: str, module: str, is_package: bool, modules: set[str]) -> list[Arrow]:
    """All imports in `source`, the text of `module` (dotted, below pyro_ebm)."""
    found = []

    def add(name: str, local: bool, line: int) -> None:
        top, _, rest = name.partition(".")
        if top == "pyro_ebm":
            found.append(Arrow(module, rest, True, local, line))
        else:
            found.append(Arrow(module, name, False, local, line))

    def visit(node: ast.AST, local: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:  # for the type checker only: never executed
                visit(child, local)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, local, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: climb from the package that holds the module
                parts = ["pyro_ebm", *filter(None, module.split("."))]
                climb = node.level - is_package
                base = ".".join([*parts[: len(parts) - climb], *filter(None, [base])])
            for alias in node.names:
                # `from pyro_ebm.mcmc import langevin` imports a module, `... import MCMC` a name.
                full = f"{base}.{alias.name}"
                is_module = full.removeprefix("pyro_ebm.") in modules
                add(full if is_module else base, local, node.lineno)
        local = local or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, local)

    visit(ast.parse(source), False)
    return found


def within(module: str, room: str) -> bool:
    """Whether `module` is `room` or lies inside it."""
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str:
    """The leaf that holds `module`, or else its top-level room."""
    leaf = next((leaf for leaf in LEAVES if within(module, leaf)), None)
    return leaf or module.partition(".")[0]


def complaint(arrow: Arrow) -> str | None:
    """Why this arrow must not be, or None."""
    importer, imported = arrow.importer, arrow.imported
    says = f"pyro_ebm.{importer}:{arrow.line} imports {imported or 'pyro_ebm'}"

    if not arrow.inside:
        door = DOORS.get(imported.partition(".")[0])
        if door is None or within(importer, door):
            return None
        return f"{says}, which only pyro_ebm.{door} may"

    if importer == "":  # the front door shows everything
        return None
    if imported == "":
        return f"{says}: import the module that defines the name, not the package's front door"
    if arrow.local and any(within(importer, a) and within(imported, b) for a, b in LOCAL):
        return None

    a, b = room_of(importer), room_of(imported)
    if a == b:
        return None
    if b in LEAVES:
        # A room's own front door may show a leaf that lies in it.
        return None if within(b, importer) and b != importer else f"{says}, a leaf"
    if b not in CHAIN:
        return f"{says}: {b!r} is no room this test knows"
    if a in LEAVES:  # a leaf may look at every room
        return None
    if a not in CHAIN:
        return f"{says}, from {a!r}, which is no room this test knows"
    if CHAIN.index(b) < CHAIN.index(a):
        return None
    return f"{says}, against {' <- '.join(CHAIN)}"


def sources(root: Path) -> dict[str, Path]:
    """Every module below `root`: dotted name ("" for the package itself) to file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        if path.name != "conftest.py":
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def complaints(modules: dict[str, Path]) -> list[str]:
    """Every arrow that must not be, among these modules."""
    return [
        text
        for name, path in modules.items()
        for arrow in arrows(path.read_text(), name, path.name == "__init__.py", set(modules))
        if (text := complaint(arrow)) is not None
    ]


def test_imports_point_one_way():
    modules = sources(PACKAGE)
    assert {"", "ops", "distributions", "mcmc", "diagnostics"} <= set(modules)
    assert complaints(modules) == []


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("mcmc/langevin.py", "from pyro_ebm.ops.steps.langevin import step"),
        ("mcmc/langevin.py", "from ..ops import langevin"),
        ("mcmc/langevin.py", "from .kernel import Kernel"),
        ("mcmc/runner.py", "from pyro_ebm import files"),
        ("mcmc/__init__.py", "from .langevin import LangevinKernel"),
        ("losses/base.py", "from pyro_ebm.normalizer import ais"),
        ("distributions/__init__.py", "from .flow import Flow"),
        ("distributions/flow.py", "import zuko"),
        ("distributions/flow.py", "from .energy import UnnormalizedEnergy"),
        ("diagnostics.py", "import arviz as az\nfrom pyro_ebm.mcmc import runner"),
        ("mcmc/results.py", "def to_arviz():\n    from pyro_ebm.diagnostics import to_arviz"),
        ("distributions/energy.py", "def sample():\n    from ..mcmc import LangevinKernel"),
        ("ops/score.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zuko"),
        ("__init__.py", "from pyro_ebm.losses import base\nfrom .diagnostics import to_arviz"),
    ],
)
def test_right_arrow(tmp_path, module, statement):
    assert complaints(_fake(tmp_path, module, statement)) == []


@pytest.mark.parametrize(
    ("module", "statement", "because"),
    [
        ("ops/score.py", "import pyro_ebm.mcmc.kernels.base", "against"),
        ("ops/score.py", "from .. import mcmc", "against"),
        ("files.py", "from pyro_ebm.ops import score", "against"),
        ("ops/score.py", "def f():\n    from ..distributions import energy", "against"),
        ("distributions/energy.py", "from ..mcmc import LangevinKernel", "against"),
        ("distributions/combine.py", "def f():\n    from ..mcmc import langevin", "against"),
        ("mcmc/runner.py", "from pyro_ebm import normalizer", "against"),
        ("normalizer.py", "from .losses.base import Loss", "against"),
        ("mcmc/runner.py", "from ..diagnostics import to_arviz", "a leaf"),
        ("mcmc/kernel.py", "def f():\n    from .. import diagnostics", "a leaf"),
        ("losses/base.py", "from ..distributions.flow import Flow", "a leaf"),
        ("losses/base.py", "from ..distributions import flow", "a leaf"),
        ("mcmc/kernel.py", "import arviz", "only pyro_ebm.diagnostics"),
        ("distributions/energy.py", "if True:\n    from zuko.flows import NSF", "only pyro_ebm"),
        ("mcmc/kernel.py", "from pyro_ebm import MCMC", "front door"),
        ("mcmc/kernel.py", "from pyro_ebm.helpers import f", "no room"),
    ],
)
def test_wrong_arrow(tmp_path, module, statement, because):
    (text,) = complaints(_fake(tmp_path, module, statement))
    assert because in text
    assert text.startswith(f"pyro_ebm.{module.removesuffix('.py').replace('/', '.')}:")


def _fake(root: Path, module: str, statement: str) -> dict[str, Path]:
    """A package of empty modules in which one says `statement`."""
    for name in [
        "__init__.py",
        "diagnostics.py",
        "normalizer.py",
        "helpers.py",
        "files.py",
        *(f"{room}/__init__.py" for room in ["ops", "distributions", "mcmc", "losses"]),
        *("ops/score.py", "ops/langevin.py", "losses/base.py"),
        *("distributions/energy.py", "distributions/combine.py", "distributions/flow.py"),
        *("mcmc/kernel.py", "mcmc/langevin.py", "mcmc/runner.py"),
    ]:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (root / module).write_text(statement + "\n")
    return sources(root)


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


def test_the_front_door_shows_every_room():
    # ... and a star import leaves `from torch import nn` alone
    code = (
        "import pyro_ebm; print(pyro_ebm.nn.MLPEnergy, pyro_ebm.ops, pyro_ebm.normalizer);"
        "from torch import nn; from pyro_ebm import *; nn.Module"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
