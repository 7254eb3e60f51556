"""All questions, one after another: each prints its table and writes JSON and pictures.

    python -m tests.benchmarks                                  # some hours, most for `defaults`
    python -m tests.benchmarks --quick                          # does it run at all?
    python -m tests.benchmarks --markdown docs/benchmarks.md    # and rewrite the page's sections

On a GPU, the questions that can: ``--device cuda``.
"""

import argparse
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from tests.benchmarks.harness import Options, Question, require

NAMES = (
    "defaults",
    "posteriors",
    "transitions",
    "energies",
    "training",
    "annealing",
    "growth",
    "boltzmann",
    "many_chains",
    "minibatches",
    "goals",
)


def main() -> None:
    usual = Options()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="of every question; else each has its number")
    parser.add_argument(
        "--minutes", type=float, help="of each question, after which no round begins"
    )
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--threads", type=int, default=usual.threads, help="of torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=usual.device)
    parser.add_argument("--quick", action="store_true", help="the figures mean nothing")
    parser.add_argument("--output", type=Path, default=usual.output)
    parser.add_argument("--markdown", type=Path, help="the page whose sections are rewritten")
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}

    require(("numpyro", "blackjax", "nutpie", "jax", "torchebm", "scikit-learn", "posteriors"))
    start = time.monotonic()
    for name in NAMES:
        question: Question = import_module(f"tests.benchmarks.{name}").QUESTION
        options = Options(**given)
        if options.device in question.devices:
            options = replace(
                options,
                rounds=given.get("rounds", question.rounds),
                minutes=given.get("minutes", question.minutes),
            )
            question.answer(options)
    print(f"{time.monotonic() - start:.0f} s in all; rows and pictures are in {usual.output}")


if __name__ == "__main__":
    main()
