"""The gallery: a page for each program of examples/, made from its source and a kept run.

``make gallery`` (``python docs/_ext/gallery.py [name ...]``) runs the examples whose source has
changed since their kept run, as a reader would, and keeps in docs/_static/gallery what each
printed (.txt), drew (.png, .gif) and took (.json). The build of the documentation runs none of
them: it writes a page for each, with its docstring, picture, output and source, and an index.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
KEPT = ROOT / "docs" / "_static" / "gallery"
PAGES = ROOT / "docs" / "gallery"

# The order of the index.
GROUPS = {
    "Begin here": ["quickstart", "ising_posterior", "image_energy"],
    "Learn an energy": [
        "contrastive_divergence",
        "score_matching",
        "noise_contrastive",
        "flow_nce",
        "rbm_digits",
    ],
    "Use an energy": ["denoise", "latent_ebm", "joint_classifier", "anomaly"],
    "Bayesian networks": ["bayesian_network"],
    "Sample, and measure log Z": ["ising", "log_normalizer"],
    "Several processes": ["distributed_sampling", "distributed_training"],
}
# Where a run is not `python examples/NAME.py`.
COMMANDS = {
    "distributed_sampling": "torchrun --nproc_per_node=2 examples/distributed_sampling.py",
    "distributed_training": "torchrun --nproc_per_node=2 examples/distributed_training.py",
    "anomaly": "python examples/anomaly.py --seeds 2",
}


def names():
    """The names of all examples, in the order of the index."""
    return [name for group in GROUPS.values() for name in group]


def command(name):
    """What a reader types to get the kept output."""
    return COMMANDS.get(name, f"python examples/{name}.py")


def digest(name):
    """A number that changes with an example's program, its docstring apart."""
    text = (EXAMPLES / f"{name}.py").read_text()
    program = "\n".join(text.splitlines()[ast.parse(text).body[0].end_lineno :])
    return hashlib.sha256(program.encode()).hexdigest()[:16]


def kept(name):
    """What is known of the kept run: its command, source, seconds of all processors, versions."""
    path = KEPT / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


# ---- running the examples ----------------------------------------------------------------------


def run(name):
    """Run an example and keep its output."""
    words = shlex.split(command(name))
    words[0:1] = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }[words[0]]
    picture = KEPT / f"{name}.png"
    if "--output" in (EXAMPLES / f"{name}.py").read_text():
        words += ["--output", str(picture.relative_to(ROOT))]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, which is the same on a busy machine.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}{done.stderr}")
    text = re.sub(r"docs/_static/gallery/", "examples/output/", done.stdout)
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.txt").write_text(text.strip("\n") + "\n")
    record = {
        "command": command(name),
        "source": digest(name),
        "seconds": round(seconds, 1),
        "versions": {p: version(p) for p in ("pyro-ebm", "pyro-ppl", "torch")},
    }
    (KEPT / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{name}: {seconds:.0f} s")


def main():
    parser = argparse.ArgumentParser(description="Runs examples and keeps what they print and draw")
    parser.add_argument("names", nargs="*", help="examples to run, whether changed or not")
    args = parser.parse_args()
    for name in args.names or [n for n in names() if kept(n).get("source") != digest(n)]:
        run(name)


# ---- the pages ---------------------------------------------------------------------------------


def docstring(name):
    """The first line of an example's docstring, without its full stop, and the rest."""
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())) or name
    first, _, rest = text.partition("\n")
    return first.rstrip("."), rest.strip("\n")


def as_markdown(text):
    """A docstring's plain text; what it indents (formulas, tables) keeps its lines."""
    lines, literal = [], False
    for line in text.splitlines():
        indented = line.startswith("    ")  # by less: an item of a list goes on
        if line.strip() and indented != literal:
            lines += ["```text"] if indented else ["```", ""]
            literal = indented
        lines.append(line)
    return "\n".join([*lines, "```"] if literal else lines)


def duration(seconds):
    """Seconds in words.

    >>> duration(12.3), duration(200)
    ('12 s', '3 min 20 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def page(name):
    """The page of an example."""
    title, text = docstring(name)
    record = kept(name)
    versions = ", ".join(f"{p} {v}" for p, v in record["versions"].items())
    parts = [f"# {title}", as_markdown(text)]
    for ending, words in (("png", "What the program draws"), ("gif", "What it animates")):
        if (KEPT / f"{name}.{ending}").exists():
            parts.append(f"![{words}](../_static/gallery/{name}.{ending})")
    parts.append(f"In a clone of the repository:\n\n```sh\n{record['command']}\n```")
    took = f"It took {duration(record['seconds'])} of processor time ({versions})."
    if "perf_counter" in (EXAMPLES / f"{name}.py").read_text():
        took += (
            " Seconds in its output are by the clock, on a machine whose cores other programs had"
            " too: compare them with each other alone, and take the processor time for yours."
        )
    if record["source"] != digest(name):
        took = "From a run of an earlier version of the source. " + took
    parts.append(took)
    parts.append(f"```{{literalinclude}} ../_static/gallery/{name}.txt\n:language: text\n```")
    parts.append(f"## The program\n\n{{download}}`Download it <../../examples/{name}.py>`")
    below = ast.parse((EXAMPLES / f"{name}.py").read_text()).body[0].end_lineno + 2
    options = f":language: python\n:lines: {below}-"
    parts.append(f"```{{literalinclude}} ../../examples/{name}.py\n{options}\n```")
    return "\n\n".join(parts) + "\n"


# Of a picture wider than twice its height the thumbnail is a part: where it begins, 0 to 1.
BEGINS = {
    "quickstart": 0.58,
    "contrastive_divergence": 0.1,
    "flow_nce": 0.42,
    "score_matching": 0.3,
}


def thumbnail(name, path, size=(480, 300)):
    """A picture for the index: the example's own within a white frame, or what it prints."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("RGB", size, "white")
    source = KEPT / f"{name}.png"
    if source.exists():
        picture = Image.open(source).convert("RGB")
        (width, height), part = picture.size, round(1.6 * picture.size[1])
        if width > 2 * height:
            left = round(min(BEGINS.get(name, 0.0), 1 - part / width) * width)
            picture = picture.crop((left, 0, left + part, height))
        picture.thumbnail((size[0] - 16, size[1] - 16), Image.Resampling.LANCZOS)
        canvas.paste(picture, tuple((a - b) // 2 for a, b in zip(size, picture.size, strict=True)))
    else:
        text = (KEPT / f"{name}.txt").read_text()
        canvas = Image.new("RGB", size, "#1d2433")
        ImageDraw.Draw(canvas).multiline_text(
            (14, 12), text, "#d8e1f0", ImageFont.load_default(13), spacing=6
        )
    canvas.save(path)


def index():
    """The page with a card for each example."""
    parts = [
        "# Gallery",
        "Each picture leads to the program that draws it, with its output and the time that it took"
        " of a processor. The programs are in `examples/` of a clone of the repository, and each"
        " page has its own to download.",
    ]
    for group, members in GROUPS.items():
        cards = [f"## {group}", "::::{grid} 1 2 3 3\n:gutter: 3"]
        for name in members:
            seconds = duration(kept(name)["seconds"])
            cards.append(
                f":::{{grid-item-card}} {docstring(name)[0]}\n:link: {name}\n:link-type: doc\n"
                f":img-top: thumbnails/{name}.png\n:img-alt: The picture of {name}\n\n"
                f"`{name}.py`, {seconds}\n:::"
            )
        parts.append("\n\n".join([*cards, "::::"]))
    listed = "\n".join(names())
    parts.append(f"```{{toctree}}\n:hidden:\n\n{listed}\n```")
    return "\n\n".join(parts) + "\n"


def write_pages(app):
    """Write docs/gallery anew; files that would stay the same are left alone."""
    (PAGES / "thumbnails").mkdir(parents=True, exist_ok=True)
    for name in names():
        thumbnail(name, PAGES / "thumbnails" / f"{name}.png")
    for path, text in {"index": index(), **{name: page(name) for name in names()}}.items():
        file = PAGES / f"{path}.md"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def no_source_links(app, pagename, templatename, context, doctree):
    """A page that is written by the build has no source to edit."""
    if pagename.startswith("gallery/"):
        context["page_source_suffix"] = ""


def setup(app):
    app.connect("builder-inited", write_pages)
    app.connect("html-page-context", no_source_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    main()
