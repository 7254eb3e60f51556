r"""The curvature of a composite likelihood, and the correction of the posterior that it makes.

A composite log likelihood :math:`\ell_c(\theta)`, such as a pseudolikelihood, adds terms that are
not independent as if they were. At its maximum :math:`\hat\theta` two matrices that are equal for a
likelihood differ: the *sensitivity* :math:`H = -\nabla^2 \ell_c` and the *variability*
:math:`J = \operatorname{Var} \nabla \ell_c` over data. The estimate has the covariance
:math:`H^{-1} J H^{-1}`, and the composite posterior :math:`H^{-1}`, which is mostly narrower. So
the likelihood is stretched about its maximum,

.. math:: \ell_{adj}(\theta) = \ell_c\big(\hat\theta + C (\theta - \hat\theta)\big), \qquad
          C = H^{-1/2} (H J^{-1} H)^{1/2},

which has the curvature :math:`C^\top H C = H J^{-1} H` of a likelihood with that covariance. The
prior stays as it is. All is in the unconstrained coordinates of the latents.

Where data are many and independent, :math:`J` is the sum of the outer products of their scores. Of
a single lattice or network there is one score, and it is 0 at :math:`\hat\theta`: :math:`J` is then
the covariance of the scores of data that are simulated at :math:`\hat\theta`.

Reference:
    Ribatet, Cooley and Davison (2012), Bayesian inference from composite likelihoods, with an
    application to spatial extremes. Godambe (1960), An optimum property of regular maximum
    likelihood estimation.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.distributions.core.supports import as_function
from pyro_ebm.distributions.core.wrappers import composite_part
from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.distributions.enumerated import EnumeratedEnergy
from pyro_ebm.models.adjusted_model import AdjustedModel, constrained, is_deterministic
from pyro_ebm.models.runs import BoundModel, latents_of, sample_sites, site_of, value_of
from pyro_ebm.models.sites.latents import SampleSite
from pyro_ebm.models.sites.site import Site
from pyro_ebm.models.transforms import transforms_of
from pyro_ebm.ops.arguments import check_count, shown

MAX_STEPS = 100
"""How many steps of Newton's method look for the maximum."""


@dataclasses.dataclass(frozen=True, repr=False)
class CurvatureAdjustment:
    """The maximum of a composite likelihood, its errors, and the model that is corrected by them.

    Matrices are of the unconstrained latents, flat, in the order of ``mode``.
    """

    model: Model
    """The model with the stretched likelihood: sample it with any kernel or guide, with the same
    arguments. Its latents and their priors are those of the model that was given."""
    mode: dict[str, Tensor]
    """The maximum composite likelihood estimate of each latent, on its support."""
    std_error: dict[str, Tensor]
    r"""Its standard errors, from :math:`H^{-1} J H^{-1}`."""
    naive_std_error: dict[str, Tensor]
    r"""Those that the composite likelihood alone claims, from :math:`H^{-1}`."""
    sensitivity: Tensor
    """H, shape ``(d, d)``."""
    variability: Tensor
    """J, shape ``(d, d)``."""
    adjustment: Tensor
    """C, shape ``(d, d)``."""

    def __repr__(self) -> str:
        rows = [
            f"{name} = {_short(value)} +- {_short(self.std_error[name])}"
            f" (+- {_short(self.naive_std_error[name])} without)"
            for name, value in self.mode.items()
        ]
        return f"CurvatureAdjustment({', '.join(rows)})"


def curvature_adjustment(
    model: Model,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    plate: str | None = None,
    num_simulations: int = 1000,
) -> CurvatureAdjustment:
    r"""Corrects the spread of a composite posterior, which is not that of its own error.

    .. math:: \ell_{adj}(\theta) = \ell_c\big(\hat\theta + C (\theta - \hat\theta)\big), \qquad
              C^\top H C = H J^{-1} H

    The latents must be continuous parameters of the likelihood: each is estimated by its maximum,
    without the prior. So it is not for latents of single data, nor for those of which the data say
    nothing. Around a maximum at the edge, or with few data, the correction is as rough as the
    normal approximation of the estimate.

    Args:
        model: a Pyro model that observes a :func:`~pyro_ebm.pseudolikelihood`.
        args: its positional arguments, the data among them.
        kwargs: its keyword arguments.
        plate: the name of the plate whose elements are independent data, for :math:`J` from their
            scores; it wants many more of them than parameters. By default :math:`J` is simulated.
        num_simulations: how many data sets are drawn at the estimate: from the energies, exactly
            where they can, else by their chains, as ``sample()`` of the energy draws. Sites that
            are observed are drawn independently: none may be computed from the data of another.

    Returns:
        The corrected model, the estimate, and its standard errors with and without correction.

    Raises:
        ValueError: if the model observes no pseudolikelihood, has no continuous latents, or the
            composite likelihood has no maximum, as where all spins are alike.

    Reference:
        Ribatet, Cooley and Davison (2012), Bayesian inference from composite likelihoods, with an
        application to spatial extremes.

    Example:
        >>> from pyro_ebm import BoltzmannMachine, pseudolikelihood
        >>> from pyro_ebm.distributions import lattice_edges
        >>> edges = lattice_edges(8, 8)
        >>> def model(x):
        ...     J = pyro.sample("J", dist.Uniform(0.0, 1.0))
        ...     pyro.sample("x", pseudolikelihood(BoltzmannMachine(J, edges=edges)), obs=x)
        >>> x = BoltzmannMachine(0.3, edges=edges).sample()
        >>> fit = curvature_adjustment(model, (x,), num_simulations=200)
        >>> fit.mode.keys() == fit.std_error.keys() == {"J"}
        True
        >>> from pyro.infer import MCMC, NUTS
        >>> mcmc = MCMC(NUTS(fit.model), 100, 100, disable_progbar=True)
        >>> mcmc.run(x)
    """
    if not callable(model):
        raise ValueError(f"model must be a function, got {shown(model)}")
    check_count("num_simulations", num_simulations, 2)
    for name, value, kind in (
        ("args", args, tuple),
        ("kwargs", {} if kwargs is None else kwargs, Mapping),
        ("plate", "" if plate is None else plate, str),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__.lower()}, got {shown(value)}")
    likelihood = CompositeTerms(BoundModel(model, args, kwargs or {}))
    z, hessian = likelihood.maximum()
    scores = likelihood.scores(z, plate, num_simulations)
    if plate is None:
        variability = torch.cov(scores.mT).reshape(hessian.shape)
    else:
        variability = scores.mT @ scores
    if not _is_positive(variability):
        raise ValueError(
            f"the scores of {len(scores)} {'simulated data sets' if plate is None else 'data'} do"
            f" not span the {len(z)} parameters: more of them are needed (num_simulations=, or"
            " data), or a parameter less"
        )
    inverse = torch.linalg.inv(hessian)
    information = hessian @ torch.linalg.solve(variability, hessian)
    adjustment = torch.linalg.solve(_root(hessian), _root(information))
    covariance = inverse @ variability @ inverse
    return CurvatureAdjustment(
        AdjustedModel(model, likelihood.sites, z, adjustment),
        {name: x.detach() for name, x in likelihood.constrain(z).items()},
        likelihood.errors(z, covariance),
        likelihood.errors(z, inverse),
        hessian,
        variability,
        adjustment,
    )


class CompositeTerms:
    """The log likelihood of a model as a function of its flat unconstrained latents.

    Args:
        bound: the model, with its arguments.
    """

    def __init__(self, bound: BoundModel):
        trace = bound.trace()
        nodes = sample_sites(trace)
        self.bound = bound
        observed = [(name, node) for name, node in nodes.items() if node["is_observed"]]
        self.observed = [name for name, node in observed if not is_deterministic(node)]
        if all(composite_part(nodes[name]["fn"]) is None for name in self.observed):
            raise ValueError(
                f"the model observes no pseudolikelihood, but {self.observed or 'nothing'}: its"
                " posterior needs no correction"
            )
        transforms = transforms_of(trace, {}, {}, keep_discrete=False)
        if unmoved := sorted(latents_of(trace).keys() - transforms.keys()):
            raise ValueError(f"the latents {unmoved} are discrete: the correction is of real ones")
        if not transforms:
            raise ValueError("the model has no latents whose posterior could be corrected")
        values = {name: as_function(t)(value_of(trace, name)) for name, t in transforms.items()}
        self.sites = [
            Site(name, z.shape, z.dtype, transforms[name], z.device) for name, z in values.items()
        ]
        self.start = torch.cat([torch.zeros_like(z).flatten() for z in values.values()])

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """The values of the latents at unconstrained ones, shape ``(d,)``."""
        return constrained(self.sites, z)

    def nodes(self, z: Tensor) -> dict[str, SampleSite]:
        """The observed sites at unconstrained latents."""
        trace = self.bound.trace_at(self.constrain(z))
        trace.compute_log_prob(site_filter=lambda name, site: name in self.observed)
        return {name: site_of(trace, name) for name in self.observed}

    def __call__(self, z: Tensor) -> Tensor:
        """The log likelihood, a scalar."""
        return torch.stack([node["log_prob_sum"] for node in self.nodes(z).values()]).sum()

    def maximum(self) -> tuple[Tensor, Tensor]:
        """The maximum by Newton's method, ``(d,)``, and minus the Hessian there.

        Raises:
            ValueError: if there is none.
        """
        z = self.start
        eps = torch.finfo(z.dtype).eps
        for _ in range(MAX_STEPS):
            z = z.detach().requires_grad_()
            value = self(z)
            (gradient,) = torch.autograd.grad(value, z, create_graph=True)
            if not (gradient.requires_grad and gradient.isfinite().all()):
                break
            hessian = -jacobian(gradient, z).detach()
            if not (hessian.isfinite().all() and hessian.any()):
                break
            # uphill too where it is not concave
            eigenvalues, basis = torch.linalg.eigh(hessian)
            least = len(z) * eigenvalues.abs().amax() * eps
            step = basis @ ((basis.mT @ gradient.detach()) / eigenvalues.abs().clamp(min=least))
            # the squared distance to the maximum, in standard deviations of H^-1
            distance = float(step @ gradient.detach())
            if distance < eps**0.5 and step.norm() < eps**0.25 and (eigenvalues > least).all():
                return (z + step).detach(), hessian
            step = step / (step.norm() / 2).clamp(min=1)
            with torch.no_grad():
                for _ in range(30):
                    if self(z + step) >= value - 100 * eps * (1 + value.abs()):
                        break
                    step = step / 2
            z = z + step
        names = [site.name for site in self.sites]
        raise ValueError(
            f"the composite likelihood has no maximum in {names}: data that are all alike, or a"
            " latent that moves no likelihood, have none. Leave it out, or sample the composite"
            " posterior as it is"
        )

    def scores(self, z: Tensor, plate: str | None, num_simulations: int) -> Tensor:
        """Scores of independent data, those of a plate or simulated, shape ``(n, d)``."""
        z = z.requires_grad_()
        nodes = self.nodes(z)
        if plate is None:
            terms = [_simulated(name, node, num_simulations) for name, node in nodes.items()]
        else:
            terms = [_by_element(name, node, plate) for name, node in nodes.items()]
        return jacobian(torch.stack(terms).sum(0), z).detach()

    def errors(self, z: Tensor, covariance: Tensor) -> dict[str, Tensor]:
        """Standard errors of the latents on their supports, by the delta method."""
        z = z.detach().requires_grad_()
        found = {}
        for name, x in self.constrain(z).items():
            slope = jacobian(x.flatten(), z)
            variance = ((slope @ covariance) * slope).sum(-1)
            found[name] = variance.sqrt().reshape(x.shape).detach()
        return found


def jacobian(y: Tensor, z: Tensor) -> Tensor:
    """The derivatives of ``y``, shape ``(n,)``, in ``z``, shape ``(d,)``: a matrix ``(n, d)``.

    Of ``min(n, d)`` backward passes: gradients of :math:`v^T J` in v are columns.

    Example:
        >>> z = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> jacobian(torch.stack([z[0] * z[1], z[1] ** 2, z[0]]), z)
        tensor([[2., 1.],
                [0., 4.],
                [1., 0.]])
    """
    if len(y) <= len(z):
        return torch.stack([torch.autograd.grad(each, z, retain_graph=True)[0] for each in y])
    v = torch.zeros_like(y, requires_grad=True)
    (products,) = torch.autograd.grad(y, z, v, create_graph=True)
    columns = [torch.autograd.grad(each, v, retain_graph=True)[0] for each in products]
    return torch.stack(columns, -1)


def _simulated(name: str, node: SampleSite, num: int) -> Tensor:
    """The log likelihoods of data that are drawn from a site's density, shape ``(num,)``."""
    fn, shape = node["fn"], (num,)
    part: Any = composite_part(fn)
    with torch.no_grad():
        x = fn.sample(shape) if part is None else _draws(part.energy, shape)
    term = scale_and_mask(fn.log_prob(x), node["scale"], node["mask"])
    return term.reshape(num, -1).sum(-1)


def _draws(energy: UnnormalizedEnergy, shape: tuple[int, ...]) -> Tensor:
    """Exact draws where there are some, else those of chains."""
    if isinstance(energy, EnumeratedEnergy):
        with contextlib.suppress(ValueError):  # too many states
            return energy.exact_sample(shape)
    return energy.sample(shape)


def _by_element(name: str, node: SampleSite, plate: str) -> Tensor:
    """The log likelihoods of the elements of a plate, shape ``(size,)``."""
    dims = {frame.name: frame.dim for frame in node["cond_indep_stack"]}
    dim = dims.get(plate)
    if dim is None:
        raise ValueError(
            f"site {name!r} is in the plates {sorted(dims)}, and not in plate={plate!r} with a dim:"
            " all data must be in it, for its elements to be independent"
        )
    full = {frame.name: frame.full_size for frame in node["cond_indep_stack"]}
    term = node["log_prob"].movedim(dim, 0)
    if len(term) != full[plate]:
        raise ValueError(f"plate {plate!r} is subsampled: the curvature is that of all data")
    return term.reshape(len(term), -1).sum(-1)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive definite matrix."""
    values, basis = torch.linalg.eigh(matrix)
    return (basis * values.sqrt()) @ basis.mT


def _is_positive(matrix: Tensor) -> bool:
    values = torch.linalg.eigvalsh(matrix)
    return bool(values[0] > len(values) * values[-1] * torch.finfo(matrix.dtype).eps)


def _short(x: Tensor) -> str:
    return f"{x.item():.4g}" if x.dim() == 0 else str([float(f"{v:.4g}") for v in x.flatten()])
