"""What a run is asked to do: the arguments of :class:`~pyro_ebm.MCMC`, and their checks."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.diagnostics.results import Results
from pyro_ebm.files import PathLike
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.models.sites.given_transforms import check_codomain
from pyro_ebm.ops.arguments import check_callable, check_mapping, check_tensor, shown

CHAIN_METHODS = ("vectorized", "sequential", "parallel")


class Options(Protocol):
    """What the runners read of a :class:`~pyro_ebm.MCMC`, whose docstring says what they mean."""

    num_samples: int
    warmup_steps: int
    num_chains: int
    thinning: int
    initial_params: Mapping[str, Tensor] | None
    given_transforms: Mapping[str, Transform] | None
    save_params: list[str] | None
    save_warmup: bool
    hook_fn: Callable[..., object] | None
    mp_context: str | None
    disable_progbar: bool
    disable_validation: bool | None
    draws_device: torch.device | None
    store: PathLike | None
    checkpoint: PathLike | None
    num_superchains: int | None
    checkpoint_every: int | timedelta


@dataclass
class Runner(ABC):
    """Runs chains, and returns their draws.

    Args:
        kernel: moves the chains.
        options: what to run.
        args: the positional arguments of the model.
        kwargs: its keyword arguments.
    """

    kernel: MCMCKernel
    options: Options
    args: tuple[object, ...]
    kwargs: dict[str, object]

    @abstractmethod
    def run(self) -> Results:
        """The draws of a run from its start."""

    def kept_sites(self, names: Iterable[str]) -> list[str]:
        """The names of the sites to keep, sorted; raises a ValueError for unknown ones."""
        names, kept = sorted(names), self.options.save_params
        if unknown := [name for name in kept or () if name not in names]:
            raise ValueError(f"save_params names {unknown}, the sites are {names}")
        return names if kept is None else sorted(kept)

    def start_of(self, chain: int) -> dict[str, Tensor]:
        """The values at which a chain starts, of the ``initial_params``."""
        given = dict(self.options.initial_params or {})
        return given if self.options.num_chains == 1 else {k: v[chain] for k, v in given.items()}

    @contextlib.contextmanager
    def starts(self) -> Iterator[None]:
        """Within it ``kernel.initial_params`` may be set; a kernel of pyro_ebm does not keep it."""
        if not isinstance(self.kernel, PyroKernel):
            yield
            return
        self.kernel.cleanup()  # of a chain that was left: then they are those set by the user
        before = self.kernel.initial_params
        try:
            yield
        finally:
            self.kernel.initial_params = before


def check_chain_method(
    method: str | None, kernel: MCMCKernel, only_vectorized: Mapping[str, object]
) -> str:
    """The chain method, by default the kernel's; raises a ValueError if the kernel cannot do it.

    The arguments ``only_vectorized`` are refused by the other methods, where they are not None.
    """
    ours = isinstance(kernel, PyroKernel)
    if method is None:
        method = "vectorized" if ours else "sequential"
    if method not in CHAIN_METHODS:
        raise ValueError(f"chain_method must be one of {CHAIN_METHODS}, got {method!r}")
    if method == "vectorized" and not ours:
        raise ValueError(
            f"{type(kernel).__name__} moves one chain at a time: use"
            ' chain_method="sequential" or "parallel", or a kernel of pyro_ebm'
        )
    names = [name for name, value in only_vectorized.items() if value is not None]
    if method != "vectorized" and names:
        raise ValueError(
            f'{names[0]}= needs chain_method="vectorized", got {method!r} for'
            f" {type(kernel).__name__}"
        )
    return method


def check_run(
    initial_params: Mapping[str, Tensor] | None,
    num_chains: int,
    hook_fn: object,
    transforms: Mapping[str, Transform] | None,
    save_params: list[str] | None,
    num_superchains: int | None = None,
) -> None:
    """Raises a ValueError unless these arguments of a run are what they should be."""
    if transforms is not None:
        check_mapping("transforms", transforms, Transform, "transforms")
        for name, transform in transforms.items():
            check_codomain(name, transform)
    if hook_fn is not None:
        check_callable("hook_fn", hook_fn)
    if save_params is not None and (not isinstance(save_params, list | tuple) or not save_params):
        raise ValueError(f"save_params must be a list of names of sites, got {shown(save_params)}")
    if initial_params is None:
        return
    check_mapping("initial_params", initial_params)
    for name, value in initial_params.items():
        check_tensor(f"initial_params[{name!r}]", value, "a tensor")
        if num_chains > 1 and value.shape[:1] != (num_chains,):
            raise ValueError(
                f"initial_params[{name!r}] must lead with num_chains={num_chains}, got shape"
                f" {tuple(value.shape)}"
            )
        if num_superchains is not None:
            first, *others = value.reshape(num_superchains, -1, *value.shape[1:]).unbind(1)
            if not all(torch.equal(first, other) for other in others):
                raise ValueError(
                    f"initial_params[{name!r}] must be the same for the chains of a super-chain,"
                    f" which start together: give x.repeat_interleave({len(others) + 1}, 0) of one"
                    f" start for each of the {num_superchains} super-chains"
                )
