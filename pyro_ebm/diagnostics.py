"""ArviZ data from a run of ``MCMC``."""

from typing import Any


def to_arviz(mcmc: Any, **kwargs: Any) -> Any:
    """ArviZ data from a run."""
    import arviz as az

    samples = mcmc.get_samples(group_by_chain=True)
    return az.from_dict(posterior={k: v.detach().cpu().numpy() for k, v in samples.items()})
