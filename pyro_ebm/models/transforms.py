"""Which transform maps each latent of a model to what a kernel moves."""

from collections.abc import Mapping

from pyro import poutine
from torch.distributions.transforms import Transform, identity_transform

from pyro_ebm.distributions.core.supports import stated_support
from pyro_ebm.models.checks.fixed_density import moving_support
from pyro_ebm.models.runs import latents_of, value_of
from pyro_ebm.models.sites.discrete_sites import OTHER_WAYS, is_integer
from pyro_ebm.models.sites.given_transforms import check_transform
from pyro_ebm.models.sites.latents import transform_of


def transforms_of(
    trace: poutine.Trace,
    given: Mapping[str, Transform],
    moving: Mapping[str, frozenset[str]],
    keep_discrete: bool,
) -> dict[str, Transform]:
    """From the support of each latent that is sampled to the reals; the identity for discrete ones.

    Args:
        trace: a run of the model.
        given: transforms of the user's own, for some of the sites.
        moving: the sites whose support moves, and what moves it
            (:func:`~pyro_ebm.models.checks.fixed_supports.moving_supports`).
        keep_discrete: whether discrete sites are sampled, and not summed out.

    Raises:
        ValueError: for a site that cannot be sampled, whose support moves, or whose given transform
            is not one from its support onto the reals; it names the site.

    Example:
        >>> from pyro_ebm.models.runs import BoundModel
        >>> trace = BoundModel(lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0))).trace()
        >>> transforms_of(trace, {}, {}, False)["x"](torch.tensor(1.0))
        tensor(0.)
    """
    found: dict[str, Transform] = {}
    reals: list[str] = []
    for name, node in latents_of(trace).items():
        fn, support = node["fn"], stated_support(node["fn"])
        if fn.has_enumerate_support and not keep_discrete:
            continue
        if support.is_discrete and not keep_discrete:
            way = "use MHKernel(proposal=IntegerWalk()), in a CompositeKernel beside this one"
            raise ValueError(
                f"site {name!r} is discrete and cannot be summed out: this kernel moves"
                f" continuous latents only. So {way if is_integer(support) else OTHER_WAYS}"
            )
        if name in moving and not is_integer(support):
            latents = sorted(moving[name]) or "another latent"
            raise ValueError(moving_support(name, str(latents)))
        if support.is_discrete:
            found[name] = identity_transform
            continue
        reals.append(name)
        if name in given:
            check_transform(name, given[name], support, value_of(trace, name))
        found[name] = given[name] if name in given else transform_of(name, fn)
    if unknown := sorted(given.keys() - set(reals)):
        raise ValueError(
            f"transforms= names {unknown}, but the continuous latent sites are {sorted(reals)}"
        )
    return found
