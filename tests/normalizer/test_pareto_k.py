"""The tail of weights, the same in both generations of ArviZ."""

import arviz
import pytest
import torch

from pyro_ebm.ops.pareto import MIN_WEIGHTS, pareto_k

INF = float("inf")
INSTALLED = int(arviz.__version__.split(".")[0])


@pytest.fixture(params=[1] if INSTALLED else [0, 1], ids=lambda generation: f"arviz{generation}")
def _generation(request, monkeypatch):
    if request.param != INSTALLED:
        monkeypatch.setattr(arviz, "__version__", f"{request.param}.0.0")


@pytest.mark.usefixtures("_generation")
@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0])
def test_the_shape_of_a_pareto_tail(shape):
    # u^-k has a generalized Pareto tail of shape k; the fit to m = 3 sqrt(n) of n values has the
    # standard error (1 + k) / sqrt(m)
    n = 40_000
    log_weights = -shape * torch.rand(n, 5, dtype=torch.float64).log()
    error = (1 + shape) / (3 * n**0.5 * 5) ** 0.5
    assert (pareto_k(log_weights).mean() - shape).abs() < 4.5 * error


@pytest.mark.usefixtures("_generation")
def test_it_does_not_depend_on_the_constant():
    log_weights = 2 * torch.randn(1000, dtype=torch.float64)
    k = pareto_k(log_weights)
    assert torch.allclose(pareto_k(log_weights + 300), k, atol=1e-6)
    assert torch.allclose(pareto_k(log_weights - 300), k, atol=1e-6)


def test_both_generations_agree(monkeypatch):
    log_weights = torch.randn(2000, 2) * torch.tensor([1.0, 3.0])
    found = []
    for version in ["0.23.4", "1.0.0"]:
        monkeypatch.setattr(arviz, "__version__", version if INSTALLED == 0 else "1.0.0")
        found.append(pareto_k(log_weights))
    # they count the tail with and without the cutoff
    assert torch.allclose(*found, atol=0.05)


@pytest.mark.usefixtures("_generation")
def test_shapes_zeros_and_ties():
    log_weights = torch.randn(100, 2, 3, dtype=torch.float64)
    log_weights[:50] = -INF
    k = pareto_k(log_weights)
    assert k.shape == (2, 3)
    assert k.dtype == torch.float64
    assert k.isfinite().all()
    assert pareto_k(torch.zeros(100)) == -INF
    outlier = torch.zeros(100)
    outlier[3] = 50.0
    assert pareto_k(outlier) == INF


def test_wrong_input():
    with pytest.raises(ValueError, match=f"at least {MIN_WEIGHTS}"):
        pareto_k(torch.zeros(24))
    with pytest.raises(ValueError, match="NaN or"):
        pareto_k(torch.full((30,), float("nan")))
    with pytest.raises(ValueError, match="NaN or"):
        pareto_k(torch.full((30,), INF))
