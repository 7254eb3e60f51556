"""Sphinx configuration. `make docs` builds with -W: a warning is an error."""

import importlib
import pkgutil
from pathlib import Path

from sphinx.util import logging

import pyro_ebm

project = "pyro_ebm"
author = "pyro_ebm contributors"
copyright = f"2026, {author}"
version = release = pyro_ebm.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute"]

# The tests run the Python blocks of these pages (tests/test_readme.py); the build does not.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# What a method inherits from Pyro or torch is documented there, in another dialect.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Reference"]

# Without a network there is no looking up of other projects' names; our own must resolve.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!pyro_ebm\.).*")]

html_theme = "furo"
html_title = f"pyro_ebm {version}"

API_PAGES = Path(__file__).parent / "api"


def resolve_public_name(app, env, node, contnode):
    """Link `pyro_ebm.MCMC`, as users write it, to the module where it lives."""
    target = node.get("reftarget", "")
    parts = target.split(".")
    if node.get("refdomain") != "py" or parts[0] != "pyro_ebm":
        return None
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        rest = parts[cut:]
        found = getattr(found, rest[0], None)
        home = getattr(found, "__module__", None)
        if home is None or not hasattr(found, "__qualname__"):
            return None
        name = ".".join([home, found.__qualname__, *rest[1:]])
        if name == target:
            return None
        domain = env.get_domain("py")
        return domain.resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], name, node, contnode
        )
    return None


def check_every_module_is_listed(app, env):
    """A new module needs its lines on a page of api/."""
    pages = " ".join(page.read_text(encoding="utf-8") for page in API_PAGES.glob("*.md")).split()
    for module in pkgutil.walk_packages(pyro_ebm.__path__, "pyro_ebm."):
        name = module.name.split(".")[-1]
        hidden = module.ispkg or name == "conftest" or name.startswith("_")
        if not hidden and module.name not in pages:
            logging.getLogger(__name__).warning("no page of docs/api shows %s", module.name)


def setup(app):
    app.connect("missing-reference", resolve_public_name)
    app.connect("env-check-consistency", check_every_module_is_listed)
