"""What a run returns: the draws and statistics of every chain, and the summaries of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer.mcmc.api import MCMC as PyroMCMC
from pyro.infer.mcmc.util import diagnostics as chain_diagnostics
from pyro.infer.mcmc.util import print_summary
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.diagnostics.convergence import Finding
from pyro_ebm.diagnostics.superchains import nested_diagnostics, print_nested_summary
from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.files import Saved
from pyro_ebm.internals.pyro_state import arguments_of_run, has_run, reported_by_chains

Values = Mapping[str, Tensor]


@dataclass(frozen=True, repr=False)
class Results:
    """The draws of a run, and what its model was called with.

    Attributes:
        samples: the draws of each site in its support, shape ``(chains, draws, *site)``.
        fields: the statistics of each draw, shape ``(chains, draws)``.
        reported: the diagnostics that the kernel of each chain gives at its end.
        warmup_samples: the draws of the warmup; None where they are not kept.
        warmup_fields: their statistics.
        transforms: from the supports to the reals.
        model: the Pyro model, or a distribution; None for a kernel on a potential function.
        args: the positional arguments of the model.
        kwargs: its keyword arguments.
        store: the folder of the draws where they are on disk, not in ``samples``.
        requested: the shape of a run with neither sites nor statistics.
        findings: what is wrong with the draws, as the run's warning says it.
        num_superchains: how many super-chains started together; None where chains did not.
        notes: what is to be known of the draws of this kernel, whatever they are.
    """

    samples: Values
    fields: Values
    reported: Sequence[Saved] = ()
    warmup_samples: Values | None = None
    warmup_fields: Values = field(default_factory=dict)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    model: Model | None = None
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    store: Path | None = None
    requested: tuple[int, int] = (0, 0)
    findings: Sequence[Finding] = ()
    num_superchains: int | None = None
    notes: Sequence[str] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of chains and of draws."""
        for value in (*self.samples.values(), *self.fields.values()):
            return value.shape[0], value.shape[1]
        return self.requested

    def __repr__(self) -> str:
        chains, draws = self.shape
        what = f"of {[*self.samples]}" if self.store is None else f"in {self.store}"
        return f"Results({chains} chains of {draws} draws {what})"

    @classmethod
    def of(cls, mcmc: object) -> "Results":
        """The results of a :class:`pyro_ebm.MCMC` or a ``pyro.infer.MCMC``.

        Raises:
            RuntimeError: if it has not run.
            TypeError: if it keeps no draws.
        """
        if not isinstance(mcmc, PyroMCMC):
            results = getattr(mcmc, "results", None)
            if isinstance(results, Results):
                return results
            raise TypeError(
                "to_arviz wants a pyro_ebm.MCMC or pyro.infer.MCMC, which keep their draws, got"
                f" {type(mcmc).__name__}"
            )
        if not has_run(mcmc):
            raise RuntimeError("there are no draws yet: call run first")
        args, kwargs = arguments_of_run(mcmc)
        return cls.of_chains(
            mcmc.get_samples(group_by_chain=True) or {},
            reported_by_chains(mcmc),
            mcmc.num_samples,
            model=getattr(mcmc.kernel, "model", None),
            args=args,
            kwargs=kwargs,
            requested=(mcmc.num_chains, mcmc.num_samples),
        )

    @classmethod
    def of_chains(
        cls,
        samples: Values,
        reported: Sequence[Saved],
        num_draws: int,
        thinning: int = 1,
        **parts: Any,
    ) -> "Results":
        """The results of chains that were run by themselves.

        Args:
            samples: their draws.
            reported: the diagnostics of the kernel of each chain, ``"sample_stats"`` among them.
            num_draws: see :func:`fields_of`.
            thinning: every ``thinning``-th transition is a draw.
            **parts: the other attributes.
        """
        fields = fields_of(reported, num_draws, thinning)
        kept = [{k: v for k, v in chain.items() if k != "sample_stats"} for chain in reported]
        return cls(samples, fields, kept, **parts)

    def thinned(self, thinning: int) -> "Results":
        """Every ``thinning``-th draw."""
        parts = (self.samples, self.fields)
        samples, fields = ({k: v[:, thinning - 1 :: thinning] for k, v in p.items()} for p in parts)
        return replace(self, samples=samples, fields=fields)

    def followed_by(self, later: "Results") -> "Results":
        """These draws and the later ones of the same chains; of the warmup, these."""
        return replace(
            later,
            samples=_joined(self.samples, later.samples),
            fields=_joined(self.fields, later.fields),
            warmup_samples=self.warmup_samples,
            warmup_fields=self.warmup_fields,
        )

    def diagnostics(self) -> Saved:
        """R-hat and effective sample size of each site, and what the kernels report.

        Nested R-hat of super-chains, else split R-hat.
        """
        self._check_length("diagnostics")
        num, draws = self.num_superchains, self._as_floats()
        result: Saved = (
            dict(chain_diagnostics(draws))
            if num is None
            else {name: nested_diagnostics(x, num) for name, x in draws.items()}
        )
        for name, draws in self.samples.items():
            if name not in result:  # a site without elements
                nothing = draws.new_empty(draws.shape[2:])
                result[name] = {"n_eff": nothing, "r_hat": nothing}
        for name in self.reported[0]:
            result[name] = {f"chain {i}": chain[name] for i, chain in enumerate(self.reported)}
        return result

    def summary(self, prob: float) -> None:
        """Prints mean, sd, median, interval, ESS and R-hat of every site, findings and notes."""
        self._check_length("a summary")
        if self.num_superchains is None:
            print_summary(self._as_floats(), prob=prob)
        else:
            print_nested_summary(self._as_floats(), self.num_superchains, prob)
        if "diverging" in self.fields:
            print(f"Number of divergences: {int(self.fields['diverging'].sum())}")  # noqa: T201
        for finding in self.findings:
            print(finding)  # noqa: T201
        for note in self.notes:
            print(f"{note}.")  # noqa: T201

    def _as_floats(self) -> dict[str, Tensor]:
        """The draws of sites that have elements; integers as floats, since their means are."""
        default = torch.get_default_dtype()
        return {
            name: draws if draws.is_floating_point() else draws.to(default)
            for name, draws in self.samples.items()
            if draws.numel() > 0
        }

    def _check_length(self, what: str) -> None:
        if self.samples and self.num_superchains is None and self.shape[1] < 4:
            raise RuntimeError(
                f"{what} needs at least 4 draws of each chain, there are {self.shape[1]}"
            )


def select(draws: Values, num_samples: int | None, group_by_chain: bool) -> dict[str, Tensor]:
    """Draws ``(chains, draws, *site)`` as Pyro's ``select_samples`` returns them.

    Those of sites without elements too. See :meth:`pyro_ebm.MCMC.get_samples`.
    """
    if not group_by_chain:
        draws = {name: value.flatten(0, 1) for name, value in draws.items()}
    if num_samples is None:
        return dict(draws)
    dim = int(group_by_chain)
    some = next(iter(draws.values()))
    index = torch.randint(0, some.shape[dim], (num_samples,), device=some.device)
    return {name: value.index_select(dim, index) for name, value in draws.items()}


def fields_of(reported: Sequence[Saved], num_draws: int, thinning: int = 1) -> dict[str, Tensor]:
    """The statistics of each draw from what the kernel of each chain reports at its end.

    Args:
        reported: one dict for each chain, with all ``"sample_stats"``, or ``"divergences"``.
        num_draws: the number of draws after thinning; an interrupt may leave one statistic more.
        thinning: every ``thinning``-th transition is a draw.

    Returns:
        Shapes ``(chains, draws)``.
    """
    thin = slice(thinning - 1, thinning * num_draws, thinning)
    if all("sample_stats" in chain for chain in reported):
        stats = [chain["sample_stats"] for chain in reported]
        return {name: torch.stack([s[name][thin] for s in stats]) for name in stats[0]}
    if all("divergences" in chain for chain in reported):
        steps = torch.arange(thinning * num_draws)
        rows = [torch.isin(steps, torch.tensor(chain["divergences"])) for chain in reported]
        return {"diverging": torch.stack(rows)[:, thin]}
    return {}


def _joined(before: Values, after: Values) -> Values:
    return {name: torch.cat([before[name], value], 1) for name, value in after.items()}


__all__ = ["Results", "fields_of", "select"]
