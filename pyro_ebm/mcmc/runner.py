"""Runs kernels: ``pyro.infer.MCMC`` with all chains in one batch.

``chain_method="vectorized"`` (the default for this package's kernels) moves every chain at once:
one evaluation of the model per transition, however many chains. ``"sequential"`` runs one chain
after another and ``"parallel"`` one in each worker process, as Pyro does; they take any Pyro
kernel, ``NUTS`` and ``HMC`` among them.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc.api import MCMC as PyroMCMC
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.infer.mcmc.util import diagnostics as chain_diagnostics
from pyro.infer.mcmc.util import print_summary, select_samples
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_ebm.mcmc.kernel import Kernel
from pyro_ebm.mcmc.model import ModelPotential
from pyro_ebm.mcmc.normalizer_check import check_normalizers
from pyro_ebm.mcmc.record import Bar, Chain, Draws, cut_short, fields_of, stack, warmup_fields_of

CHAIN_METHODS = ("vectorized", "sequential", "parallel")


class MCMC(AbstractMCMC):
    r"""A drop-in for ``pyro.infer.MCMC`` that runs many chains at once.

    A model whose unknown log Z depends on a latent is refused before sampling
    (:class:`~pyro_ebm.mcmc.NormalizerError`). The model is validated once, when it is traced;
    proposals outside a support are then rejected, not raised. Ctrl-C keeps the draws made so far
    (but in parallel, where the worker processes hold them).

    Args:
        kernel: any kernel of this package, or of Pyro (one chain at a time).
        num_samples: transitions of each chain after warmup.
        warmup_steps: transitions before; as many as ``num_samples`` by default.
        initial_params: unconstrained starting values, each of shape ``(num_chains, *site)``, or
            ``site`` for a single chain.
        num_chains: number of chains; any number when vectorized.
        hook_fn: called as ``hook_fn(kernel, params, stage, i)`` after every transition, with the
            stages ``"Warmup"`` and ``"Sample"``, followed by the chain, as in ``"Sample [0]"``,
            when several run one after another; vectorized, ``params`` holds all of them.
        mp_context: how worker processes start when parallel, ``"spawn"`` by default.
        disable_progbar: whether to show no progress.
        disable_validation: as in Pyro, for its own kernels.
        transforms: from the supports to the reals, for kernels on a ``potential_fn``; the
            kernel's own by default.
        save_params: the sites to keep; all by default.
        chain_method: ``"vectorized"``, ``"sequential"`` or ``"parallel"``.
        thinning: keep every ``thinning``-th draw, ``num_samples // thinning`` in all.
        save_warmup: whether to keep the warmup too (not in parallel).

    Raises:
        ValueError: for numbers out of range, or a chain method that the kernel cannot do.

    Example:
        >>> from pyro_ebm import LangevinKernel, UnnormalizedEnergy
        >>> p = UnnormalizedEnergy(lambda x: x.abs())
        >>> mcmc = MCMC(LangevinKernel(p), 100, num_chains=20, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples(group_by_chain=True)["x"].shape
        torch.Size([20, 100])
        >>> sorted(mcmc.get_extra_fields())
        ['acceptance_rate', 'diverging', 'lp', 'step_size']
    """

    def __init__(
        self,
        kernel: MCMCKernel,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        hook_fn: Callable[..., Any] | None = None,
        mp_context: str | None = None,
        disable_progbar: bool = False,
        disable_validation: bool | None = True,
        transforms: dict[str, Transform] | None = None,
        save_params: list[str] | None = None,
        *,
        chain_method: str | None = None,
        thinning: int = 1,
        save_warmup: bool = False,
    ):
        if not isinstance(kernel, MCMCKernel):
            raise ValueError(
                f"kernel must be an MCMC kernel, as in MCMC(LangevinKernel(model), ...), got"
                f" {kernel!r}"
            )
        if chain_method is None:
            chain_method = "vectorized" if isinstance(kernel, Kernel) else "sequential"
        warmup_steps = num_samples if warmup_steps is None else warmup_steps
        num_samples = _count("num_samples", num_samples, 1)
        warmup_steps = _count("warmup_steps", warmup_steps, 0)
        num_chains = _count("num_chains", num_chains, 1)
        thinning = _count("thinning", thinning, 1)
        if thinning > num_samples:
            raise ValueError(f"thinning={thinning} leaves none of num_samples={num_samples}")
        if chain_method not in CHAIN_METHODS:
            raise ValueError(f"chain_method must be one of {CHAIN_METHODS}, got {chain_method!r}")
        if chain_method == "vectorized" and not isinstance(kernel, Kernel):
            raise ValueError(
                f"{type(kernel).__name__} moves one chain at a time: use"
                ' chain_method="sequential" or "parallel", or a kernel of pyro_ebm'
            )
        if chain_method == "parallel" and save_warmup:
            raise ValueError(
                'worker processes keep no warmup: use save_warmup with "vectorized" or "sequential"'
            )
        for name, value in (initial_params or {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"initial_params[{name!r}] must be a tensor, got {value!r}")
            if num_chains > 1 and value.shape[:1] != (num_chains,):
                raise ValueError(
                    f"initial_params[{name!r}] must lead with num_chains={num_chains}, got"
                    f" shape {tuple(value.shape)}"
                )
        super().__init__(kernel, num_chains, transforms)
        self._given_transforms = transforms
        self.num_samples, self.warmup_steps = num_samples, warmup_steps
        self.initial_params, self.hook_fn, self.mp_context = initial_params, hook_fn, mp_context
        self.disable_progbar, self.disable_validation = disable_progbar, disable_validation
        self.save_params = save_params
        self.chain_method, self.thinning, self.save_warmup = chain_method, thinning, save_warmup
        self._validate_kernel(initial_params)
        self._clear()

    def _clear(self) -> None:
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._samples: dict[str, Tensor] | None = None
        self._fields: dict[str, Tensor] = {}
        self._warmup_samples: dict[str, Tensor] | None = None
        self._warmup_fields: dict[str, Tensor] = {}
        self._diagnostics: list[dict[str, Any]] = []

    # -- running -------------------------------------------------------------------------------

    @poutine.block
    def run(self, *args: Any, **kwargs: Any) -> None:
        """Draws the chains; the arguments go to the model.

        Raises:
            NormalizerError: if an unknown or learned log Z depends on a latent.
            ValueError: if no finite starting point is found, or ``initial_params`` do not fit.
        """
        self._clear()
        self._args, self._kwargs = args, kwargs
        self.transforms = self._given_transforms
        model = getattr(self.kernel, "model", None)
        # the kernels of this package check for themselves, but too late in a worker process
        ours = isinstance(self.kernel, Kernel) and self.chain_method != "parallel"
        if model is not None and not ours:
            if getattr(self.kernel, "cancels_normalizers", False):
                self.kernel.make_potential(*args, **kwargs)  # which refuses what does not cancel
            else:
                check_normalizers(model, args, kwargs)
            if self.initial_params is not None:  # Pyro's kernels take any names and shapes
                if isinstance(self.kernel, Kernel):
                    potential = self.kernel.make_potential(*args, **kwargs)
                else:
                    potential = ModelPotential(model, args, kwargs)
                potential.at(self.initial_params, self.num_chains)
        if self.chain_method == "vectorized":
            self._run_vectorized(args, kwargs)
        elif self.chain_method == "sequential":
            self._run_sequential(args, kwargs)
        else:
            self._run_parallel(args, kwargs)

    def _run_vectorized(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kernel = self.kernel
        assert isinstance(kernel, Kernel)
        with self._starts(kernel):
            if self.initial_params is not None:  # one chain's values say what the sites are
                kernel.initial_params = self._start_of(0)
            potential = kernel.make_potential(*args, **kwargs)
            if self.initial_params is not None:
                kernel.initial_params = self.initial_params
            z = kernel.initial_position(potential, self.num_chains)
        kernel.bind(potential, self.warmup_steps)
        state = kernel.init(z)
        if self.transforms is None:
            self.transforms = potential.transforms
        keep, in_warmup = self._kept(potential.names), self.warmup_steps
        warmup = Draws(potential, keep, in_warmup if self.save_warmup else 0, 1, state)
        draws = Draws(potential, keep, self.num_samples, self.thinning, state)
        try:
            with Bar(in_warmup + self.num_samples, self.num_chains, self.disable_progbar) as bar:
                for stage, into, num_steps in (
                    ("Warmup", warmup, in_warmup),
                    ("Sample", draws, self.num_samples),
                ):
                    for i in range(num_steps):
                        step_size = kernel.adaptation.step_size
                        state, info = kernel.step(state)
                        into.add(state, info, step_size, kernel.own_stats)
                        bar.update(stage.lower(), kernel, info)
                        if self.hook_fn is not None:
                            self.hook_fn(kernel, potential.unravel(state.z), stage, i)
        except KeyboardInterrupt:
            if draws.count == 0:
                raise
            cut_short(draws.count, self.num_samples // self.thinning)
        if self.save_warmup:
            self._warmup_samples = warmup.samples(self.transforms)
            self._warmup_fields = warmup.fields()
        self._samples, self._fields = draws.samples(self.transforms), draws.fields()
        told = {k: v for k, v in kernel.diagnostics().items() if k != "sample_stats"}
        rates = self._fields["acceptance_rate"].mean(1).tolist()
        self._diagnostics = [
            {**told, "divergences": bad.nonzero().flatten().tolist(), "acceptance rate": rate}
            for bad, rate in zip(self._fields["diverging"], rates, strict=True)
        ]

    def _run_sequential(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kernel = self.kernel
        chains: list[Chain] = []
        for index in range(self.num_chains):
            chain = Chain()
            try:
                with self._starts(kernel), self._validation():
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
        told: list[Any] = mcmc._diagnostics
        self._diagnostics = [dict(d) for d in told]
        self._take_fields(self.num_samples // self.thinning)

    def _take_fields(self, num_draws: int) -> None:
        self._fields = fields_of(self._diagnostics, num_draws, self.thinning)
        for told in self._diagnostics:
            told.pop("sample_stats", None)

    def _kept(self, names: Any) -> list[str]:
        names = sorted(names)
        if not names:  # the kernels of this package say so themselves
            raise ValueError("the model has no latent site to sample")
        if self.save_params is None:
            return names
        if unknown := set(self.save_params) - set(names):
            raise ValueError(f"save_params names {sorted(unknown)}, the sites are {names}")
        return sorted(self.save_params)

    # -- reading -------------------------------------------------------------------------------

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
        return select_samples(self._done(), num_samples, group_by_chain)

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
        if self._warmup_samples is None:
            raise RuntimeError("no warmup was kept: give save_warmup=True and run")
        return select_samples(self._warmup_samples, None, group_by_chain)

    def diagnostics(self) -> dict[str, Any]:
        """Split R-hat and effective sample size of each site; divergences and acceptance rates."""
        self._refuse_short("diagnostics")
        result = dict(chain_diagnostics(self._numbers()))
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
        """This run as ArviZ data; arguments as for :func:`pyro_ebm.to_arviz`."""
        from pyro_ebm.diagnostics import to_arviz

        return to_arviz(self, **kwargs)

    def _done(self) -> dict[str, Tensor]:
        if self._samples is None:
            raise RuntimeError("there are no draws yet: call run first")
        return self._samples

    def _numbers(self) -> dict[str, Tensor]:
        """The draws, whole numbers as real ones: their means are no whole numbers."""
        default = torch.get_default_dtype()
        return {
            name: draws if draws.is_floating_point() else draws.to(default)
            for name, draws in self._done().items()
        }

    def _refuse_short(self, what: str) -> None:
        got = next(iter(self._done().values())).shape[1]
        if got < 4:
            raise RuntimeError(f"{what} needs at least 4 draws of each chain, there are {got}")


def _count(name: str, value: Any, least: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return number
