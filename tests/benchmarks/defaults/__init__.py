"""Question: how long until a posterior is known, from the model on, with a sampler's defaults?

python -m tests.benchmarks.defaults --quick
python -m tests.benchmarks.defaults --only nes --samplers "pyro_ebm ChEES" nutpie --chains 16
python -m tests.benchmarks.defaults --check

Runs are kept in ``defaults-runs.jsonl`` of the output folder, and a command goes on where another
one stopped; ``--fresh`` starts anew. ``--check`` compares the models in both languages and their
published answers with long runs, and measures nothing.
"""

from tests.benchmarks.defaults.contestants import CHAINS, SAMPLERS, settings
from tests.benchmarks.defaults.runs import RunFile, Runner, of_more_chains
from tests.benchmarks.defaults.tables import PREFACE, pictures, tables
from tests.benchmarks.harness import Options, Question, Row, progress
from tests.benchmarks.real.posteriors import REAL

MANY = {"action": "extend", "nargs": "+"}


def measure(
    options: Options,
    only: list[str] | None = None,
    samplers: list[str] | None = None,
    chains: list[int] | None = None,
    limit: float = 90.0,
    fresh: bool = False,
) -> list[Row]:
    few = options.quick and not only
    names = only or (["kidscore_momiq"] if few else list(REAL))
    counts = sorted(chains or ([4] if options.quick else CHAINS))
    todo = list(settings(names, samplers or list(SAMPLERS), counts, options.quick))
    file = RunFile(options.output / "defaults-runs.jsonl")
    if fresh:
        file.clear()
    runner, rows = Runner(options.threads, limit, file), []
    for i, setting in options.rotate(todo):
        row = {"round": i, **runner.run(setting, options.seed + i)}
        rows.append(row)
        progress(f"{i + 1}: {setting.posterior}, {row['sampler']}, {row['chains']}: {told(row)}")
        if setting.sampler.alone:
            rows += [of_more_chains(row, count) for count in counts if count > row["chains"]]
    runner.stop()
    order = [(name, count, s) for name in names for count in counts for s in SAMPLERS]
    return sorted(
        rows, key=lambda r: (order.index((r["posterior"], r["chains"], r["sampler"])), r["round"])
    )


def told(row: Row) -> str:
    """A run in a few words."""
    if "seconds" not in row:
        return row.get("failed") or f"over the limit ({row['over_limit']})"
    return (
        f"{row['seconds']:.1f} s to 1,000, {row['before']:.1f} s of them before the first draw,"
        f" R-hat {row['r_hat']:.3f}, z {row['z']:.1f}"
    )


QUESTION = Question(
    name="defaults",
    title="Real posteriors with default settings",
    preface=PREFACE,
    measure=measure,
    tables=tables,
    pictures=pictures,
    packages=("numpyro", "blackjax", "nutpie", "jax", "scikit-learn"),
    rounds=1,
    minutes=240.0,
    illustrated=True,
    options={
        "only": {"choices": tuple(REAL), **MANY, "help": "posteriors; all by default"},
        "samplers": {"choices": tuple(SAMPLERS), **MANY, "help": "all by default"},
        "chains": {"type": int, **MANY, "help": "4, 16 and 64 by default"},
        "limit": {"type": float, "default": 90.0, "help": "seconds of a single run"},
        "fresh": {"action": "store_true", "help": "make runs anew that were made"},
    },
)
