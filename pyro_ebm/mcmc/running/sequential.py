"""Chains one after another, or one in each worker process, as Pyro runs them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.infer.mcmc.api import MCMC as PyroMCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.potentials.checked_model import CheckedModel
from pyro_ebm.mcmc.running.draws import Bar, Chain, cut_short, fields_of, stack, warmup_fields_of
from pyro_ebm.mcmc.running.results import Results
from pyro_ebm.models.sites.given_transforms import check_codomain
from pyro_ebm.ops.arguments import check_callable, check_mapping, check_tensor, shown


def check_run(
    initial_params: Any, num_chains: int, hook_fn: Any, transforms: Any, save_params: Any
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


class ChainByChain(Results):
    """The part of :class:`~pyro_ebm.MCMC` that runs the chains by themselves."""

    num_samples: int
    warmup_steps: int
    thinning: int
    save_warmup: bool
    save_params: list[str] | None
    initial_params: Mapping[str, Tensor] | None
    hook_fn: Callable[..., Any] | None
    mp_context: str | None
    disable_progbar: bool
    disable_validation: bool | None

    def _run_sequential(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kernel = self.kernel
        chains: list[Chain] = []
        for index in range(self.num_chains):
            chain = Chain()
            try:
                with (
                    self._starts(kernel),
                    self._validation(),
                    torch.inference_mode(False),  # Pyro's kernels do not see to it
                    torch.enable_grad(),
                ):
                    self._run_chain(index, chain, args, kwargs)
            except KeyboardInterrupt:
                if not chains and not chain.draws:
                    raise
                if chains:  # chains of one length: the one that was cut short goes
                    cut_short(len(chains), self.num_chains, "chains")
                    kernel.cleanup()
                    break
                cut_short(len(chain.draws), self.num_samples // self.thinning)
                self._finish_chain(chain, chains)
                break
            self._finish_chain(chain, chains)
        if self.transforms is None:
            self._set_transforms(*args, **kwargs)
        self._samples = stack([chain.draws for chain in chains], self.transforms)
        if self.save_warmup:
            self._warmup_samples = stack([chain.warmup for chain in chains], self.transforms)
            self._warmup_fields = warmup_fields_of(chains)
        self._take_fields(len(chains[0].draws))

    def _run_chain(
        self, index: int, chain: Chain, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        kernel, label = self.kernel, f" [{index}]" if self.num_chains > 1 else ""
        if self.initial_params is not None:
            kernel.initial_params = self._start_of(index)
        total, which = self.warmup_steps + self.num_samples, index if label else None
        with Bar(total, 1, self.disable_progbar, which) as bar:
            kernel.setup(self.warmup_steps, *args, **kwargs)
            params = kernel.initial_params
            assert params is not None
            keep = self._kept(params)
            for stage, num_steps in (("Warmup", self.warmup_steps), ("Sample", self.num_samples)):
                for i in range(num_steps):
                    params = kernel.sample(params)
                    kept = {name: params[name] for name in keep}
                    if stage == "Warmup" and self.save_warmup:
                        chain.warmup.append(kept)
                        if isinstance(kernel, Kernel):
                            chain.warmup_stats.append(kernel.last_stats)
                    elif stage == "Sample" and (i + 1) % self.thinning == 0:
                        chain.draws.append(kept)
                    bar.update(stage.lower(), kernel)
                    if self.hook_fn is not None:
                        self.hook_fn(kernel, params, stage + label, i)

    def _finish_chain(self, chain: Chain, chains: list[Chain]) -> None:
        chains.append(chain)
        self._diagnostics.append(dict(self.kernel.diagnostics()))
        self.kernel.cleanup()

    def _start_of(self, chain: int) -> dict[str, Tensor]:
        given = dict(self.initial_params or {})
        return given if self.num_chains == 1 else {k: v[chain] for k, v in given.items()}

    @contextlib.contextmanager
    def _starts(self, kernel: MCMCKernel) -> Iterator[None]:
        """Starts that are given to this run do not stay with a kernel of this package."""
        if not isinstance(kernel, Kernel):
            yield
            return
        before = kernel._given_params
        try:
            yield
        finally:
            kernel._given_params = before

    @contextlib.contextmanager
    def _checked_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Lets a kernel of Pyro see the model with the checks that this package's kernels make."""
        kernel: Any = self.kernel
        model = getattr(kernel, "model", None)
        if isinstance(kernel, Kernel) or model is None:
            yield
            return
        kernel.model = CheckedModel(model, args, kwargs, rejects=self.disable_validation is True)
        try:
            yield
        finally:
            kernel.model = model

    def _validation(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.kernel, Kernel) or self.disable_validation is None:
            return contextlib.nullcontext()
        return pyro.validation_enabled(not self.disable_validation)

    def _run_parallel(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mcmc = PyroMCMC(
            self.kernel,
            self.num_samples,
            warmup_steps=self.warmup_steps,
            initial_params=None if self.initial_params is None else dict(self.initial_params),
            num_chains=self.num_chains,
            hook_fn=self.hook_fn,
            mp_context=self.mp_context or "spawn",
            disable_progbar=self.disable_progbar,
            disable_validation=self.disable_validation,  # pyright: ignore[reportArgumentType]
            transforms=self.transforms,
            # Pyro packs in the order given, and unpacks sorted
            save_params=None if self.save_params is None else sorted(self.save_params),
        )
        mcmc.run(*args, **kwargs)
        self.transforms = mcmc.transforms
        samples = mcmc.get_samples(group_by_chain=True)
        assert samples is not None
        self._samples = {k: v[:, self.thinning - 1 :: self.thinning] for k, v in samples.items()}
        reported: list[Any] = mcmc._diagnostics
        self._diagnostics = [dict(d) for d in reported]
        self._take_fields(self.num_samples // self.thinning)

    def _take_fields(self, num_draws: int) -> None:
        self._fields = fields_of(self._diagnostics, num_draws, self.thinning)
        for reported in self._diagnostics:
            reported.pop("sample_stats", None)

    def _kept(self, names: Any) -> list[str]:
        names = sorted(names)
        if self.save_params is None:
            return names
        if unknown := [name for name in self.save_params if name not in names]:
            raise ValueError(f"save_params names {unknown}, the sites are {names}")
        return sorted(self.save_params)
