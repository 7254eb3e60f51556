"""What a run shows while it runs."""

import time
import warnings

from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from tqdm.auto import tqdm

from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.state import Info


class Bar:
    """A progress bar that reads numbers from the chains only when it redraws.

    Args:
        total: number of transitions.
        num_chains: how many chains each of them moves.
        disable: whether to show nothing.
        chain: the chain, if they run one after another.
        done: how many transitions were made before.
    """

    EVERY = 0.2
    """Seconds between two looks at the chains."""

    def __init__(
        self, total: int, num_chains: int, disable: bool, chain: int | None = None, done: int = 0
    ):
        self.label = f"{num_chains} chain{'s' * (num_chains > 1)}"
        if chain is not None:
            self.label = f"chain {chain}"
        self.bar = tqdm(
            total=total, disable=disable, desc=self.label, mininterval=self.EVERY, initial=done
        )
        self.shown = 0.0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, stage: str, kernel: MCMCKernel, info: Info | None = None) -> None:
        """Counts a transition; without its ``info``, the kernel's ``logging`` is shown."""
        self.bar.update()
        if self.bar.disable:
            return
        now, last = time.monotonic(), self.bar.n == self.bar.total
        if now - self.shown < self.EVERY and not last:
            return
        self.shown = now
        self.bar.set_description(f"{stage}, {self.label}", refresh=False)
        if info is None:
            text = ", ".join(f"{name} {value}" for name, value in (kernel.logging() or {}).items())
        else:
            assert isinstance(kernel, PyroKernel)
            rate = float(info.accept_prob.mean())
            step_size = kernel.mean_step_size
            text = f"acceptance {rate:.2f}, step size {step_size:.2e}"
        self.bar.set_postfix_str(text, refresh=last)


def cut_short(got: int, wanted: int, what: str = "draws per chain") -> None:
    """Warns that a run was cut short."""
    warnings.warn(f"interrupted: {got} of {wanted} {what} are kept", stacklevel=3)
