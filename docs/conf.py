"""Sphinx configuration. `make docs` builds with -W: a warning is an error."""

import importlib
import inspect
import os
import re
import sys
from pathlib import Path

from docutils.statemachine import StringList
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import pyro_ebm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import site_parts

project = "pyro_ebm"
author = "pyro_ebm contributors"
copyright = f"2026, {author}"
version = release = pyro_ebm.__version__

extensions = [
    "gallery",
    "myst_nb",
    "site_parts",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxext.opengraph",
]
exclude_patterns = ["_build", "jupyter_execute"]

# The build runs the notebooks of tutorials/, each within a minute or two. The Python blocks of the
# other pages are run by the tests (tests/test_readme.py).
nb_execution_mode = "auto"
nb_execution_timeout = 120  # seconds for a cell
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
nb_merge_streams = True  # what a cell prints is one block
nb_execution_excludepatterns = ["api/*", "gallery/*"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = False  # its tables link to the entries of api/
autodoc_default_options = {"show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# What a method inherits from Pyro or torch is documented there, in another dialect.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Reference"]

# Our own names must resolve. Other projects' are links where their inventories can be fetched.
nitpicky = True
intersphinx_mapping = site_parts.intersphinx_mapping(HERE / "_build" / "inventories")
nitpick_ignore_regex = [(r"py:.*", r"(?!pyro_ebm\.).*")]

html_theme = "furo"
html_title = f"pyro_ebm {version}"
html_baseurl = os.environ.get(
    "READTHEDOCS_CANONICAL_URL", "https://pyro-ebm.readthedocs.io/en/latest/"
)
html_logo = "_static/logo.svg"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_search_scorer = str(HERE / "_static" / "scorer.js")
html_theme_options = {
    "source_repository": "https://github.com/pyro-ebm/pyro_ebm/",
    "source_branch": "main",
    "source_directory": "docs/",
    "sidebar_hide_name": False,
}
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"chtml": {"scale": 0.95}}
ogp_site_url = html_baseurl
ogp_site_name = "pyro_ebm"
ogp_image = html_baseurl + "_static/gallery/ising_posterior.png"
ogp_social_cards = {"enable": False}
ogp_enable_meta_description = True

# The modules whose public names are the API. Each name has an entry on a page of api/.
PUBLIC = ["", ".distributions", ".mcmc", ".normalizer", ".losses", ".nn", ".ops", ".diagnostics"]
PUBLIC += [".datasets", ".plots"]

logger = logging.getLogger(__name__)


def find(name):
    """The object of a dotted name below pyro_ebm, or None."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = inspect.getattr_static(found, part, None)
        return found
    return None


def home(found):
    """Where an object is defined, ``(module, qualified name)``."""
    return getattr(found, "__module__", None), getattr(found, "__qualname__", None)


class ModuleDocstring(SphinxDirective):
    """The docstring of the module that defines a public name: the theory behind it."""

    required_arguments = 1

    def run(self):
        found = find(self.arguments[0])
        module = inspect.getmodule(found)
        text = GoogleDocstring(inspect.getdoc(module), self.config, self.env.app, "module")
        return self.parse_text_to_nodes(StringList(text.lines(), module.__name__))


def resolve_public_name(app, env, node, contnode):
    """Link a name to its entry, wherever docs/api puts it; internals become plain text.

    A docstring names an object as its own module does, and its entry has the public name.
    """
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    entries = env.get_domain("py").objects
    found = find(target) if target.startswith("pyro_ebm.") else None
    ending = "." + target.split(".")[-1] if found is None else None
    for name, entry in entries.items():
        same = home(find(name)) == home(found) if found is not None else name.endswith(ending)
        if same and (found is None or None not in home(found)):
            return env.get_domain("py").resolve_xref(
                env, node["refdoc"], app.builder, entry.objtype, name, node, contnode
            )
    return contnode if found is not None else None


def check_every_name_has_an_entry(app, env):
    """A new public name needs its line on a page of api/."""
    entries = {home(find(name)) for name in env.get_domain("py").objects}
    for module in [importlib.import_module("pyro_ebm" + tail) for tail in PUBLIC]:
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if home(value)[0] == module.__name__
        ]
        for name in names:
            found = getattr(module, name)
            ours = str(home(found)[0]).startswith("pyro_ebm.")
            if ours and not name.startswith("_") and home(found) not in entries:
                logger.warning("no page of docs/api shows %s.%s", module.__name__, name)


ENTRY = re.compile(r"^\.\. (currentmodule|auto(?:class|function|exception)):: (\S+)", re.M)


def summary_first(app, docname, source):
    """Begin a page of api/ with a table of its entries; names of every day come first."""
    if not docname.startswith("api/") or docname == "api/index":
        return
    module, names = "pyro_ebm", []
    for kind, name in ENTRY.findall(source[0]):
        if kind == "currentmodule":
            module = name
        else:
            names.append(name if name.startswith("pyro_ebm.") else f"{module}.{name}")
    names.sort(key=lambda name: name.count(".") > 1)  # stable: the page's own order otherwise
    rows = "\n".join(f"   ~{name}" for name in names)
    head = "```{eval-rst}\n.. currentmodule:: None\n.. autosummary::\n   :nosignatures:\n\n"
    table = f"{head}{rows}\n```\n\n"
    intro, heading, rest = source[0].partition("\n## ")
    source[0] = f"{intro}\n{table}{heading[1:]}{rest}" if heading else source[0]


def setup(app):
    app.connect("source-read", summary_first)
    app.add_directive("module-docstring", ModuleDocstring)
    app.connect("missing-reference", resolve_public_name, priority=600)  # after intersphinx
    app.connect("env-check-consistency", check_every_name_has_an_entry)
