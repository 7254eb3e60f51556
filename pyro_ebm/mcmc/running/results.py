"""What a run gives its user: draws, statistics, diagnostics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.infer.mcmc.util import diagnostics as chain_diagnostics
from pyro.infer.mcmc.util import print_summary
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.mcmc.ranks import ALONE, ProcessGroup
from pyro_ebm.mcmc.running.vectorized import VectorizedRun


class Results(AbstractMCMC):
    """The part of :class:`~pyro_ebm.MCMC` that reads; a runner fills it.

    Args:
        kernel: the kernel.
        num_chains: number of chains.
        transforms: from the supports to the reals.
    """

    def __init__(
        self, kernel: MCMCKernel, num_chains: int, transforms: Mapping[str, Transform] | None
    ):
        super().__init__(kernel, num_chains, transforms)
        self._clear()

    def _clear(self) -> None:
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._samples: dict[str, Tensor] | None = None
        self._fields: dict[str, Tensor] = {}
        self._warmup_samples: dict[str, Tensor] | None = None
        self._warmup_fields: dict[str, Tensor] = {}
        self._diagnostics: list[dict[str, Any]] = []
        self._stored: Path | None = None
        self._ranks: ProcessGroup = ALONE

    def _take(self, run: VectorizedRun, transforms: Mapping[str, Transform]) -> None:
        """Takes the new draws of a run, of all ranks to the first."""
        ranks, records = self._ranks, run.records
        if "warmup" in records and self._warmup_samples is None:
            read = run.read(records["warmup"], transforms)
            self._warmup_samples, self._warmup_fields = (_to_first(ranks, part) for part in read)
        if run.store is not None:
            records["draws"].flush()
            self._stored = run.store.path
            return
        read = run.read(records["draws"], transforms)
        samples, fields = (_to_first(ranks, part) for part in read)
        self._samples = _joined(self._samples, samples)
        self._fields = _joined(self._fields, fields)
        if ranks.rank > 0:
            return
        reported = dict(run.kernel.diagnostics())
        reported.pop("sample_stats", None)
        rates = self._fields["acceptance_rate"].mean(1).tolist()
        self._diagnostics = [
            {**reported, "divergences": bad.nonzero().flatten().tolist(), "acceptance rate": rate}
            for bad, rate in zip(self._fields["diverging"], rates, strict=True)
        ]

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
        return _selected(self._done(), num_samples, group_by_chain)

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Statistics of each draw: ``lp``, ``acceptance_rate``, ``step_size``, ``diverging``.

        Some kernels tell more, as ``n_steps``. ``lp`` is :math:`-U(z)`, the log density on the
        unconstrained space. Pyro's own kernels tell ``diverging`` alone.

        Args:
            group_by_chain: whether to keep the chains apart.

        Returns:
            Shapes ``(chains, draws)`` or ``(chains * draws,)``.
        """
        self._done()
        return {k: v if group_by_chain else v.flatten() for k, v in self._fields.items()}

    def get_warmup_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """The draws of the warmup, kept with ``save_warmup=True``."""
        self._refuse_elsewhere()
        if self._warmup_samples is None:
            raise RuntimeError("no warmup was kept: give save_warmup=True and run")
        return _selected(self._warmup_samples, None, group_by_chain)

    def diagnostics(self) -> dict[str, Any]:
        """Split R-hat and effective sample size of each site; divergences and acceptance rates."""
        self._refuse_short("diagnostics")
        result = dict(chain_diagnostics(self._numbers()))
        for name in self._done().keys() - result.keys():  # of no elements
            nothing = self._done()[name].new_empty(self._done()[name].shape[2:])
            result[name] = {"n_eff": nothing, "r_hat": nothing}
        for name in self._diagnostics[0]:
            result[name] = {f"chain {i}": d[name] for i, d in enumerate(self._diagnostics)}
        return result

    def summary(self, prob: float = 0.9) -> None:
        """Prints mean, sd, median, interval, effective sample size and R-hat of every site."""
        self._refuse_short("a summary")
        print_summary(self._numbers(), prob=prob)
        if "diverging" in self._fields:
            print(f"Number of divergences: {int(self._fields['diverging'].sum())}")  # noqa: T201

    def to_arviz(self, **kwargs: Any) -> Any:
        """This run as ArviZ data; arguments as for :func:`pyro_ebm.to_arviz`.

        Draws that are in a ``store`` stay there: ArviZ reads what is looked at.
        """
        from pyro_ebm.diagnostics import open_store, to_arviz

        if self._stored is None:
            return to_arviz(self, **kwargs)
        if kwargs:
            raise ValueError(
                f"the draws are in {self._stored} and are opened as they are, without"
                f" {sorted(kwargs)}"
            )
        return open_store(self._stored)

    def _done(self) -> dict[str, Tensor]:
        if self._stored is not None:
            raise RuntimeError(
                f"the draws are not in memory but in the store {self._stored}: to_arviz() opens it"
            )
        self._refuse_elsewhere()
        if self._samples is None:
            raise RuntimeError("there are no draws yet: call run first")
        return self._samples

    def _refuse_elsewhere(self) -> None:
        if self._ranks.rank > 0 and self._stored is None:
            raise RuntimeError(
                f"this is rank {self._ranks.rank} of {self._ranks.size}, and the draws of all ranks"
                " are on rank 0: read them there, as in"
                " `if pyro_ebm.ops.distributed.rank() == 0: mcmc.summary()`"
            )

    def _numbers(self) -> dict[str, Tensor]:
        """The draws, whole numbers as real ones: their means are no whole numbers."""
        default = torch.get_default_dtype()
        return {
            name: draws if draws.is_floating_point() else draws.to(default)
            for name, draws in self._done().items()
            if draws.numel() > 0  # there is nothing to say of a site of no elements
        }

    def _refuse_short(self, what: str) -> None:
        for draws in self._done().values():
            if (got := draws.shape[1]) < 4:
                raise RuntimeError(f"{what} needs at least 4 draws of each chain, there are {got}")


def _selected(
    draws: Mapping[str, Tensor], num_samples: int | None, group_by_chain: bool
) -> dict[str, Tensor]:
    """As Pyro's ``select_samples`` has them, sites without elements too."""
    if not group_by_chain:
        draws = {name: value.flatten(0, 1) for name, value in draws.items()}
    if num_samples is None:
        return dict(draws)
    dim = int(group_by_chain)
    some = next(iter(draws.values()))
    index = torch.randint(0, some.shape[dim], (num_samples,), device=some.device)
    return {name: value.index_select(dim, index) for name, value in draws.items()}


def _to_first(ranks: ProcessGroup, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws ``(chains, draws, ...)`` of all chains on rank 0; nothing elsewhere."""
    found = {name: ranks.to_first(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def _joined(before: Mapping[str, Tensor] | None, after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws ``(chains, draws, ...)``, and those that came after them."""
    if not before:
        return after
    return {name: torch.cat([before[name], value], 1) for name, value in after.items()}
