"""Who samples the real posteriors, with which settings, and how long."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.benchmarks.harness import versions
from tests.benchmarks.real.posteriors import REAL

CHAINS = (4, 16, 64)

# Draws of each chain: what somebody takes who wants some 1,000 effective ones, and a margin.
HMC = {4: 1000, 16: 500, 64: 250}
LANGEVIN = {4: 4000, 16: 1000, 64: 500}


@dataclass(frozen=True)
class Sampler:
    """A contestant."""

    name: str
    side: str
    """``"torch"`` or ``"jax"``: the worker that knows it."""
    draws: dict[int, int] = field(default_factory=lambda: HMC)
    """Of each chain, for each number of chains."""
    warmup: int | None = None
    """None leaves it to the sampler."""
    tuned: bool = False
    """Whether it has other settings than its defaults."""
    most_dims: int | None = None
    """Larger posteriors are left out: a dense matrix of 1,000 dimensions is nobody's choice."""
    only: tuple[str, ...] | None = None
    """The posteriors that it runs on."""
    alone: bool = False
    """Whether chains run one after another, so that four tell what more would take."""
    pooled: bool = False
    """Whether chains learn from each other, so that few of them may take longer than many."""

    @property
    def ours(self) -> bool:
        return self.name.startswith("pyro_ebm")

    @property
    def versions(self) -> str:
        peers = {
            "NumPyro": ("numpyro", "jax"),
            "BlackJAX": ("blackjax", "numpyro", "jax"),
            "nutpie": ("nutpie", "numpyro", "jax"),
        }
        return versions(*peers.get(self.name.split(" ")[0], ("pyro-ebm", "pyro-ppl", "torch")))


SAMPLERS = {
    s.name: s
    for s in (
        Sampler("pyro_ebm Langevin", "torch", LANGEVIN, pooled=True),
        Sampler("pyro_ebm ChEES", "torch", pooled=True),
        Sampler("pyro_ebm Langevin, tuned", "torch", LANGEVIN, 300, tuned=True, pooled=True),
        Sampler("pyro_ebm ChEES, tuned", "torch", HMC, 200, tuned=True, pooled=True),
        Sampler("pyro_ebm ChEES, diagonal", "torch", tuned=True, pooled=True, only=("hierarchy",)),
        Sampler("Pyro NUTS, jit", "torch", {4: 250}, alone=True),
        Sampler("NumPyro NUTS", "jax", warmup=500),
        Sampler("NumPyro NUTS, dense", "jax", warmup=500, tuned=True, most_dims=300),
        Sampler("BlackJAX NUTS, low rank", "jax", warmup=1000),
        Sampler("BlackJAX ChEES", "jax", warmup=1000, pooled=True),
        Sampler("BlackJAX ChEES, diagonal", "jax", warmup=1000, tuned=True, pooled=True),
        Sampler("nutpie", "jax"),
        Sampler("nutpie, low rank", "jax"),
    )
}


@dataclass(frozen=True)
class Setting:
    """A sampler on a posterior."""

    posterior: str
    sampler: Sampler
    chains: int
    warmup: int | None
    draws: int


def settings(
    posteriors: list[str], samplers: list[str], chains: list[int], quick: bool
) -> Iterator[Setting]:
    """The rows that are measured; contestants of a case are neighbours."""
    for posterior in posteriors:
        for count in chains:
            for name in samplers:
                sampler = SAMPLERS[name]
                if sampler.only is not None and posterior not in sampler.only:
                    continue
                if sampler.most_dims is not None and REAL[posterior].dim > sampler.most_dims:
                    continue
                if sampler.alone and count != min(chains):
                    continue
                nearest = min(sampler.draws, key=lambda known: abs(known - count))
                lengths = (50, 50) if quick else (sampler.warmup, sampler.draws[nearest])
                yield Setting(posterior, sampler, count, *lengths)
