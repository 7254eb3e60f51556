"""What can be read of a run, once it is over."""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_ebm.diagnostics.arviz import open_store, to_arviz
from pyro_ebm.diagnostics.convergence import Finding
from pyro_ebm.diagnostics.results import Results, select
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.ranks import ALONE, ProcessGroup
from pyro_ebm.ops.arguments import shown


class ReadableRun(AbstractMCMC):
    """The part of :class:`~pyro_ebm.MCMC` that reads its draws: none of it changes them."""

    num_samples: int
    _results: Results | None = None
    _ranks: ProcessGroup = ALONE

    @abstractmethod
    def run(self, *args: object, **kwargs: object) -> None:
        """Makes the draws."""

    @property
    def results(self) -> Results:
        """The draws and statistics, and what the model was called with.

        Raises:
            RuntimeError: before a run; on another rank than the first; for draws in a ``store``.
        """
        results = self._kept()
        if results.store is not None:
            raise RuntimeError(
                f"the draws are not in memory but in the store {results.store}: to_arviz() opens it"
            )
        return results

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False
    ) -> dict[str, Tensor]:
        """The draws, in the supports of their sites.

        Args:
            num_samples: if given, this many draws are resampled with replacement.
            group_by_chain: whether to keep the chains apart.

        Returns:
            Each site's draws, shape ``(chains, draws, *site)`` or ``(chains * draws, *site)``.
        """
        return select(self.results.samples, num_samples, group_by_chain)

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Statistics of each draw: ``lp``, ``acceptance_rate``, ``step_size``, ``diverging``.

        Some kernels have more, such as ``n_steps``. ``lp`` is :math:`-U(z)`, the log density on the
        unconstrained space. Pyro's own kernels have ``diverging`` alone.

        Args:
            group_by_chain: whether to keep the chains apart.

        Returns:
            Shapes ``(chains, draws)`` or ``(chains * draws,)``.
        """
        return select(self.results.fields, None, group_by_chain)

    def get_warmup_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """The draws of the warmup, kept with ``save_warmup=True``."""
        warmup = None if self._results is None else self._kept().warmup_samples
        if warmup is None:
            raise RuntimeError("no warmup was kept: give save_warmup=True and run")
        return select(warmup, None, group_by_chain)

    def diagnostics(self) -> dict[str, dict[str, object]]:
        """Split R-hat and effective sample size of each site; divergences and acceptance rates."""
        return self.results.diagnostics()

    def summary(self, prob: float = 0.9) -> None:
        """Prints mean, sd, median, interval, effective sample size and R-hat of every site."""
        self.results.summary(prob)

    @property
    def has_store(self) -> bool:
        """Whether the draws are on disk."""
        return self._results is not None and self._results.store is not None

    @property
    def findings(self) -> Sequence[Finding]:
        """What is wrong with the draws, as the warning said it; none where it was not looked for.

        Of a rank other than the first, those of a ``store`` alone.
        """
        return () if self._results is None else self._results.findings

    def to_arviz(self, **kwargs: Any) -> Any:
        """This run as ArviZ data; the arguments are those of :func:`pyro_ebm.to_arviz`.

        Draws that are in a ``store`` stay there: ArviZ reads what is looked at.
        """
        store = None if self._results is None else self._results.store
        if store is None:
            return to_arviz(self, **kwargs)
        if kwargs:
            raise ValueError(
                f"the draws are in {store} and are opened as they are, without {sorted(kwargs)}"
            )
        return open_store(store)

    def _kept(self) -> Results:
        """What the last run returned."""
        if self._results is None:
            raise RuntimeError("there are no draws yet: call run first")
        if self._ranks.rank > 0 and self._results.store is None:
            raise RuntimeError(
                f"this is rank {self._ranks.rank} of {self._ranks.size}, and the draws of all ranks"
                " are on rank 0: read them there, as in"
                " `if pyro_ebm.ops.distributed.rank() == 0: mcmc.summary()`"
            )
        return self._results

    def __repr__(self) -> str:
        """The settings that differ from their defaults, and what was drawn."""
        given = inspect.signature(type(self).__init__).parameters.items()
        own = "vectorized" if isinstance(self.kernel, PyroKernel) else "sequential"
        defaults = {"warmup_steps": self.num_samples, "chain_method": own}
        settings = [
            f"{name}={shown(getattr(self, name))}"
            for name, parameter in given
            if name not in ("self", "kernel", "transforms")
            and getattr(self, name) != defaults.get(name, parameter.default)
        ]
        if self._results is None:
            drawn = "not run yet"
        elif self._results.store is not None:
            drawn = f"draws in {self._results.store}"
        elif self._ranks.rank > 0:
            drawn = "draws on rank 0"
        else:
            drawn = "{} chains of {} draws".format(*self._results.shape)
        return f"{type(self).__name__}({', '.join([repr(self.kernel), *settings])}): {drawn}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "runner": None}
