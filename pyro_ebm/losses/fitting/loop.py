"""From step to step: the history, the progress bar, and what is called after each step."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from tqdm.auto import tqdm

from pyro_ebm.files import Saved
from pyro_ebm.losses.fitting.batches import Batches

Row = Mapping[str, float]
Step = Callable[..., Row]
After = Callable[[int, Row], str | None]


class History:
    """Numbers of each step, by name; NaN where a step has none.

    Example:
        >>> history = History()
        >>> history.add({"loss": 2.0})
        >>> history.add({"loss": 1.0, "accuracy": 0.5})
        >>> history.arrays()
        {'loss': array([2., 1.]), 'accuracy': array([nan, 0.5])}
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.columns: dict[str, list[float]] = {}

    def add(self, row: Row) -> None:
        """Adds a step."""
        for name, value in row.items():
            column = self.columns.setdefault(name, [])
            column += [math.nan] * (self.num_steps - len(column))
            column.append(value)
        self.num_steps += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Each of as many numbers as there are steps."""
        n = self.num_steps
        return {name: np.array(c + [math.nan] * (n - len(c))) for name, c in self.columns.items()}

    def state_dict(self) -> Saved:
        """All of it."""
        arrays = self.arrays().items()
        return {"num_steps": self.num_steps, "columns": {k: torch.tensor(a) for k, a in arrays}}

    def load_state_dict(self, state: Saved) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.num_steps = state["num_steps"]
        self.columns = {name: column.tolist() for name, column in state["columns"].items()}


def run(
    step: Step,
    batches: Batches,
    num_steps: int,
    history: History,
    after: tuple[After, ...] = (),
    label: str = "fit",
    disable_progbar: bool = False,
) -> str:
    """Takes the steps that are left, one after another.

    Args:
        step: takes one on a batch, and returns its numbers.
        batches: what it is called with.
        num_steps: how many there are, those in the history among them.
        history: to which they are added.
        after: functions of the number of the step, from 1, and its numbers, called after it in
            turn; one that returns a string ends the training for that reason.
        label: of the progress bar.
        disable_progbar: whether to show none.

    Returns:
        Why it ended: ``"num_steps"``, or another reason.

    Example:
        >>> w, batches = torch.zeros(()), Batches(torch.ones(6), batch_size=2)
        >>> history = History()
        >>> run(lambda x: {"sum": float(w.add_(x.sum()))}, batches, 4, history, label="add")
        'num_steps'
        >>> history.arrays()["sum"]
        array([2., 4., 6., 8.])
    """
    done = history.num_steps
    with tqdm(total=num_steps, initial=done, disable=disable_progbar, desc=label) as bar:
        for now in range(done + 1, num_steps + 1):
            row = step(*next(batches))
            history.add(row)
            if bar.update() or now == num_steps:  # it is drawn ten times a second: show the numbers
                shown = (f"{name} {value:.3g}" for name, value in row.items())
                bar.set_postfix_str(", ".join(shown), refresh=False)
            for function in after:
                reason = function(now, row)
                if isinstance(reason, str):
                    return reason
    return "num_steps"
