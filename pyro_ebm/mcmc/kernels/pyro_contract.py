"""Kernels of a Pyro model: what ``pyro.infer.MCMC`` calls, around a batch of chains.

Under :class:`pyro_ebm.MCMC` a kernel moves many chains at once
(:meth:`~pyro_ebm.mcmc.kernels.base.Kernel.step`). Under Pyro's own ``MCMC`` and ``StreamingMCMC``
it moves one (:meth:`PyroKernel.setup`, :meth:`PyroKernel.sample`).
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypedDict

import pyro
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.transforms import Transform

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.mcmc.potentials.energy import EnergyPotential
from pyro_ebm.mcmc.potentials.function import FunctionPotential
from pyro_ebm.mcmc.potentials.lone_energy import lone_energy
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.mcmc.state import State
from pyro_ebm.models.runs import BoundModel
from pyro_ebm.models.sites.joint_start import JointStart
from pyro_ebm.models.sites.latents import InitStrategy, init_near_zero
from pyro_ebm.models.sites.site import sites_of
from pyro_ebm.ops.arguments import check_callable, check_mapping


class DiscreteSettings(TypedDict, total=False):
    """Settings of the model that every kernel takes."""

    max_plate_nesting: int | None
    init_strategy: InitStrategy


class ModelSettings(DiscreteSettings, total=False):
    """Settings of a model with continuous sites."""

    transforms: dict[str, Transform] | None


class PyroKernel(Kernel, MCMCKernel):
    r"""A kernel that has a Pyro model, or the potential of one chain, and runs under Pyro.

    Args:
        model: a Pyro model, or a distribution.
        potential_fn: instead of a model, the potential of one chain as a function of a dict of
            unconstrained values; needs ``initial_params``.
        transforms: from the supports to the reals, where they should not be Pyro's.
        max_plate_nesting: as in Pyro's kernels.
        init_strategy: where chains start, as in Pyro's kernels, but by default uniformly between -1
            and 1 on the unconstrained space; discrete sites start at a draw of their prior, or
            where an earlier run's draws have them.

    Raises:
        ValueError: for an argument outside its range, or both a model and a ``potential_fn``.
    """

    keep_discrete = False
    """Whether discrete latents that it does not move are left to others, and not summed out."""
    _state: State | None = None
    _mean_accept, _seen = 0.0, 0
    _stats: dict[str, list[float]] | None = None
    _last_stats: dict[str, float] | None = None
    shipped_params: bytes | None = None
    """The parameter store of the process that pickled the kernel."""

    def __init__(
        self,
        model: Model | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        transforms: dict[str, Transform] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: InitStrategy = init_near_zero,
    ):
        if model is not None and potential_fn is not None:
            raise ValueError("give model or potential_fn, not both")
        if model is not None:
            check_model(model)
        check_callable("init_strategy", init_strategy)
        if transforms is not None:
            check_mapping("transforms", transforms, Transform, "transforms")
        self.model, self.potential_fn = model, potential_fn
        self.given_transforms = transforms
        self.max_plate_nesting, self.init_strategy = max_plate_nesting, init_strategy
        self.given_params: Mapping[str, Tensor] | None = None
        self.sites_to_save: list[str] | None = None

    @property
    def has_model(self) -> bool:
        """Whether it was given a model, a potential or transforms."""
        given = (self.model, self.potential_fn, self.given_transforms)
        return any(x is not None for x in given)

    # -- many chains ---------------------------------------------------------------------------

    def make_potential(self, *args: object, **kwargs: object) -> Potential:
        """The potential of the model at its arguments, or of the ``potential_fn``."""
        self.restore_params()
        if self.model is not None:
            bound = BoundModel(self.model, args, kwargs, self.init_strategy)
            if self.discrete and (lone := lone_energy(bound)):
                start = self.init_strategy
                joint = start if isinstance(start, JointStart) else None
                return EnergyPotential(lone[1], lone[0], joint_start=joint)
            return ModelPotential(
                self.model,
                args,
                kwargs,
                transforms=self.given_transforms,
                max_plate_nesting=self.max_plate_nesting,
                init_strategy=self.init_strategy,
                keep_discrete=self.discrete or self.keep_discrete,
            )
        if self.potential_fn is None:
            raise ValueError(
                f"{type(self).__name__} has neither a model nor a potential_fn: give one, as in"
                f" {type(self).__name__}(model)"
            )
        if self.given_params is None:
            raise ValueError(
                "a potential_fn says nothing of its sites' names and shapes: give initial_params"
            )
        return FunctionPotential(
            self.potential_fn, sites_of(self.given_params, self.given_transforms)
        )

    @property
    def transforms(self) -> dict[str, Transform] | None:
        """The maps from the supports to the reals: the potential's, or before setup those given."""
        return self.given_transforms if self._potential is None else self._potential.transforms

    def initial_position(self, potential: Potential, num_chains: int) -> Tensor:
        """The user's ``initial_params`` if given, else what the potential draws.

        Raises:
            ValueError: if they have other names or shapes than the model's sites, or lie where
                the potential is not finite.
        """
        given = self.given_params
        return potential.initial(num_chains) if given is None else potential.at(given, num_chains)

    # -- one chain, as Pyro's MCMC runs it -------------------------------------------------------

    def setup(self, warmup_steps: int, *args: object, **kwargs: object) -> None:
        """Prepares one chain: potential, start, adaptation and statistics, all anew.

        Pyro does not say how many draws will follow: as many as in the warmup are expected.
        """
        if self.planned_steps is None:
            self.planned_steps = 2 * warmup_steps
        potential = self.make_potential(*args, **kwargs)
        z = self.initial_position(potential, 1)
        self.bind(potential, warmup_steps)
        self._state = self.init(z)

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One transition from a dict of unconstrained values to the next."""
        if self._state is None:
            raise RuntimeError(f"{type(self).__name__}.sample needs setup first")
        z = self.potential.ravel(params)[None]
        here = self.potential.ravel(self.potential.unravel(self._state.z[0]))[None]  # rounded
        state = self._state if torch.equal(z, here) else self.evaluate(z)
        self._state, info = self.step(state)
        self._mean_accept += (float(info.accept_prob) - self._mean_accept) / (self._seen + 1)
        self._seen += 1
        if self._steps == self._warmup_steps:
            self._mean_accept, self._seen = 0.0, 0
        self._last_stats = {
            self.potential.lp_name: -float(self._state.potential),
            "acceptance_rate": float(info.accept_prob),
            "step_size": self.mean_step_size,
            "diverging": bool(info.diverging),
            **{name: stat.item() for name, stat in self.extra_fields.items()},
        }
        if self._steps > self._warmup_steps:
            self._stats = {} if self._stats is None else self._stats
            for name, number in self._last_stats.items():
                self._stats.setdefault(name, []).append(number)
        return {k: v.squeeze(0) for k, v in self.potential.unravel(self._state.z).items()}

    @property
    def last_stats(self) -> dict[str, float]:
        """The statistics of the last transition of :meth:`sample`."""
        return self._last_stats or {}

    @property
    def initial_params(self) -> dict[str, Tensor] | None:
        """Unconstrained values at which the chain starts."""
        if self._state is None:
            return None if self.given_params is None else dict(self.given_params)
        return {k: v.squeeze(0) for k, v in self.potential.unravel(self._state.z).items()}

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor] | None) -> None:
        self.given_params = params
        self._state = None

    def logging(self) -> OrderedDict[str, str]:
        """What a progress bar shows."""
        return OrderedDict(
            [
                ("step size", f"{self.mean_step_size:.2e}"),
                ("acc. prob", f"{self._mean_accept:.3f}"),
            ]
        )

    def diagnostics(self) -> Saved:
        """Statistics of the draws: divergent ones, mean acceptance, and all of them per draw."""
        stats = {name: torch.tensor(values) for name, values in (self._stats or {}).items()}
        diverging = stats.get("diverging", torch.zeros(0, dtype=torch.bool))
        return {
            "divergences": diverging.nonzero().flatten().tolist(),
            "acceptance rate": self._mean_accept,
            "sample_stats": stats,
        }

    def cleanup(self) -> None:
        """Drops the chain; the transforms and the learned adaptation stay to be read.

        Raises:
            GraphError: if draws are in doubt, see :meth:`Kernel.check_graphs`.
        """
        self.check_graphs()
        self.planned_steps = None
        self._state = None

    @property
    def save_params(self) -> list[str]:
        """The sites that Pyro's MCMC stores, in the order in which it unpacks them."""
        given = self.sites_to_save
        return sorted(self.potential.names if given is None else given)

    @save_params.setter
    def save_params(self, names: list[str] | None) -> None:
        self.sites_to_save = names

    # -- worker processes ------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, object]:
        # A worker process starts with an empty parameter store: its parameters travel along.
        # (The store's own get_state() would strip the live parameters of their bookkeeping, and
        # tensors would travel as files that are closed before the worker has opened them.)
        store, buffer = pyro.get_param_store(), io.BytesIO()
        shipped = {
            name: (p.detach().clone(), store._constraints[name])
            for name, p in store._params.items()
        }
        torch.save(shipped, buffer)
        return {**super().__getstate__(), "shipped_params": buffer.getvalue()}

    def restore_params(self) -> None:
        """Puts the parameters that were pickled with the kernel into the parameter store."""
        if self.shipped_params is None:
            return
        store = pyro.get_param_store()
        shipped = torch.load(io.BytesIO(self.shipped_params), weights_only=False)
        for name, (unconstrained, constraint) in shipped.items():
            if name not in store:
                store.setdefault(name, transform_to(constraint)(unconstrained), constraint)


def check_model(model: Model) -> None:
    """Raises a ValueError unless it may be a Pyro model; a kernel can be called too."""
    if isinstance(model, MCMCKernel):
        raise ValueError(f"model must be a Pyro model, or a distribution, got {model!r}, a kernel")
    check_callable("model", model, "a Pyro model, or a distribution")
