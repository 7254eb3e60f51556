"""``transforms=`` must map the support of a site onto the reals, one to one."""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.distributions import constraints as c
from torch import tensor
from torch.distributions.transforms import identity_transform

from pyro_ebm import MCMC, LangevinKernel, MHKernel
from pyro_ebm.mcmc import CompositeKernel
from pyro_ebm.models.sites.given_transforms import check_transform


class Undeclared(T.Transform):
    """It tells nothing of its domain."""

    bijective = True

    def __init__(self, there, back):
        super().__init__()
        self.there, self.back = there, back

    def _call(self, x):
        return self.there(x)

    def _inverse(self, y):
        return self.back(y)


POSITIVE, UNIT, ONE = c.positive, c.unit_interval, tensor(0.3)


class WrongDeterminant(T.ExpTransform):
    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x)


GOOD = {
    "log": (T.ExpTransform().inv, POSITIVE, ONE),
    "log, 0 included": (T.ExpTransform().inv, c.nonnegative, ONE),
    "inverse softplus": (T.SoftplusTransform().inv, POSITIVE, ONE),
    "which overflows": (
        Undeclared(lambda x: (x.exp() - 1).log(), lambda z: (1 + z.exp()).log()),
        POSITIVE,
        ONE,
    ),
    "logit": (T.SigmoidTransform().inv, UNIT, torch.full((300,), 0.3)),
    "composed": (
        T.ComposeTransform([T.AffineTransform(0.0, 0.1), T.SigmoidTransform().inv]),
        c.interval(0.0, 10.0),
        tensor([1.0, 2.0]),
    ),
    "shifted": (
        T.ComposeTransform([T.AffineTransform(-3.0, 1.0), T.ExpTransform().inv]),
        c.greater_than(3.0),
        tensor(4.0),
    ),
    "sticks": (T.StickBreakingTransform().inv, c.simplex, torch.ones(500) / 500),
    "ordered": (T.OrderedTransform().inv, c.ordered_vector, torch.arange(300.0)),
    "correlations": (T.CorrCholeskyTransform().inv, c.corr_cholesky, torch.eye(30)),
    "identity": (identity_transform, c.real, ONE),
    "affine": (T.AffineTransform(3.0, -2.0), c.real_vector, torch.ones(3)),
    "of vectors": (
        T.IndependentTransform(T.ExpTransform(), 1).inv,
        c.independent(POSITIVE, 1),
        torch.ones(3),
    ),
    "of numbers": (T.ExpTransform().inv, c.independent(POSITIVE, 1), torch.ones(3)),
    "permuted": (T.Permute(tensor([2, 0, 1])), c.real_vector, torch.ones(3)),
    "cube root": (
        Undeclared(lambda x: x**3, lambda z: z.sign() * z.abs() ** (1 / 3)),
        c.real,
        ONE,
    ),
}
BAD = {
    "exp": (
        T.ExpTransform(),
        POSITIVE,
        ONE,
        r"to the support .* give its inverse, \.inv",
    ),
    "sigmoid": (T.SigmoidTransform(), UNIT, ONE, r"give its inverse, \.inv"),
    "sticks": (
        T.StickBreakingTransform(),
        c.simplex,
        torch.ones(3) / 3,
        r"give its inverse, \.inv",
    ),
    "undeclared exp": (Undeclared(torch.exp, torch.log), POSITIVE, ONE, r"inverse, \.inv"),
    "logit of a positive": (T.SigmoidTransform().inv, POSITIVE, ONE, "defined on Interval"),
    "log of a fraction": (T.ExpTransform().inv, UNIT, ONE, "which is outside"),
    "identity": (identity_transform, POSITIVE, ONE, "which is outside"),
    "tanh": (T.TanhTransform().inv, UNIT, ONE, "which is outside"),
    "logit of a real": (T.SigmoidTransform().inv, c.real, ONE, "defined on Interval"),
    "log of a real": (T.ExpTransform().inv, c.real, ONE, "defined on GreaterThan"),
    "exp of a real": (T.ExpTransform(), c.real, ONE, "maps to GreaterThan"),
    "bounded": (
        Undeclared(lambda x: (x / 100).logit(), lambda z: 100 * z.sigmoid()),
        POSITIVE,
        ONE,
        "does not reach",
    ),
    "half of an interval": (
        T.ComposeTransform([T.AffineTransform(0.0, 0.2), T.SigmoidTransform().inv]),
        c.interval(0.0, 10.0),
        ONE,
        "does not reach",
    ),
    "from 3": (
        T.ComposeTransform([T.AffineTransform(-3.0, 1.0), T.ExpTransform().inv]),
        POSITIVE,
        tensor(4.0),
        "does not reach",
    ),
    "a determinant of 1": (WrongDeterminant().inv, POSITIVE, ONE, "its log_abs_det_jacobian"),
    "softmax": (T.SoftmaxTransform().inv, c.simplex, torch.ones(3) / 3, "not bijective"),
    "constant": (T.AffineTransform(0.0, 0.0), c.real, ONE, "outside"),
    "no inverse": (Undeclared(lambda x: 2 * x, lambda z: 0.4 * z), c.real, ONE, "bring"),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_good(name, dtype):
    transform, support, x = GOOD[name]
    check_transform("x", transform, support, x.to(dtype))


def test_one_that_takes_a_single_dtype():
    weight = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    inverse = weight.inverse()
    transform = Undeclared(lambda x: x @ weight.T, lambda z: z @ inverse.T)
    check_transform("x", transform, c.real_vector, torch.ones(2))


@pytest.mark.parametrize("name", BAD)
def test_bad(name):
    transform, support, x, why = BAD[name]
    with pytest.raises(ValueError, match=f"(?s)transforms={{'x': .*{why}"):
        check_transform("x", transform, support, x)


def model():
    pyro.sample("x", dist.Exponential(1.0))


@pytest.mark.parametrize("kernel", [LangevinKernel, MHKernel])
def test_kernels_look_at_them(kernel):
    mcmc = MCMC(kernel(model, transforms={"x": T.SigmoidTransform().inv}), 10, 10, num_chains=4)
    with pytest.raises(ValueError, match="onto the reals, one to one: it is defined on"):
        mcmc.run()


def test_a_discrete_site_has_none():
    def mixed():
        pyro.sample("k", dist.Bernoulli(0.5))
        model()

    kernel = CompositeKernel(mixed, transforms={"k": T.ExpTransform().inv})
    with pytest.raises(ValueError, match=r"names \['k'\], but the continuous .* are \['x'\]"):
        MCMC(kernel, 10, 10).run()


def test_of_a_potential_fn():
    def potential_fn(params):
        return params["x"].square().sum() / 2

    start = {"x": torch.zeros(3)}

    def run(of_kernel=None, of_runner=None):
        kernel = LangevinKernel(potential_fn=potential_fn, transforms=of_kernel)
        mcmc = MCMC(kernel, 5, 5, initial_params=start, transforms=of_runner, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples()["x"]

    assert (run({"x": T.ExpTransform().inv}) > 0).all()
    assert (run(of_runner={"x": T.ExpTransform().inv}) > 0).all()
    with pytest.raises(ValueError, match=r"maps to GreaterThan.*such as its inverse, \.inv"):
        run({"x": T.ExpTransform()})
    with pytest.raises(ValueError, match=r"maps to GreaterThan.*such as its inverse, \.inv"):
        run(of_runner={"x": T.ExpTransform()})
    with pytest.raises(ValueError, match="site 'x' onto the reals, one to one: its inverse maps"):
        run({"x": Undeclared(torch.exp, torch.log)})
    with pytest.raises(ValueError, match=r"transforms= names \['y'\], but the sites are \['x'\]"):
        run({"y": T.ExpTransform().inv})
