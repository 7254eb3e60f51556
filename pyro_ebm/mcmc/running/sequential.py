"""Chains one after another, or one in each worker process, as Pyro runs them."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro.infer.mcmc.api import MCMC as PyroMCMC
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.diagnostics.results import Results
from pyro_ebm.files import Saved
from pyro_ebm.mcmc.kernels.pyro_contract import PyroKernel
from pyro_ebm.mcmc.running.options import Runner
from pyro_ebm.mcmc.running.progress import Bar, cut_short
from pyro_ebm.models.checks.checked_model import CheckedModel
from pyro_ebm.models.runs import BoundModel
from pyro_ebm.models.sites.site import to_support

Params = dict[str, Tensor]


@dataclass
class Chain:
    """The unconstrained draws of one chain."""

    warmup: list[Params] = field(default_factory=list)
    warmup_stats: list[Saved] = field(default_factory=list)
    draws: list[Params] = field(default_factory=list)
    reported: Saved = field(default_factory=dict)


class SequentialRunner(Runner):
    """Runs one chain after another in this process, with any kernel that Pyro takes."""

    def run(self) -> Results:
        """The draws of all chains; after an interrupt, of the chains that were finished."""
        options, kernel = self.options, self.kernel
        chains, interrupted = list[Chain](), False
        with checked_model(self):
            for index in range(options.num_chains):
                chain = Chain()
                try:
                    with (
                        self.starts(),
                        self._validation(),
                        torch.inference_mode(False),  # Pyro's kernels leave it as it is
                        torch.enable_grad(),
                    ):
                        self._run_chain(index, chain)
                except KeyboardInterrupt:
                    if not chains and not chain.draws:
                        raise
                    if chains:  # chains of one length: the one that was cut short goes
                        cut_short(len(chains), options.num_chains, "chains")
                        kernel.cleanup()
                        break
                    cut_short(len(chain.draws), options.num_samples // options.thinning)
                    interrupted = True
                chain.reported = dict(kernel.diagnostics())
                kernel.cleanup()
                chains.append(chain)
                if interrupted:
                    break
        transforms = options.given_transforms
        if transforms is None:
            transforms = getattr(kernel, "transforms", None) or {}
        parts: Saved = {"transforms": transforms, "model": getattr(kernel, "model", None)}
        if options.save_warmup:
            parts["warmup_samples"] = stack([chain.warmup for chain in chains], transforms)
            parts["warmup_fields"] = stack_stats([chain.warmup_stats for chain in chains])
        return Results.of_chains(
            stack([chain.draws for chain in chains], transforms),
            [chain.reported for chain in chains],
            len(chains[0].draws),
            options.thinning,
            args=self.args,
            kwargs=self.kwargs,
            **parts,
        )

    def _run_chain(self, index: int, chain: Chain) -> None:
        kernel, options = self.kernel, self.options
        label = f" [{index}]" if options.num_chains > 1 else ""
        if options.initial_params is not None:
            kernel.initial_params = self.start_of(index)
        total = options.warmup_steps + options.num_samples
        with Bar(total, 1, options.disable_progbar, index if label else None) as bar:
            if isinstance(kernel, PyroKernel):
                kernel.planned_steps = total
            kernel.setup(options.warmup_steps, *self.args, **self.kwargs)
            params = kernel.initial_params
            assert params is not None
            keep = self.kept_sites(params)
            for i in range(-options.warmup_steps, options.num_samples):
                stage, step = ("Sample", i) if i >= 0 else ("Warmup", i + options.warmup_steps)
                params = kernel.sample(params)
                kept = {name: params[name] for name in keep}
                if i < 0 and options.save_warmup:
                    chain.warmup.append(kept)
                    if isinstance(kernel, PyroKernel):
                        chain.warmup_stats.append(kernel.last_stats)
                elif i >= 0 and (i + 1) % options.thinning == 0:
                    chain.draws.append(kept)
                bar.update(stage.lower(), kernel)
                if options.hook_fn is not None:
                    options.hook_fn(kernel, params, stage + label, step)

    def _validation(self) -> contextlib.AbstractContextManager[object]:
        if isinstance(self.kernel, PyroKernel) or self.options.disable_validation is None:
            return contextlib.nullcontext()
        return pyro.validation_enabled(not self.options.disable_validation)


class ParallelRunner(Runner):
    """Runs one chain in each worker process, by Pyro's own runner."""

    def run(self) -> Results:
        """The draws of all chains."""
        options = self.options
        given, transforms = options.initial_params, options.given_transforms
        with checked_model(self):
            mcmc = PyroMCMC(
                self.kernel,
                options.num_samples,
                warmup_steps=options.warmup_steps,
                initial_params=None if given is None else dict(given),
                num_chains=options.num_chains,
                hook_fn=options.hook_fn,
                mp_context=options.mp_context or "spawn",
                disable_progbar=options.disable_progbar,
                disable_validation=options.disable_validation,  # pyright: ignore[reportArgumentType]
                transforms=None if transforms is None else dict(transforms),
                # Pyro packs in the order given, and unpacks sorted
                save_params=None if options.save_params is None else sorted(options.save_params),
            )
            mcmc.run(*self.args, **self.kwargs)
        results = Results.of(mcmc).thinned(options.thinning)
        model = getattr(self.kernel, "model", None)  # without the checks
        return replace(results, transforms=mcmc.transforms, model=model)


@contextlib.contextmanager
def checked_model(runner: Runner) -> Iterator[None]:
    """Within it a kernel of Pyro has its model with the checks of this package's kernels."""
    kernel: Any = runner.kernel
    model = getattr(kernel, "model", None)
    if isinstance(kernel, PyroKernel) or model is None:
        yield
        return
    rejects = runner.options.disable_validation is True
    kernel.model = CheckedModel(BoundModel(model, runner.args, runner.kwargs), rejects)
    try:
        yield
    finally:
        kernel.model = model


def stack(chains: list[list[Params]], transforms: Mapping[str, Transform]) -> dict[str, Tensor]:
    """Each site's draws in its support, shape ``(chains, draws, *site)``."""
    found = {}
    for name in chains[0][0] if chains[0] else ():
        z = torch.stack([torch.stack([params[name] for params in chain]) for chain in chains])
        transform = transforms.get(name)
        found[name] = z if transform is None else to_support(transform, z)
    return found


def stack_stats(chains: list[list[Saved]]) -> dict[str, Tensor]:
    """Statistics of each transition, shape ``(chains, steps)``; none of Pyro's own kernels."""
    names = chains[0][0] if chains[0] else ()
    return {
        name: torch.tensor([[stats[name] for stats in chain] for chain in chains]) for name in names
    }
