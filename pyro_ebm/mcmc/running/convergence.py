"""Looks at the draws of a run once it is over."""

from dataclasses import replace

from pyro.infer.mcmc.mcmc_kernel import MCMCKernel

from pyro_ebm.diagnostics.chain_statistics import LIMIT
from pyro_ebm.diagnostics.convergence import Sampler, findings
from pyro_ebm.diagnostics.results import Results
from pyro_ebm.mcmc.kernels.base import Kernel
from pyro_ebm.mcmc.running.storage.zarr_store import some_draws


def with_findings(results: Results, kernel: MCMCKernel) -> Results:
    """The results, with what is wrong with them.

    Of draws on disk some are read. Ranks that share out chains bring their draws to the first one,
    and on the others nothing is found; of a store, each rank looks at its own chains.

    Args:
        results: of a run.
        kernel: which made it.
    """
    samples, fields, num = results.samples, results.fields, results.num_superchains
    if results.store is not None:
        samples, fields = some_draws(results.store, LIMIT)
    if not isinstance(kernel, Kernel):  # whose users expect to hear of any divergence
        sampler = Sampler([type(kernel).__name__])
        return replace(results, findings=findings(samples, fields, sampler, num))
    parts = (kernel, *kernel.parts)
    sampler = Sampler(
        [type(part).__name__ for part in parts],
        kernel.max_divergences,
        any(part.adapt_step_size for part in parts),
    )
    found = findings(samples, fields, sampler, num)
    if any(finding.kind in ("r_hat", "apart") for finding in found):
        found += [cause for part in kernel.blocks for cause in part.causes]
    return replace(results, findings=[*found, *kernel.findings], notes=kernel.notes)
