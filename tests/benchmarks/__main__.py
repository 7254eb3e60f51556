"""The first benchmark: our kernels beside Pyro's, on two posteriors.

python -m tests.benchmarks                                  # a few minutes
python -m tests.benchmarks --quick                          # does it run at all?
python -m tests.benchmarks --markdown docs/benchmarks.md    # and rewrite the page
"""

import argparse
import json
import warnings
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")

from tests.benchmarks import report
from tests.benchmarks.posteriors import POSTERIORS, compare

PREFACE = """
Our kernels beside Pyro's on two real posteriors, in one process, in turns. A figure is the median
over the rounds, the range in brackets. *ESS* is the smallest bulk effective sample size of all
latent quantities (ArviZ); *whole* counts tracing, capturing and compiling, *warm* counts the
transitions alone, those of the warmup included; *transitions/s* counts all chains, over the warm
time. The chains of `LangevinKernel` and `MHKernel` move together, those of Pyro's kernels one after
another. Compiling starts from what PyTorch has cached on disk, after the first round.

Read *max R-hat* first: where it is well above 1.01 the chains have not converged, and their ESS
means nothing.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--posterior", choices=POSTERIORS, action="append", help="all by default")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: the figures mean nothing"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks-output"))
    parser.add_argument("--markdown", type=Path, help="write the tables to this page")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds

    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # Pyro's compiler has many
    about = {**report.machine(args.threads), "seed": args.seed, "rounds": rounds}
    titles = {name: posterior.title for name, posterior in POSTERIORS.items()}
    args.output.mkdir(parents=True, exist_ok=True)

    results = {}
    for name in args.posterior or POSTERIORS:
        results[name] = compare(
            POSTERIORS[name], rounds, args.seed, args.quick, lambda text: print(text, flush=True)
        )
        print(f"\n{titles[name]}\n\n{report.table(results[name])}\n", flush=True)
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    print(
        f"{about['date']}, {about['cores']} cores, {args.threads} torch thread(s), {versions},"
        f" seeds {args.seed}..{args.seed + rounds - 1}"
    )

    (args.output / "posteriors.json").write_text(
        json.dumps({"about": about, "rows": results}, indent=1) + "\n", encoding="utf-8"
    )
    report.picture(results, titles, args.output / "posteriors.png")
    print(f"rows and picture are in {args.output}")
    if args.markdown:
        command = f"python -m tests.benchmarks --markdown {args.markdown}"
        page = report.markdown(results, titles, about, command, PREFACE)
        if args.markdown.exists():  # what other commands have measured stays
            _, mark, rest = args.markdown.read_text(encoding="utf-8").partition(report.OTHERS)
            page += "\n" + mark + rest if mark else ""
        args.markdown.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
