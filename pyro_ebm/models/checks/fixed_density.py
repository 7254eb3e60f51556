r"""Is what is evaluated one fixed density?

A chain is right if the potential :math:`U(z)` is a function: the same latents, on the same
supports, at every position, and the same value whenever it is evaluated at the same one. Three
kinds of models break this:

- a latent that only some values of the others bring into the model. Where it is none of a kernel's
  sites, it is drawn afresh in each evaluation; where it is one in vain, its prior is missing;
- random numbers inside the model that are no latents: ``torch.randn``, functional dropout, a
  sample statement that a handler hides;
- state that an evaluation changes and the next one reads: a counter, a running mean.

Nor may an evaluation set the seed of torch's global random numbers: the kernel draws from them too,
and would move by the same noise at each step.

Branches on values as such are fine: the sites of a branch may be observed, or have another
distribution on the same support.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent

from pyro_ebm.distributions.core.wrappers import innermost
from pyro_ebm.files import random_state
from pyro_ebm.models.runs import is_subsample, sample_sites
from pyro_ebm.models.sites.latents import SampleSite
from pyro_ebm.ops.rows import random_state_put_back

NUM_REPEATS, NUM_REPEATS_AFTER_DRAWS = 2, 64


class NotFixedError(ValueError):
    """A model whose latents, or their supports, are not the same in all of its runs."""


class FixedLatents(Messenger):
    """Compares the latents of each run of a model with those of its first run.

    Args:
        enumerates: whether runs may have further dimensions on the left, of enumerated sites.

    Raises:
        ValueError: when a latent is new, missing, of another shape or on another support; it
            names the site and how to write the model instead.

    Example:
        >>> def model(x):
        ...     k = pyro.sample("k", dist.Normal(0.0, 1.0))
        ...     if k > x:
        ...         pyro.sample("extra", dist.Normal(0.0, 1.0))
        >>> fixed = FixedLatents()(model)
        >>> fixed(float("inf"))
        >>> fixed(-float("inf"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        pyro_ebm.models.checks.fixed_density.NotFixedError: site 'extra' is in the model, as a...
    """

    def __init__(self, enumerates: bool = False):
        super().__init__()
        self.enumerates = enumerates
        self._known: dict[str, tuple[tuple[int, ...], type | None]] | None = None
        self._seen: dict[str, tuple[tuple[int, ...], type | None]] = {}

    def __enter__(self) -> "FixedLatents":
        self._seen = {}
        return super().__enter__()

    def __exit__(self, exc_type: type | None, *error: Any) -> None:
        super().__exit__(exc_type, *error)
        if exc_type is not None:
            return
        if self._known is None:
            self._known = self._seen
        for name in self._known.keys() - self._seen.keys():
            raise NotFixedError(_comes_and_goes(name))

    def _pyro_sample(self, msg: SampleSite) -> None:
        # handlers around the model, which condition it on latents, have not had their turn yet
        if msg["is_observed"] or is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        shape = tuple(fn.batch_shape + fn.event_shape)
        try:
            support = type(innermost(fn, Independent).support)
        except NotImplementedError:  # it is refused elsewhere
            support = None
        self._seen[name] = shape, support
        if self._known is None:
            return
        if name not in self._known:
            raise NotFixedError(_comes_and_goes(name))
        wanted, first = self._known[name]
        trailing = shape[len(shape) - len(wanted) :] if self.enumerates else shape
        if trailing != wanted:
            raise NotFixedError(
                f"latent site {name!r} has shape {wanted} for some values of the other latents and"
                f" {shape} for others, so the model is not one density: give it the largest shape"
                " that it can have, and use a part of it"
            )
        if support is not first:  # that bounds move is found by moving_supports
            raise NotFixedError(moving_support(name, "the values of other latents"))


def moving_support(name: str, latents: str) -> str:
    """The words for a site whose support depends on latents."""
    return (
        f"the support of site {name!r} depends on {latents}, so no fixed transform maps it to the"
        " reals: sample a site on a fixed support, such as Uniform(0, 1), and compute this one from"
        " it"
    )


def check_repeats(
    values: Callable[[], tuple[Tensor, ...]], which: Callable[[], str], draws: bool = False
) -> None:
    """Raises a ValueError if a function of no arguments does not repeat its values, or sets a seed.

    The global random states are afterwards as they were.

    Args:
        values: the function, a potential and its gradient at a fixed position.
        which: what of it is random, in words, if it is.
        draws: whether it is known to draw random numbers.

    Example:
        >>> check_repeats(lambda: (torch.randn(3),), lambda: "the potential")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: the potential is random: evaluated again at the same values, it differs. A ...
    """
    ends: list[Tensor] = []

    def noted() -> tuple[Tensor, ...]:
        found = values()
        ends.append(torch.get_rng_state())
        return found

    with random_state_put_back():
        if _varies(noted, draws):
            raise ValueError(
                f"{which()} is random: evaluated again at the same values, it differs. A kernel"
                " needs one fixed density: draw random numbers beforehand and pass them as an"
                " argument, or make them a latent site that no handler hides; turn dropout off"
                " (module.eval(), training=False); and let no evaluation change what another one"
                " reads (a counter, a running mean)"
            )
        if all(torch.equal(end, ends[0]) for end in ends):  # from wherever it began
            raise ValueError(
                "the model or the energy sets the seed of torch's global random numbers whenever it"
                " is evaluated, so a kernel would move by the same noise at each step: draw from a"
                " torch.Generator with a seed of its own, or set the seed within"
                " torch.random.fork_rng()"
            )


def check_model_repeats(run: Callable[[], poutine.Trace]) -> None:
    """Raises a ValueError, which names the site, if runs at the same latents differ.

    Args:
        run: gives a trace of the model, conditioned on all its latents.
    """
    # of the sum: where pyro.infer.reparam samples a site exactly, random terms cancel
    check_repeats(lambda: (_total(_densities(run())),), lambda: random_part([run]))


def random_part(runs: Sequence[Callable[[], poutine.Trace]]) -> str:
    """The first site whose log density differs between runs at the same latents, in words."""
    first = [_densities(run()) for run in runs]
    for _ in range(NUM_REPEATS_AFTER_DRAWS):
        for run, before in zip(runs, first, strict=True):
            again = _densities(run())
            for name, value in before.items():
                if name not in again or _differ(value, again[name], 100):
                    return f"the log density of site {name!r}"
    return "the log density of the model"


def _densities(trace: poutine.Trace) -> dict[str, Tensor]:
    return {
        name: scale_and_mask(
            node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"]),
            node["scale"],
            node["mask"],
        )
        for name, node in sample_sites(trace).items()
    }


def _total(densities: dict[str, Tensor]) -> Tensor:
    sums = [density.detach().sum() for density in densities.values()]
    return torch.stack([torch.zeros(()), *(s.cpu().float() for s in sums)]).sum()


def _varies(values: Callable[[], tuple[Tensor, ...]], draws: bool) -> bool:
    before, first = random_state(), values()
    draws = draws or not _same_states(before, random_state())
    # Kernels of a GPU, or a compiler, may sum in another order the second time; random numbers are
    # no rounding
    num_eps = 100 if draws else 1000
    for _ in range(NUM_REPEATS_AFTER_DRAWS if draws else NUM_REPEATS):
        torch.rand((), device="cpu")  # that each begins elsewhere
        again = values()
        if len(again) != len(first) or any(map(_differ, first, again, [num_eps] * len(first))):
            return True
    return False


def _differ(a: Tensor, b: Tensor, num_eps: int) -> bool:
    if a.shape != b.shape:
        return True
    a, b = a.detach(), b.detach()
    if not a.is_floating_point():
        return not torch.equal(a, b)
    finite = a[a.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    atol = num_eps * torch.finfo(a.dtype).eps * (1 + scale)
    return not torch.allclose(a, b, rtol=0.0, atol=atol, equal_nan=True)


def _same_states(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(_same_states(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same_states, a, b))
    return a == b


def _comes_and_goes(name: str) -> str:
    return (
        f"site {name!r} is in the model, as a latent, for some values of the other latents only, so"
        " the model is not one density: sample it in front of the branch, which leaves the others'"
        " posterior as it is (where it is not used, it has its prior), and choose by torch.where"
    )
