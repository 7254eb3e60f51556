"""Starts whose sites belong together: an ``init_strategy`` that draws all of them at once."""

from collections.abc import Callable, Mapping

from pyro.infer.autoguide.initialization import init_to_generated, init_to_uniform, init_to_value
from torch import Tensor

from pyro_ebm.internals.pyro_runtime import outside_plates
from pyro_ebm.models.sites.latents import InitStrategy, SampleSite


class JointStart:
    """An ``init_strategy`` of draws from a joint distribution of the sites.

    Pyro asks for one site after another: what it gets in one run of the model is one draw. Sites
    that a draw does not have start as Pyro's ``fallback`` says.

    Args:
        draw: makes draws of each site in its support, ``num -> {name: (num, *site)}``.
        fallback: the strategy of other sites.

    Example:
        >>> def draw(num):
        ...     x = torch.randn(num)
        ...     return {"x": x, "minus_x": -x}
        >>> start = JointStart(draw)
        >>> sites = [{"name": name, "fn": dist.Normal(0.0, 1.0)} for name in ("x", "minus_x")]
        >>> [start(site) for site in sites]
        [tensor(1.5410), tensor(-1.5410)]
    """

    def __init__(
        self,
        draw: Callable[[int], Mapping[str, Tensor]],
        fallback: InitStrategy = init_to_uniform,
    ):
        self._draw, self.fallback = draw, fallback
        self._of_one_run = init_to_generated(generate=self._generate)

    def draw(self, num: int) -> Mapping[str, Tensor]:
        """As many draws, from any place in a model."""
        with outside_plates():
            return {name: value.detach() for name, value in self._draw(num).items()}

    def _generate(self) -> InitStrategy:
        values = {name: value[0] for name, value in self.draw(1).items()}
        return init_to_value(values=values, fallback=self.fallback)

    def __call__(self, site: SampleSite) -> object:
        """The value of one site, in one run of a model."""
        return self._of_one_run(site)
