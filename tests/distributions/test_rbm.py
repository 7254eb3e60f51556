"""Restricted Boltzmann machines of bits: every claim against the table of all their states."""

import copy
import itertools
import math
import pickle
import subprocess
import sys
import textwrap

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_ebm import MCMC, LangevinKernel, NormalizerError
from pyro_ebm.distributions.boltzmann.rbm import RBM, JointRBM
from tests.statistics import assert_mean


def parameters(n, m, batch=(), dtype=torch.float64):
    shapes = [(n, m), (n,), (m,)]
    return tuple(torch.randn(batch + shape, dtype=dtype) for shape in shapes)


def machine(n, m, batch=(), dtype=torch.float64, scale=1.0):
    return RBM(*(scale * t for t in parameters(n, m, batch, dtype)))


def all_bits(n, dtype=torch.float64):
    return torch.tensor(list(itertools.product([0, 1], repeat=n)), dtype=dtype)


def table(p):
    """-E(x, z) of all states, shape ``(2^n, 2^m)``, in the words of the definition."""
    x, z = all_bits(p.num_visible), all_bits(p.num_hidden)
    w, b, c = p.weights.double(), p.visible_bias.double(), p.hidden_bias.double()
    return torch.stack([torch.stack([xi @ w @ zj + b @ xi + c @ zj for zj in z]) for xi in x])


SIZES = [(4, 3), (3, 4), (1, 1), (2, 5)]


# -- the density ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_energies_and_log_z_against_all_states(n, m):
    p = machine(n, m)
    x, log_joint = all_bits(n), table(p)
    assert_close(p.free_energy(x), -log_joint.logsumexp(1))
    assert_close(p.energy(x), p.free_energy(x))
    joint = p.joint()
    assert_close(joint.energy(all_bits(n + m)), -log_joint.flatten())
    log_z = log_joint.logsumexp((0, 1))
    assert_close(p.exact_log_normalizer(), log_z)
    assert_close(joint.exact_log_normalizer(), log_z)
    assert_close(p.normalized(p.exact_log_normalizer()).log_prob(x).exp().sum(), x.new_tensor(1.0))


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_conditionals_against_all_states(n, m):
    p = machine(n, m)
    x, z, log_joint = all_bits(n), all_bits(m), table(p)
    for q in [p, p.joint()]:
        assert_close(q.hidden_given(x[:, None]).log_prob(z), log_joint.log_softmax(1))
        assert_close(q.visible_given(z[:, None]).log_prob(x), log_joint.log_softmax(0).T)
    assert p.hidden_given(x).event_shape == (m,)
    assert p.visible_given(z).event_shape == (n,)


def test_softplus_is_exact_in_float64():
    # softplus of 25 is 25 + 1.4e-11, which torch's default threshold drops
    softplus = 25 + math.log1p(math.exp(-25))
    p = RBM(*(torch.tensor(v, dtype=torch.float64) for v in ([[5.0]], [3.0], [20.0])))
    assert p.energy(torch.ones(1)).item() == pytest.approx(-3 - softplus, rel=1e-14)
    p = RBM(*(torch.tensor(v, dtype=torch.float64) for v in ([[0.0]], [25.0], [0.0])))
    want = math.log(2) + softplus  # the hidden units are enumerated
    assert p.exact_log_normalizer().item() == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_large_weights_do_not_overflow(size):
    p = RBM(*(size * t for t in parameters(5, 3, dtype=torch.float32)))
    log_z = p.exact_log_normalizer()
    torch.testing.assert_close(log_z.double(), table(p).logsumexp((0, 1)), rtol=1e-6, atol=0.0)
    p = p.normalized(log_z)
    assert p.log_prob(all_bits(5)).isfinite().all()
    assert p.gibbs_sweep(all_bits(5), p.gibbs_noise(all_bits(5))).isfinite().all()


def test_gradient_of_the_log_likelihood():
    # grad_W log p(x) = x E[z' | x] - E[x z']
    weights, b, c = (t.requires_grad_() for t in parameters(4, 3))
    p = RBM(weights, b, c)
    data = all_bits(4)[[3, 7, 7, 8]]
    p.normalized(p.exact_log_normalizer()).log_prob(data).mean().backward()
    with torch.no_grad():
        x, z = all_bits(4), all_bits(3)
        joint = table(p).flatten().softmax(0).reshape(16, 8)
        hidden = p.hidden_given(data).mean
        assert_close(weights.grad, data.T @ hidden / 4 - x.T @ joint @ z)
        assert_close(b.grad, data.mean(0) - joint.sum(1) @ x)
        assert_close(c.grad, hidden.mean(0) - joint.sum(0) @ z)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(("n", "m"), [(3, 2), (2, 3)])
def test_a_batch_of_any_parameter_as_one_by_one(n, m, which):
    single = parameters(n, m)
    batched = list(single)
    batched[which] = torch.randn((2, 3) + single[which].shape, dtype=torch.float64)
    p, x, z = RBM(*batched), all_bits(n), all_bits(m)
    assert p.batch_shape == (2, 3)
    xs, zs = x[:, None, None], z[:, None, None]
    log_z = p.exact_log_normalizer()
    for i, j in itertools.product(range(2), range(3)):
        one = RBM(*(t[i, j] if k == which else t for k, t in enumerate(batched)))
        assert_close(p.energy(xs)[:, i, j], one.energy(x))
        assert_close(p.hidden_given(xs).mean[:, i, j], one.hidden_given(x).mean)
        assert_close(p.visible_given(zs).mean[:, i, j], one.visible_given(z).mean)
        assert_close(log_z.expand(2, 3)[i, j], one.exact_log_normalizer())


def test_under_vmap():
    batched = parameters(4, 3, (5,))
    x = all_bits(4)

    def both(*args):
        p = RBM(*args, validate_args=False)
        return p.energy(x), p.exact_log_normalizer(), p.joint().tempered(0.5).visible_given(z).mean

    z = all_bits(3)
    p = RBM(*batched)
    energy, log_z, mean = torch.func.vmap(both)(*batched)
    assert_close(energy, p.energy(x[:, None]).T)
    assert_close(log_z, p.exact_log_normalizer())
    assert_close(mean, p.joint().tempered(0.5).visible_given(z[:, None]).mean.transpose(0, 1))


def test_bits_of_any_dtype():
    p, x = machine(4, 3, dtype=torch.float32), all_bits(4)
    want = p.energy(x.float())
    for dtype in [torch.bool, torch.uint8, torch.long, torch.float64]:
        value = x.to(dtype)
        assert_close(p.log_prob(value), -want)
        swept = p.gibbs_sweep(value, p.gibbs_noise(value))
        assert swept.dtype == dtype
        assert p.hidden_given(value).mean.dtype == torch.float32


# -- many states ---------------------------------------------------------------------------------

LARGE = """
    import pathlib, resource, sys
    import torch
    from pyro_ebm.distributions.boltzmann.rbm import RBM

    def peak():
        status = pathlib.Path("/proc/self/status")
        if status.exists():  # in Linux, ru_maxrss starts at that of the process that forked
            kilobytes = status.read_text().partition("VmHWM:")[2].split()[0]
            return int(kilobytes) / 2**10
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights, b, c = torch.randn(784, 16), torch.randn(784), torch.randn(16)
    weights[10:] = 0
    small = RBM(weights[:10], b[:10], c)
    want = small.exact_log_normalizer() + torch.nn.functional.softplus(b[10:]).sum()
    warm = torch.randn(8, 8, requires_grad=True)
    from torch.utils.checkpoint import checkpoint
    checkpoint(lambda: (warm @ warm).sum(), use_reentrant=False).backward()
    before = peak()
    got = RBM(weights.requires_grad_(), b, c).exact_log_normalizer()
    got.backward()
    print(want.item(), got.item(), peak() - before)
"""


def test_784_visible_and_16_hidden_units_in_bounded_memory():
    # Units without weights are independent, each with a softplus of its bias in log Z. A table of
    # the preactivations of all 2^16 states has 206 MB, and autograd would hold several.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LARGE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    want, got, megabytes = map(float, done.stdout.split())
    assert got == pytest.approx(want, rel=1e-5)
    assert megabytes < 300  # usually some 35; a table at once, with its gradient, several times 206


def test_too_many_units_are_refused():
    p = machine(30, 784)
    for q in [p, p.joint()]:
        with pytest.raises(ValueError, match=r"30 units, 2\^30 states, and max_units=25.*anneal"):
            q.exact_log_normalizer()
        with pytest.raises(ValueError, match=r"30 units"):
            q.exact_sample()
    with pytest.raises(ValueError, match=r"4 units.*max_units=3"):
        machine(5, 4).exact_log_normalizer(max_units=3)


# -- as a distribution ---------------------------------------------------------------------------


def test_joint_and_marginal_share_what_is_known_of_log_z():
    p = machine(4, 3)
    assert p.joint().normalizer_state == "unknown"
    known = p.normalized(p.exact_log_normalizer())
    joint = known.joint()
    assert joint.is_normalized
    assert_close(joint.log_prob(all_bits(7)).exp().sum(), torch.tensor(1.0).double())
    assert joint.marginal().is_normalized
    assert_close(joint.marginal().log_prob(all_bits(4)), known.log_prob(all_bits(4)))
    assert joint.tempered(0.5).normalizer_state == "unknown"
    assert joint.tempered(1) is joint
    for flat in (joint.tempered(0), machine(4, 3).joint().expand([2]).tempered(0.0)):
        assert flat.is_normalized
        log_p = flat.log_prob(all_bits(7)[:, None])
        assert_close(log_p, torch.full_like(log_p, -7 * math.log(2)))
    # only a number tells: a tensor may be computed from a latent
    assert joint.tempered(torch.tensor(1.0)).normalizer_state == "unknown"
    with pytest.raises(ValueError, match="beta must be finite, got nan"):
        joint.tempered(math.nan)


def test_split():
    p = machine(4, 3).joint()
    xz = torch.arange(14.0).reshape(2, 7)
    x, z = p.split(xz)
    assert_close(x, xz[:, :4])
    assert_close(z, xz[:, 4:])


def test_expand_shares_parameters():
    p = machine(4, 3).expand((5,))
    assert p.batch_shape == (5,)
    assert p.unexpanded.batch_shape == ()
    assert p.weights.shape == (4, 3)
    assert p.energy(all_bits(4)[:, None]).shape == (16, 5)
    joint = p.joint()
    assert (joint.batch_shape, joint.unexpanded.batch_shape) == ((5,), ())
    assert p.hidden_given(torch.ones(4)).batch_shape == (5,)
    known = p.normalized(p.exact_log_normalizer())
    assert known.unexpanded.is_normalized
    assert known.joint().expand((2, 5)).marginal().is_normalized
    by_row = p.normalized(torch.arange(5.0))
    assert_close(by_row.joint().log_normalizer, torch.arange(5.0).double())


def test_in_a_plate():
    p, data = machine(4, 3), all_bits(4)
    p = p.normalized(p.exact_log_normalizer())

    def model(data):
        with pyro.plate("data", len(data)):
            return pyro.sample("x", p, obs=data)

    trace = poutine.trace(model).get_trace(data)
    assert_close(trace.log_prob_sum(), p.log_prob(data).sum())


def test_pickles_and_copies():
    p = machine(4, 3).expand((2,))
    x = all_bits(4)[:, None]
    for q in [p, p.joint().marginal()]:
        for clone in [pickle.loads(pickle.dumps(q)), copy.deepcopy(q)]:
            assert_close(clone.energy(x), p.energy(x))
            assert clone.batch_shape == (2,)


def test_repr():
    p = machine(4, 3)
    assert repr(p) == "RBM(visible=4, hidden=3, log_normalizer=unknown)"
    p = p.normalized(1.0).expand((2,)).joint()
    assert repr(p) == "JointRBM(visible=4, hidden=3, batch_shape=(2,), log_normalizer=known)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_are_bits_of_the_parameters_dtype(dtype):
    for p in [machine(4, 3, (2,), dtype), machine(4, 3, (2,), dtype).joint()]:
        x = p.starting_points((100,))
        assert x.dtype == dtype
        assert x.shape == (100, 2) + p.event_shape
        assert p.support.check(x).all()


def bernoulli_regression(x, normalized):
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    parameters = torch.zeros(3, 2), bias, torch.zeros(2)
    log_z = RBM(*parameters).exact_log_normalizer() if normalized else None
    with pyro.plate("data", len(x)):
        pyro.sample("x", RBM(*parameters, log_normalizer=log_z), obs=x)


def test_a_posterior_of_the_bias_wants_log_z():
    x = torch.bernoulli(torch.full((50, 3), 0.7))
    with pytest.raises(NormalizerError):
        MCMC(LangevinKernel(bernoulli_regression), 5, 5, disable_progbar=True).run(x, False)
    mcmc = MCMC(LangevinKernel(bernoulli_regression), 60, 80, num_chains=100, disable_progbar=True)
    mcmc.run(x, True)  # vectorized over chains, log Z included
    # without weights the units are independent: Normal prior, Bernoulli likelihood
    grid = torch.linspace(-3, 4, 2000, dtype=torch.float64)[:, None]
    log_p = dist.Normal(0.0, 1.0).log_prob(grid) + x.sum(0) * grid - 50 * grid.exp().log1p()
    want = (log_p.softmax(0) * grid).sum(0)
    assert_mean(mcmc.get_samples(group_by_chain=True)["bias"], want)


# -- bad input -----------------------------------------------------------------------------------

W, B, C = torch.zeros(4, 3), torch.zeros(4), torch.zeros(3)


@pytest.mark.parametrize("cls", [RBM, JointRBM])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((torch.zeros(4), B, C), r"weights must have shape \(\*batch, n, m\).*got \(4,\)"),
        ((torch.zeros(0, 3), B, C), r"weights must have shape"),
        ((W, torch.zeros(5), C), r"visible_bias must have shape \(\*batch, 4\).*got \(5,\)"),
        ((W, torch.zeros(()), C), r"visible_bias must have shape \(\*batch, 4\).*got \(\)"),
        ((W, B, torch.zeros(4)), r"hidden_bias must have shape \(\*batch, 3\).*got \(4,\)"),
        ((W.T, B, C), r"visible_bias must have shape \(\*batch, 3\)"),
        ((torch.zeros(2, 4, 3), torch.zeros(5, 4), C), r"do not broadcast: .*\(2,\).*\(5,\)"),
        ((W.long(), B, C), r"weights must be a tensor of floating numbers, got torch.int64"),
        ((W, 0.0, C), r"visible_bias must be a tensor of floating numbers, got float"),
        ((W, B, C.double()), r"hidden_bias has dtype torch.float64, the weights have"),
        ((W * torch.nan, B, C), r"parameter weights"),
    ],
)
def test_bad_parameters(cls, args, says):
    with pytest.raises(ValueError, match=says):
        cls(*args)


def test_a_base_is_refused():
    # it would not be in the free energy's log Z
    base = dist.Bernoulli(0.5).expand([4]).to_event(1)
    with pytest.raises(TypeError, match="base"):
        RBM(W, B, C, base=base)


@pytest.mark.parametrize("joint", [False, True])
def test_values_that_are_no_bits_are_refused(joint):
    p = RBM(W, B, C)  # made in the test: whether it validates is a global setting
    p = p.joint() if joint else p
    gray = torch.full((2,) + p.event_shape, 0.5)
    gray[0, 0] = 0.25
    with pytest.raises(ValueError, match=r"0 or 1.*between 0.25 and 0.5: binarize.*GaussianRBM"):
        p.log_prob(gray)
    with pytest.raises(ValueError, match="0 or 1"):
        p.log_prob(2 * gray - 1)  # spins
    with pytest.raises(ValueError, match="0 or 1"):
        p.log_prob(gray * torch.nan)


def test_values_of_the_wrong_shape():
    p = RBM(W, B, C)
    with pytest.raises(ValueError, match=r"event_shape=\(4,\), got shape \(2, 3\)"):
        p.energy(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"visible units .* shape \(\*sample, \*batch, 4\), got"):
        p.hidden_given(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"hidden units .* shape \(\*sample, \*batch, 3\), got"):
        p.visible_given(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"visible units and batch .* do not broadcast"):
        p.expand((5,)).hidden_given(torch.zeros(2, 4))
