"""What the site needs beside its pages: MathJax within it, a sitemap, other projects' names."""

import importlib.util
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from xml.sax.saxutils import escape

# PyPI's sphinx-mathjax-offline carries MathJax 3 (Apache 2.0); of its 24 MB a page loads these.
MATHJAX = ["tex-chtml.js", "output/chtml/fonts", "input/tex/extensions"]

# Where other projects keep the lists of their names.
INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "pyro": "https://docs.pyro.ai/en/stable/",
    "arviz": "https://python.arviz.org/en/stable/",
    "zuko": "https://zuko.readthedocs.io/stable/",
}


def intersphinx_mapping(folder):
    """The inventories that can be fetched, on the machines that publish; elsewhere none.

    A name of another project is a link where its inventory is at hand and plain text where it is
    not, so that the build says the same with a network and without.
    """
    if not ({"READTHEDOCS", "GITHUB_ACTIONS", "DOCS_ONLINE"} & set(os.environ)):
        return {}
    found = {}
    for name, url in INVENTORIES.items():
        try:
            with urllib.request.urlopen(url + "objects.inv", timeout=10) as answer:
                content = answer.read()
        except (urllib.error.URLError, OSError):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.inv").write_bytes(content)
        found[name] = (url, str(folder / f"{name}.inv"))
    return found


def copy_mathjax(app, error):
    """Put MathJax beside the pages, so that formulas need no network."""
    if error is None and app.builder.format == "html":
        source = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
        target = Path(app.outdir) / "_static" / "mathjax"
        for part in MATHJAX:
            whole = source / "static" / "mathjax" / part
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            if whole.is_dir():
                shutil.copytree(whole, target / part, dirs_exist_ok=True)
            else:
                shutil.copy(whole, target / part)


def write_sitemap(app, error):
    """List every page for search engines."""
    if error is None and app.builder.format == "html":
        base = app.config.html_baseurl
        urls = [
            escape(base + app.builder.get_target_uri(name)) for name in sorted(app.env.found_docs)
        ]
        rows = "\n".join(f"  <url><loc>{url}</loc></url>" for url in urls)
        (Path(app.outdir) / "sitemap.xml").write_text(
            '<?xml version="1.0" encoding="utf-8"?>\n'
            f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{rows}\n</urlset>\n'
        )


def setup(app):
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", write_sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
