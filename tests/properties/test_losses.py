"""Every loss on random energy sites, against its definition, row by row."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.nn.functional import logsigmoid

from pyro_ebm import UnnormalizedEnergy, losses, noise_conditional
from pyro_ebm.losses.contrastive.negatives import Negatives
from pyro_ebm.ops.score import draw_probes
from tests.properties.inputs import SIZES, holds

SUPPORTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "unit": constraints.unit_interval,
}
NOISE_RATIO = 3
SIGMAS = (1.0, 0.5)
OF_LEVELS = ("dual", "recovery")


@dataclass(frozen=True)
class Case:
    """An observed energy site, a row of which has E(x) = c (a . x^2 / 2 + (b sum x)^4 / 10)."""

    event: tuple[int, ...]
    plates: tuple[int, ...]
    inner: tuple[int, ...]
    """Independent rows within ``to_event``."""
    subsampled: bool
    scale: float
    masked: bool
    support: str
    base: bool
    conditional: bool
    double: bool
    seed: int

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        dtype = torch.float64 if self.double else torch.float32
        self.set("dtype", dtype)
        self.set("dim", torch.Size(self.event).numel())
        self.set("batch", torch.Size(self.plates[::-1] + self.inner))
        self.set("a", nn.Parameter(torch.rand(self.dim, dtype=dtype) + 0.5))
        self.set("b", nn.Parameter(torch.rand((), dtype=dtype) + 0.5))
        self.set("log_z", nn.Parameter(torch.rand((), dtype=dtype)))
        self.set("phi", nn.Parameter(torch.rand((), dtype=dtype) / 4))
        c = torch.rand(self.batch, dtype=dtype) + 0.5
        self.set("c", c if self.conditional else torch.ones_like(c))
        mask = torch.rand(self.plates[::-1]) < 0.7 if self.masked else torch.ones(self.plates[::-1])
        self.set("mask", mask.bool())
        self.set("levels", False)
        self.set("bits", False)
        z = torch.randn(self.batch + self.event, dtype=dtype)
        x = biject_to(SUPPORTS[self.support])(z)
        rows = self.mask.reshape(self.plates[::-1] + (1,) * (len(self.inner) + len(self.event)))
        self.set("x", torch.where(rows, x, torch.nan))  # what is masked out may be anything

    def set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def one_energy(self, x: Tensor, c: Tensor) -> Tensor:
        """E of points ``(..., dim)``."""
        return c * ((self.a * x.square()).sum(-1) / 2 + (self.b * x.sum(-1)) ** 4 / 10)

    def noisy_energy(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (1 + sigma) * self.energy(x)

    def energy(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.dim() - len(self.event)]
        return self.one_energy(x.reshape(batch + (self.dim,)), self.c)

    def plated(self) -> Any:
        stack = []
        for i, size in enumerate(self.plates):
            rows = torch.arange(size) if self.subsampled and i == 0 else None
            full = 2 * size + 1 if rows is not None else size
            stack.append(pyro.plate(f"p{i}", full, subsample=rows, dim=-1 - i))
        return stack

    def normal(self, attached: bool) -> Any:
        phi = self.phi if attached else self.phi.detach()
        wide = torch.full(self.event, 1.5, dtype=self.dtype)
        fn: Any = dist.Normal(phi * torch.ones_like(wide), wide)
        if self.support == "positive":
            fn = dist.LogNormal(phi * torch.ones_like(wide), wide)
        if self.support == "unit":
            fn = dist.Beta(1.2 + phi * torch.ones_like(wide), torch.ones_like(wide))
        return fn.to_event(len(self.event)).expand(self.batch)

    def noise(self) -> Any:
        return self.normal(attached=True)

    def model(self) -> None:
        base = None
        if self.base:
            zeros = torch.zeros(self.event, dtype=self.dtype)
            base = dist.Normal(zeros, 1.0).to_event(len(self.event))
        shapes = {"event_shape": self.event, "batch_shape": self.batch, "base": base}
        if self.bits:
            bits = constraints.boolean
            p = UnnormalizedEnergy(self.energy, self.event, bits, self.batch)
        elif self.levels:
            p = noise_conditional(self.noisy_energy, SIGMAS, **shapes)
        else:
            p = UnnormalizedEnergy(
                self.energy, support=SUPPORTS[self.support], log_normalizer=self.log_z, **shapes
            )
        self._in_plates(lambda: self._sample(p.to_event(len(self.inner)), self.x))

    def guide(self) -> None:
        self._in_plates(lambda: pyro.sample("x", self.noise().to_event(len(self.inner))))

    def _sample(self, fn: Any, x: Tensor) -> None:
        masked = poutine.mask(mask=self.mask) if self.masked else contextlib.nullcontext()
        with poutine.scale(scale=self.scale), masked:
            pyro.sample("x", fn, obs=x)

    def _in_plates(self, body: Any) -> None:
        plates = self.plated()
        if not plates:
            body()
        elif len(plates) == 1:
            with plates[0]:
                body()
        else:
            with plates[0], plates[1]:
                body()

    # -- the slow way ----------------------------------------------------------------------

    def log_p(self, x: Tensor, i: int, sigma: Tensor | float = 0.0) -> Tensor:
        """log h(x) - E(x) of one point ``(dim,)`` in row ``i``."""
        value = -(1 + sigma) * self.one_energy(x, self.c.flatten()[i])
        return value + dist.Normal(0.0, 1.0).log_prob(x).sum(-1) if self.base else value

    def weights(self) -> list[float]:
        size = self.plates[0] if self.plates else 1
        part = (2 * size + 1) / size if self.subsampled and self.plates else 1.0
        rows = self.mask.reshape(self.plates[::-1] + (1,) * len(self.inner)).expand(self.batch)
        return [self.scale * part * float(m) for m in rows.flatten()]

    def rows(self, x: Tensor) -> Tensor:
        """``(lead..., *batch, *event)`` as ``(lead, rows, dim)``."""
        return x.reshape(-1, self.batch.numel(), self.dim)

    def boundary(self, x: Tensor) -> Tensor:
        if self.support == "real":
            return torch.ones_like(x)
        return x.square() if self.support == "positive" else (x * (1 - x)).square()


def derivatives(case: Case, x: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, scores and the Jacobian of their product at one point, differentiable."""
    x = x.clone().requires_grad_()
    s = torch.autograd.grad(case.log_p(x, i), x, create_graph=True)[0]
    w = case.boundary(x)
    rows = [torch.autograd.grad(f, x, create_graph=True)[0] for f in w * s]
    return w, s, torch.stack(rows)


def row_terms(name: str, case: Case, seen: dict[str, Any]) -> list[Tensor | None]:
    """The objective of each row by the definition; None where the row is masked out."""
    x = case.rows(case.x)[0]
    q = case.normal(attached=name in ("flow", "cooperative"))
    torch.manual_seed(7)
    if name == "sliced":
        probes = draw_probes("rademacher", (2,), x)
    elif name == "denoising":
        xi = case.rows(torch.randn_like(case.x))[0]
    elif name == "discrepancy":
        xi = case.rows(torch.randn_like(case.x)) + case.rows(
            torch.randn(3, *case.x.shape, dtype=x.dtype)
        )
    elif name == "dual":
        level = torch.randint(2, case.batch + (1,)).flatten()
        sigma = torch.tensor(SIGMAS, dtype=case.dtype)[level]
        xi = torch.randn(case.batch + (case.dim,), dtype=case.dtype).reshape(x.shape)
    elif name == "recovery":
        level = torch.randint(2, case.batch).flatten()
        u, more = (case.rows(torch.randn_like(case.x))[0] for _ in range(2))
        sigma = torch.tensor([0.5, 1.0], dtype=case.dtype)[level]
        s = (torch.tensor([1.0, 2.0], dtype=case.dtype)[level] ** 2 - sigma**2).sqrt()
    elif name in ("nce", "ranking"):
        noise = q.sample((NOISE_RATIO,))
    elif name == "flow":
        noise = torch.cat([seen["first"](q)[None], q.rsample((NOISE_RATIO - 1,))])
    if name in ("nce", "ranking", "flow"):
        log_q_noise = q.log_prob(noise).reshape(NOISE_RATIO, -1)
        log_q = q.log_prob(case.x.nan_to_num(0.5)).flatten()
        noise = case.rows(noise)
    if name == "cooperative":
        log_q = q.log_prob(seen["negatives"]).flatten()
    terms: list[Tensor | None] = []
    for i, weight in enumerate(case.weights()):
        if weight == 0:
            terms.append(None)
        elif name == "pseudo":
            flips = torch.eye(case.dim, dtype=case.dtype)
            flipped = torch.stack([case.log_p((x[i] - flip).abs(), i) for flip in flips])
            terms.append(logsigmoid(case.log_p(x[i], i) - flipped).sum())
        elif name in ("cd", "cooperative"):
            contrast = case.log_p(x[i], i) - case.log_p(case.rows(seen["negatives"])[0, i], i)
            terms.append(contrast if name == "cd" else contrast + log_q[i])
        elif name == "denoising":
            moved = (x[i] + 0.2 * xi[i]).requires_grad_()
            s = torch.autograd.grad(case.log_p(moved, i), moved, create_graph=True)[0]
            terms.append(-(0.2 * s + xi[i]).square().sum() / 2)
        elif name == "discrepancy":
            back = torch.stack([case.log_p(x[i] + 0.4 * step, i) for step in xi[:, i]])
            terms.append(-((0.5 + (back - case.log_p(x[i], i)).exp().sum()) / 3).log())
        elif name == "dual":
            log_sigma = sigma[i].log().requires_grad_()
            moved = (x[i] + sigma[i] * xi[i]).requires_grad_()
            of = case.log_p(moved, i, log_sigma.exp())
            in_x, in_log = torch.autograd.grad(of, (moved, log_sigma), create_graph=True)
            change = in_log - (xi[i].square().sum() - case.dim)
            space = (sigma[i] * in_x + xi[i]).square().sum() / 2
            terms.append(-space - change.square() / (2 * case.dim))
        elif name == "recovery":
            noisier = x[i] + sigma[i] * more[i] - s[i] * u[i]
            negative = case.rows(seen["negatives"])[0, i]
            of_data, of_negative = (
                case.log_p(noisier + s[i] * v, i, sigma[i]) - v.square().sum() / 2
                for v in (u[i], negative)
            )
            terms.append(of_data - of_negative)
        elif name in ("score", "sliced"):
            w, s, jacobian = derivatives(case, x[i], i)
            trace = jacobian.diagonal().sum()
            if name == "sliced":
                trace = torch.stack([v @ jacobian @ v for v in probes[:, i]]).mean()
            terms.append(-trace - (w * s.square()).sum() / 2)
        else:
            g = case.log_p(x[i], i) - log_q[i]
            others = torch.stack([case.log_p(n, i) for n in noise[:, i]]) - log_q_noise[:, i]
            if name == "ranking":
                terms.append(g - torch.cat([g[None], others]).logsumexp(0))
            else:
                shift = case.log_z + math.log(NOISE_RATIO)
                terms.append(logsigmoid(g - shift) + logsigmoid(shift - others).sum())
    return terms


LOSSES = {
    "cd": lambda: losses.ContrastiveDivergence(num_steps=2),
    "score": losses.ScoreMatching,
    "sliced": lambda: losses.SlicedScoreMatching(num_projections=2),
    "denoising": lambda: losses.DenoisingScoreMatching(sigma=0.2),
    "discrepancy": lambda: losses.EnergyDiscrepancy(0.16, num_samples=3, stabilization=0.5),
    "pseudo": losses.PseudoLikelihood,
    "dual": lambda: losses.DenoisingScoreMatching(dual=True),
    "recovery": lambda: losses.RecoveryLikelihood(num_steps=2),
    "cooperative": lambda: losses.CooperativeTraining(num_steps=2),
    "nce": lambda: losses.NCE(noise_ratio=NOISE_RATIO),
    "ranking": lambda: losses.RankingNCE(noise_ratio=NOISE_RATIO),
    "flow": lambda: losses.FlowNCE(noise_ratio=NOISE_RATIO, alternate=None),
}


def loss_is_its_definition(name: str, case: Case) -> None:
    loss, seen = LOSSES[name](), {}
    if name in ("denoising", "discrepancy", *OF_LEVELS) and case.support != "real":
        return  # refused, as another test says
    case.set("levels", name in OF_LEVELS)
    if name == "pseudo":
        if case.base:
            return  # of real numbers
        case.set("bits", True)
        case.set("x", torch.where(case.x.isnan(), case.x, (case.x > 0.5).to(case.dtype)))
    term = loss.energy_term

    def seeded(site: Any) -> Tensor:
        torch.manual_seed(7)
        value = term(site)
        assert value.shape == case.batch
        return value

    loss.energy_term = seeded
    if name in ("cd", "recovery", "cooperative"):
        chains = loss.negatives.run

        def watched(*args: Any) -> Negatives:
            found = chains(*args)
            seen["negatives"] = found.x
            return found

        loss.negatives.run = watched

    def first(q: Any) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return q.rsample()

    seen["first"] = first
    parameters = [case.a, case.b, case.log_z, case.phi]
    torch.manual_seed(5)
    value = loss(case.model, case.guide if loss.needs_noise else lambda: None)()
    assert value.shape == ()
    assert value.isfinite()
    got = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
    terms = zip(case.weights(), row_terms(name, case, seen), strict=True)
    zero = 0 * sum(p.sum() for p in parameters)
    want = -sum((w * t for w, t in terms if t is not None), start=zero)
    tolerance = {"rtol": 1e-7, "atol": 1e-7} if case.double else {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(value, want.to(value), **tolerance)
    slopes = torch.autograd.grad(want, parameters)
    for k, (p, slope) in enumerate(zip(parameters, slopes, strict=True)):
        grad = got[k] if got and got[k] is not None else torch.zeros_like(p)
        climbs = name == "flow" and p is case.phi  # what the energy descends
        torch.testing.assert_close(grad, -slope if climbs else slope, **tolerance)


CASES = st.builds(
    Case,
    event=st.sampled_from([(), (1,), (2,), (2, 2)]),
    plates=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    inner=st.sampled_from([(), (), (1,), (2,)]),
    subsampled=st.booleans(),
    scale=st.sampled_from([1.0, 0.5, 2.0]),
    masked=st.booleans(),
    support=st.sampled_from([*SUPPORTS]),
    base=st.just(False),
    conditional=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 1000),
) | st.builds(
    Case,
    event=st.sampled_from([(), (1,), (2,), (2, 2)]),
    plates=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    inner=st.sampled_from([(), (2,)]),
    subsampled=st.booleans(),
    scale=st.sampled_from([1.0, 0.5]),
    masked=st.booleans(),
    support=st.just("real"),
    base=st.just(True),
    conditional=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
INPUTS = {"loss_is_its_definition": {"name": st.sampled_from([*LOSSES]), "case": CASES}}


@SIZES
def test_a_loss_and_its_gradient_are_those_of_the_definition(many):
    inputs = INPUTS["loss_is_its_definition"]
    holds(loss_is_its_definition, many, few=60, thousands=4000, **inputs)
