"""Runs kernels: ``pyro.infer.MCMC`` with all chains in one batch.

``chain_method="vectorized"`` (the default for this package's kernels) moves every chain at once:
one evaluation of the model per transition, however many chains. ``"sequential"`` runs one chain
after another and ``"parallel"`` one in each worker process, as Pyro does; they take any Pyro
kernel, ``NUTS`` and ``HMC`` among them.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

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
from tqdm.auto import tqdm

from pyro_ebm.mcmc.kernel import Kernel
from pyro_ebm.mcmc.normalizer_check import check_normalizers
from pyro_ebm.mcmc.potential import Potential

if TYPE_CHECKING:
    from pyro_ebm.mcmc.kernel import State

CHAIN_METHODS = ("vectorized", "sequential", "parallel")


class MCMC(AbstractMCMC):
    r"""A drop-in for ``pyro.infer.MCMC`` that runs many chains at once.

    A model whose unknown log Z depends on a latent is refused before sampling
    (:class:`~pyro_ebm.mcmc.NormalizerError`). The model is validated once, when it is traced;
    proposals outside a support are then rejected, not raised. Ctrl-C keeps the draws made so far.

    Args:
        kernel: any kernel of this package, or of Pyro (one chain at a time).
        num_samples: transitions of each chain after warmup.
        warmup_steps: transitions before; as many as ``num_samples`` by default.
        initial_params: unconstrained starting values, each of shape ``(num_chains, *site)``, or
            ``site`` for a single chain.
        num_chains: number of chains; any number when vectorized.
        hook_fn: called as ``hook_fn(kernel, params, stage, i)`` after every transition;
            vectorized, ``params`` holds all chains.
        mp_context: how worker processes start when parallel, ``"spawn"`` by default.
        disable_progbar: whether to show no progress.
        disable_validation: as in Pyro, for its own kernels.
        transforms: from the supports to the reals, for kernels on a ``potential_fn``.
        save_params: the sites to keep; all by default.
        chain_method: ``"vectorized"``, ``"sequential"`` or ``"parallel"``.
        thinning: keep every ``thinning``-th draw, ``num_samples // thinning`` in all.
        save_warmup: whether to keep the warmup too (not in parallel).

    Raises:
        ValueError: for numbers out of range, or a chain method that the kernel cannot do.

    Example:
        >>> from pyro_ebm import LangevinKernel
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
        super().__init__(kernel, num_chains, transforms)
        if chain_method is None:
            chain_method = "vectorized" if isinstance(kernel, Kernel) else "sequential"
        warmup_steps = num_samples if warmup_steps is None else warmup_steps
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("warmup_steps", warmup_steps, 0),
            ("num_chains", num_chains, 1),
            ("thinning", thinning, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
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
        if initial_params is not None and num_chains > 1:
            self._validate_initial_params(initial_params)
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
        if not isinstance(self.kernel, Kernel) and self.kernel.model is not None:
            check_normalizers(self.kernel.model, args, kwargs)
        if self.chain_method == "vectorized":
            self._run_vectorized(args, kwargs)
        elif self.chain_method == "sequential":
            self._run_sequential(args, kwargs)
        else:
            self._run_parallel(args, kwargs)

    def _run_vectorized(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kernel = self.kernel
        assert isinstance(kernel, Kernel)
        if self.initial_params is not None:
            kernel.initial_params = self.initial_params
        potential = kernel.make_potential(*args, **kwargs)
        z = kernel.initial_position(potential, self.num_chains)
        kernel.bind(potential, self.warmup_steps)
        state = kernel.init(z)
        self.transforms = kernel.transforms
        keep = self._kept(potential.names)
        warmup = _Draws(potential, keep, self.warmup_steps if self.save_warmup else 0, state, 1)
        draws = _Draws(potential, keep, self.num_samples, state, self.thinning)
        bar = _Bar(self.warmup_steps + self.num_samples, self.num_chains, self.disable_progbar)
        try:
            with bar:
                for i in range(self.warmup_steps + self.num_samples):
                    in_warmup = i < self.warmup_steps
                    step_size = kernel.adaptation.step_size
                    state, info = kernel.step(state)
                    (warmup if in_warmup else draws).add(state, info, step_size)
                    bar.update("warmup" if in_warmup else "sample", info, kernel)
                    if self.hook_fn is not None:
                        stage = "Warmup" if in_warmup else "Sample"
                        index = i if in_warmup else i - self.warmup_steps
                        self.hook_fn(kernel, potential.unravel(state.z), stage, index)
        except KeyboardInterrupt:
            if draws.count == 0:
                raise
            _warn_interrupted(draws.count, self.num_samples // self.thinning)
        if self.save_warmup:
            self._warmup_samples, self._warmup_fields = warmup.samples(), warmup.fields()
        self._samples, self._fields = draws.samples(), draws.fields()
        self._diagnostics = [
            {
                "divergences": self._fields["diverging"][chain].nonzero().flatten().tolist(),
                "acceptance rate": float(self._fields["acceptance_rate"][chain].mean()),
            }
            for chain in range(self.num_chains)
        ]

    def _run_sequential(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kernel = self.kernel
        chains: list[list[dict[str, Tensor]]] = []
        warmups: list[list[dict[str, Tensor]]] = []
        validation = self.disable_validation
        interrupted = False
        for chain in range(self.num_chains):
            if self.initial_params is not None:
                single = self.num_chains == 1
                params = {k: v if single else v[chain] for k, v in self.initial_params.items()}
                kernel.initial_params = params
            draws, warmup = [], []
            bar = _Bar(self.warmup_steps + self.num_samples, 1, self.disable_progbar, chain)
            try:
                with (
                    bar,
                    pyro.validation_enabled(
                        pyro.infer.util.is_validation_enabled()
                        if validation is None
                        else not validation
                    ),
                ):
                    kernel.setup(self.warmup_steps, *args, **kwargs)
                    params = kernel.initial_params
                    assert params is not None
                    for i in range(self.warmup_steps + self.num_samples):
                        params = kernel.sample(params)
                        in_warmup = i < self.warmup_steps
                        index = i if in_warmup else i - self.warmup_steps
                        if in_warmup and self.save_warmup:
                            warmup.append(params)
                        elif not in_warmup and (index + 1) % self.thinning == 0:
                            draws.append(params)
                        bar.describe("warmup" if in_warmup else "sample", kernel)
                        if self.hook_fn is not None:
                            stage = "Warmup" if in_warmup else "Sample"
                            self.hook_fn(kernel, params, f"{stage} [{chain}]", index)
            except KeyboardInterrupt:
                if not chains and not draws:
                    raise
                interrupted = True
            if interrupted and chains:
                _warn_interrupted(len(chains), self.num_chains, "chains")
                break
            chains.append(draws)
            warmups.append(warmup)
            self._diagnostics.append(kernel.diagnostics())
            kernel.cleanup()
            if interrupted:
                _warn_interrupted(len(draws), self.num_samples // self.thinning)
                break
        self.num_chains = len(chains)
        self._set_transforms(*args, **kwargs)
        self._samples = self._constrained(chains)
        if self.save_warmup:
            self._warmup_samples = self._constrained(warmups)
        self._collect_fields()

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
            disable_validation=self.disable_validation,
            transforms=self.transforms,
            save_params=self.save_params,
        )
        mcmc.run(*args, **kwargs)
        self.transforms = mcmc.transforms
        samples = mcmc.get_samples(group_by_chain=True)
        assert samples is not None
        self._samples = {k: v[:, self.thinning - 1 :: self.thinning] for k, v in samples.items()}
        self._diagnostics = list(mcmc._diagnostics)
        self._collect_fields()

    def _constrained(self, chains: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        names = self._kept(chains[0][0]) if chains[0] else []
        stacked = {
            name: torch.stack([torch.stack([p[name] for p in chain]) for chain in chains])
            for name in names
        }
        transforms = self.transforms or {}
        return {k: transforms[k].inv(v) if k in transforms else v for k, v in stacked.items()}

    def _collect_fields(self) -> None:
        """Per-draw statistics from what each chain's kernel says at its end."""
        thin = slice(self.thinning - 1, None, self.thinning)
        if all("sample_stats" in d for d in self._diagnostics):
            stats = [d["sample_stats"] for d in self._diagnostics]
            self._fields = {k: torch.stack([s[k] for s in stats])[:, thin] for k in stats[0]}
        elif all("divergences" in d for d in self._diagnostics):
            diverging = torch.zeros(len(self._diagnostics), self.num_samples, dtype=torch.bool)
            for chain, d in enumerate(self._diagnostics):
                diverging[chain, d["divergences"]] = True
            self._fields = {"diverging": diverging[:, thin]}
        for d in self._diagnostics:
            d.pop("sample_stats", None)

    def _kept(self, names: Any) -> list[str]:
        names = sorted(names)
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

        ``lp`` is :math:`-U(z)`, the log density on the unconstrained space. Pyro's own kernels
        tell ``diverging`` alone.

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
        result = dict(chain_diagnostics(self._done()))
        for name in self._diagnostics[0]:
            result[name] = {f"chain {i}": d[name] for i, d in enumerate(self._diagnostics)}
        return result

    def summary(self, prob: float = 0.9) -> None:
        """Prints mean, sd, median, interval, effective sample size and R-hat of every site."""
        print_summary(self._done(), prob=prob)
        if "diverging" in self._fields:
            print(f"Number of divergences: {int(self._fields['diverging'].sum())}")

    def to_arviz(self, **kwargs: Any) -> Any:
        """This run as ArviZ data; arguments as for :func:`pyro_ebm.to_arviz`."""
        from pyro_ebm.diagnostics import to_arviz

        return to_arviz(self, **kwargs)

    def _done(self) -> dict[str, Tensor]:
        if self._samples is None:
            raise RuntimeError("there are no draws yet: call run first")
        return self._samples


class _Draws:
    """Preallocated positions and statistics of all chains."""

    def __init__(
        self, potential: Potential, keep: list[str], num_steps: int, state: "State", thinning: int
    ):
        self.potential, self.keep, self.thinning = potential, keep, thinning
        num_draws, chains = num_steps // thinning, state.z.shape[0]
        self.count = self.seen = 0
        self.capacity = num_draws
        self.z = state.z.new_empty(num_draws, chains, potential.dim)
        self.stats = {
            "lp": state.potential.new_empty(num_draws, chains),
            "acceptance_rate": state.potential.new_empty(num_draws, chains),
            "step_size": state.potential.new_empty(num_draws, chains),
            "diverging": state.potential.new_empty(num_draws, chains, dtype=torch.bool),
        }

    def add(self, state: "State", info: Any, step_size: Tensor) -> None:
        self.seen += 1
        if self.count == self.capacity or self.seen % self.thinning:
            return
        self.z[self.count] = state.z
        values = (-state.potential, info.accept_prob, step_size, info.diverging)
        for stat, value in zip(self.stats.values(), values, strict=True):
            stat[self.count] = value
        self.count += 1

    def samples(self) -> dict[str, Tensor]:
        z = self.z[: self.count].transpose(0, 1)
        unconstrained, transforms = self.potential.unravel(z), self.potential.transforms
        return {name: transforms[name].inv(unconstrained[name]) for name in self.keep}

    def fields(self) -> dict[str, Tensor]:
        return {name: stat[: self.count].T for name, stat in self.stats.items()}


class _Bar:
    """A progress bar that asks the chains for numbers only when it redraws."""

    def __init__(self, total: int, num_chains: int, disable: bool, chain: int | None = None):
        label = f"{num_chains} chain{'s' * (num_chains > 1)}"
        self.label = label if chain is None else f"chain {chain}"
        self.bar = tqdm(total=total, disable=disable, desc=self.label, mininterval=0.2)
        self.shown = 0.0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def update(self, stage: str, info: Any, kernel: Kernel) -> None:
        self.bar.update()
        if not self.bar.disable and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            self.bar.set_description(f"{stage}, {self.label}", refresh=False)
            rate, step_size = float(info.accept_prob.mean()), float(kernel.adaptation.step_size[0])
            self.bar.set_postfix_str(f"acceptance {rate:.2f}, step size {step_size:.2e}")

    def describe(self, stage: str, kernel: MCMCKernel) -> None:
        self.bar.update()
        if not self.bar.disable and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            self.bar.set_description(f"{stage}, {self.label}", refresh=False)
            self.bar.set_postfix(kernel.logging() or {})


def _warn_interrupted(got: int, wanted: int, what: str = "draws per chain") -> None:
    warnings.warn(f"interrupted: {got} of {wanted} {what} are kept", stacklevel=3)
