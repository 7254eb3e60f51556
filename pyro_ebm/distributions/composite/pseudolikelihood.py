r"""The pseudolikelihood as the likelihood of a model, where log Z is out of reach.

In place of the density of data :math:`x` given parameters :math:`\theta` stands the product of
conditionals of :mod:`pyro_ebm.distributions.composite.conditionals`,

.. math:: p_c(\theta \mid x) \propto p(\theta) \prod_B p_\theta(x_B \mid x_{-B}) .

Its maximum is consistent. But the terms are not independent, and are added as if they were: this
*composite posterior* is no posterior, and its spread is not the error of its own maximum. Mostly it
is too narrow, the more so the more variables interact and the more blocks overlap, and by a factor
that does not fall as data grow. :func:`~pyro_ebm.curvature_adjustment` corrects that. What it does
not bring back is what the conditionals leave out: where variables interact, the corrected posterior
is wider than the posterior itself.

It is no density of :math:`x`, for it does not sum to 1. So it may stand at observed sites only, it
draws no data, and no evidence is computed with it.

Reference:
    Besag (1975), Statistical analysis of non-lattice data. Pauli, Racugno and Ventura (2011),
    Bayesian composite marginal likelihoods.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Self

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_ebm.distributions.checks.callers import site_at_hand
from pyro_ebm.distributions.composite.conditionals import (
    Blocks,
    blocks_of,
    checked_blocks,
    log_composite,
)
from pyro_ebm.distributions.core.introspection import readable
from pyro_ebm.distributions.core.wrappers import composite_part, unmasked
from pyro_ebm.distributions.energy import UnnormalizedEnergy, find_energy
from pyro_ebm.ops.arguments import shown


class CompositeLikelihood(TorchDistribution):
    """A product of conditional densities in the place of a density: see :func:`pseudolikelihood`.

    Args:
        energy: the discrete energy.
        blocks: blocks of its variables, or None for every variable alone.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False
    is_composite = True

    def __init__(self, energy: UnnormalizedEnergy, blocks: Blocks | None):
        self.energy, self.blocks = energy, blocks
        super().__init__(energy.batch_shape, energy.event_shape, validate_args=False)
        blocks_of(energy, blocks)  # errors come now

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Where the data live."""
        return self.energy.support

    def expand(
        self, batch_shape: torch.Size | tuple[int, ...], _instance: Self | None = None
    ) -> Self:
        """A copy with a larger batch."""
        return type(self)(self.energy.expand(batch_shape), self.blocks)

    def log_prob(self, value: Tensor) -> Tensor:
        r""":math:`\sum_B \log p(x_B \mid x_{-B})`.

        Args:
            value: points, shape ``(*sample, *batch, *event)``.

        Returns:
            Shape ``(*sample, *batch)``.

        Raises:
            ValueError: at a site of a model that is latent or masked, and for values outside of
                the support.
        """
        _refuse_site()
        value = self.energy.broadcast(value)
        if self.energy._validate_args and value.numel():
            self.energy.check_values(value)
        return log_composite(self.energy, value, blocks_of(self.energy, self.blocks))

    def mask(self, mask: Any) -> Any:
        """Refused, but for the mask True: a conditional of what is missing is not known."""
        if mask is True:
            return self
        raise ValueError(f"{self!r} cannot be masked: {_MASKED}")

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> NoReturn:
        """Refused: it is no density of points."""
        raise ValueError(f"{_site_name()}{self!r} has no draws: {_LATENT}")

    def enumerate_support(self, expand: bool = True) -> NoReturn:
        """Refused: it is no density of points."""
        raise ValueError(f"{_site_name()}{self!r} cannot be enumerated: {_LATENT}")

    def __repr__(self) -> str:
        of = "" if self.blocks is None else f", {len(self.blocks)} blocks"
        return f"pseudolikelihood({self.energy!r}{of})"


def pseudolikelihood(
    p: UnnormalizedEnergy, blocks: Iterable[Sequence[int] | Tensor] | None = None
) -> CompositeLikelihood:
    r"""The pseudolikelihood of a discrete energy, as a likelihood that needs no :math:`Z`.

    .. math:: \log \mathrm{PL}(x) = \sum_i \log p(x_i \mid x_{-i}), \qquad
              \text{with blocks} \quad \sum_B \log p(x_B \mid x_{-B})

    Latents that move the energy, and its unknown :math:`Z`, may stand in front of it, with any
    kernel, ``NUTS`` or a guide: what is sampled is the *composite posterior*, which is mostly too
    narrow where variables interact. :func:`~pyro_ebm.curvature_adjustment` corrects that;
    :class:`~pyro_ebm.ExchangeKernel` samples the posterior itself.

    Its site must be observed, in full and without a mask. It has no draws, and no evidence.

    Args:
        p: the energy. Sums over the values of a variable are in closed form for Boltzmann machines,
            Potts models and restricted Boltzmann machines; of other energies they take
            :math:`K - 1` evaluations for each of n variables of K values.
        blocks: indices of the variables that are summed over together, which costs their
            :math:`K^{|B|}` states. Larger blocks come nearer to the likelihood. A variable in no
            block is given, and no part of the data. By default every variable alone.

    Raises:
        ValueError: for an energy that is not discrete, indices out of range, and (when used) a site
            that is latent, enumerated, masked or missing.

    Reference:
        Besag (1975), Statistical analysis of non-lattice data. Strauss and Ikeda (1990),
        Pseudolikelihood estimation for social networks.

    Example:
        >>> from pyro.infer import MCMC, NUTS
        >>> from pyro_ebm.distributions import BoltzmannMachine, lattice_edges
        >>> edges = lattice_edges(6, 6)
        >>> def model(x):
        ...     J = pyro.sample("J", dist.Uniform(0.0, 1.0))
        ...     pyro.sample("x", pseudolikelihood(BoltzmannMachine(J, edges=edges)), obs=x)
        >>> x = BoltzmannMachine(0.3, edges=edges).sample()
        >>> mcmc = MCMC(NUTS(model), 100, 100, disable_progbar=True)
        >>> mcmc.run(x)
        >>> bool((mcmc.get_samples()["J"].mean() - 0.3).abs() < 0.3)
        True
    """
    if not isinstance(p, UnnormalizedEnergy):
        way = ""
        if find_energy(p) is not None:
            way = f" inside {type(p).__name__}: wrap the energy itself, and this in turn, as by"
            way += " pseudolikelihood(p).to_event(1)"
        raise ValueError(f"p must be an UnnormalizedEnergy, got {shown(p)}{way}")
    return CompositeLikelihood(p, checked_blocks(blocks))


_LATENT = (
    "a pseudolikelihood is no density of the data, and stands at observed sites only. Give it"
    " obs=, and draw from, sample or enumerate the energy that it was made of"
)
_MASKED = (
    "a pseudolikelihood is no density of the data, so that what is missing cannot be left out."
    " Leave masked rows out of the data, or use the loss PseudoLikelihood, which takes them"
)


def _refuse_site() -> None:
    """Refuses the site of a model's trace that is being evaluated, if it is latent or masked."""
    if torch.compiler.is_compiling():
        return
    site = site_at_hand()
    if site is None or composite_part(site["fn"]) is None:
        return
    if not site["is_observed"]:
        raise ValueError(f"site {site['name']!r} is latent: {_LATENT}")
    _, mask, _ = unmasked(site["fn"], site["mask"])
    if mask is not None and not (readable(mask) and bool(mask.all())):
        raise ValueError(f"site {site['name']!r} is masked: {_MASKED}")


def _site_name() -> str:
    site = site_at_hand()
    return "" if site is None else f"site {site['name']!r}: "
