r"""The path from the prior of a model, or a guide, to its joint density.

Let :math:`z` be the latents of a model in unconstrained coordinates, and :math:`y` its data. Then

.. math:: \tilde p_1(z) = p(x(z), y)\, \left| \det \frac{\partial x}{\partial z} \right|,
          \qquad \int \tilde p_1(z)\, dz = p(y),

and a model is an energy whose :math:`Z` is the evidence of its data. From the prior the geometric
path is that of the *power posteriors*,

.. math:: \tilde p_\beta(z) \propto p(z)\, p(y \mid z)^\beta,

and from a guide :math:`q` it is :math:`q(z)^{1 - \beta}\, p(z, y)^\beta`: the nearer the guide is
to the posterior, the shorter. Discrete latents are summed out on both sides, or are coordinates of
:math:`z`, which discrete kernels move.

Reference:
    Friel and Pettitt (2008), Marginal likelihood estimation via power posteriors. Lefebvre, Steele
    and Vandal (2010), A path sampling identity for computing the Kullback-Leibler and J divergences
    (from other densities than the prior).
"""

from collections.abc import Collection, Mapping

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.evidence.model_starts import Guide, GuideStart, PriorStart
from pyro_ebm.evidence.proper import check_proper
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.models.sites.latents import InitStrategy
from pyro_ebm.normalizer.annealing.path import GeometricPath


class ModelPath(GeometricPath):
    """The geometric path from a normalized density over a model's latents to the model itself.

    :meth:`of_model` makes one.

    Args:
        target: the potential of the model.
        start: a normalized density on its positions, but for idle elements of masked latents
            (:mod:`pyro_ebm.models.masks`) if it is the prior.

    Example:
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> path = ModelPath.of_model(model, (torch.tensor(2.0),))
        >>> path.at(0.5)(torch.zeros(1, 1))  # log(2 pi) (1 + 1 / 2) / 2 + 2^2 / 4
        tensor([2.3784])
    """

    def __init__(self, target: ModelPotential, start: PriorStart | GuideStart):
        # a factor of the target, and of the prior too
        idle = 0.0 if isinstance(start, PriorStart) else target.idle_log_normalizer
        super().__init__(target, start, -idle)
        self.model = target

    def parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """The potentials of start and target, without the gradients of their parameters."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and z.requires_grad):
            return super().parts(z)

    @classmethod
    def of_model(
        cls,
        model: Model,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
        guide: Guide | None = None,
        *,
        improper: Collection[str] = (),
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: InitStrategy = init_to_uniform,
        keep_discrete: bool = False,
    ) -> "ModelPath":
        """The path to a model at its arguments.

        Args:
            model: a Pyro model.
            args: its positional arguments.
            kwargs: its keyword arguments.
            guide: where to start, instead of at the prior (of an energy with a base, there).
            improper: sites whose prior may be improper; they need a guide.
            transforms: from the supports to the reals, where they should not be Pyro's.
            max_plate_nesting: as in Pyro's kernels; needed with enumerated sites.
            init_strategy: where the runs that look at the model start.
            keep_discrete: whether discrete latents are coordinates, and not summed out.

        Raises:
            NormalizerError: for an energy whose log Z is unknown, learned, or moves, or a composite
                likelihood.
            ValueError: for an improper prior, a prior without exact draws, or a guide that does not
                suit the model; it names the site.
        """
        settings = {
            "args": args,
            "kwargs": kwargs,
            "transforms": transforms,
            "max_plate_nesting": max_plate_nesting,
            "init_strategy": init_strategy,
            "keep_discrete": keep_discrete,
        }
        target = ModelPotential(model, **settings)
        check_proper(target, improper if guide is not None else ())
        if guide is None:
            return cls(target, PriorStart(target, settings))
        return cls(target, GuideStart(target, guide))
