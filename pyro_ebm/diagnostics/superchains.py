r"""Nested R-hat: whether many short chains agree.

A thousand chains of ten draws each may be all that a posterior needs, but split R-hat compares
chains with each other, and the mean of ten draws of one chain is far from that of another by chance
alone. Nested R-hat compares groups. Of :math:`K` *super-chains* each has :math:`M` chains of
:math:`N` draws, which start together, *before* the warmup, at a point of their own: chains that
have forgotten where they started differ as much inside of a super-chain as between two. With the
means :math:`\bar f_{mk}` of a chain, :math:`\bar f_k` of a super-chain and :math:`\bar f` of all,

.. math::

    \hat B = \frac{1}{K - 1} \sum_k (\bar f_k - \bar f)^2, \qquad
    \hat W = \frac{1}{K} \sum_k \Bigl[ \frac{1}{M - 1} \sum_m (\bar f_{mk} - \bar f_k)^2
        + \frac{1}{M} \sum_m \frac{1}{N - 1} \sum_n (f_{nmk} - \bar f_{mk})^2 \Bigr]

and :math:`\hat R_\nu = \sqrt{1 + \hat B / \hat W}`; a term is 0 where :math:`M` or :math:`N` is 1.
Of chains that have converged, with independent draws,

.. math:: \hat R_\nu^2 \approx 1 + \frac{1}{M (N + 1)} ,

so that it tells little where super-chains are small: a hundred draws in each bring it to 1.005. A
run counts as converged below :math:`1 + \epsilon` with :math:`\epsilon = .01`. Where each chain is
a super-chain, :math:`M = 1`, it is R-hat.

Reference:
    Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari and Gelman (2024), Nested R-hat: Assessing
    the convergence of Markov chain Monte Carlo when running many short chains.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from itertools import product

import torch
from pyro.ops.stats import effective_sample_size, hpdi
from torch import Tensor

from pyro_ebm.ops.arguments import check_count, check_tensor, shown


def nested_r_hat(x: Tensor, num_superchains: int) -> Tensor:
    r"""How much super-chains differ, :math:`\hat R_\nu = \sqrt{1 + \hat B / \hat W}`.

    Args:
        x: draws, shape ``(chains, draws, *site)``, one super-chain after another; a single draw of
            each chain will do.
        num_superchains: how many super-chains there are, :math:`K`.

    Returns:
        Shape ``(*site)``; NaN where all draws are equal.

    Raises:
        ValueError: unless there are at least two super-chains of equally many chains, and two draws
            in each.

    Reference:
        Margossian et al. (2024), Nested R-hat.

    Example:
        >>> x = torch.randn(1000, 10)
        >>> nested_r_hat(x, 10)
        tensor(1.0003)
        >>> nested_r_hat(x + torch.arange(10.0).repeat_interleave(100)[:, None], 10)
        tensor(3.0431)
    """
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape (chains, draws, *site), got {tuple(x.shape)}")
    chains, draws = x.shape[:2]
    check_superchains(num_superchains, chains, draws)
    x = x.reshape(num_superchains, -1, *x.shape[1:])  # (K, M, N, *site)
    of_chain = x.mean(2)
    of_superchain = of_chain.mean(1)
    between, within = of_superchain.var(0), torch.zeros_like(of_superchain)
    if x.shape[1] > 1:
        within = within + of_chain.var(1)
    if draws > 1:
        within = within + x.var(2).mean(1)
    return (1 + between / within.mean(0)).sqrt()


def check_superchains(num_superchains: object, num_chains: int, num_draws: int) -> int:
    """Raises a ValueError unless this many super-chains can be made of chains of so many draws."""
    num = check_count("num_superchains", num_superchains, 2)
    if num_chains % num:
        raise ValueError(
            f"num_superchains={shown(num)} must divide num_chains={num_chains}: super-chains have"
            " equally many chains"
        )
    if num_chains * num_draws == num:
        raise ValueError(
            f"nested R-hat needs at least two draws in each super-chain, got num_superchains={num}"
            " of one chain with one draw: make fewer super-chains, or more draws"
        )
    return num


def largest_nested_r_hat(
    num_superchains: int, num_chains: int, num_draws: int, autocorrelation_time: float, z: float
) -> float:
    r"""The greatest nested R-hat that converged chains give by chance.

    A chain has :math:`n = \max(1, N / \tau)` draws that count, and the means of super-chains have
    the variance :math:`1 / (M n)` of one, so that of normal draws
    :math:`M n\, (\hat R_\nu^2 - 1)` is a variance ratio :math:`F` with :math:`K - 1` and
    :math:`K (M n - 1)` degrees of freedom.

    Args:
        num_superchains: :math:`K`.
        num_chains: :math:`K M`.
        num_draws: :math:`N`, of each chain.
        autocorrelation_time: :math:`\tau`.
        z: the normal quantile of its probability.

    Example:
        >>> [round(largest_nested_r_hat(10, n, 10, 5.0, 3.1), 3) for n in (40, 200, 1000)]
        [1.206, 1.039, 1.008]
    """
    each = max(1.0, num_draws / autocorrelation_time) * num_chains / num_superchains
    within = num_superchains * (each - 1)
    return math.sqrt(1 + variance_ratio(num_superchains - 1, within, z) / each)


def variance_ratio(a: float, b: float, z: float) -> float:
    """The quantile of F with ``a`` and ``b`` degrees of freedom at the normal quantile ``z``.

    Its third root f is about a ratio of normals (Paulson 1942): with p = 2 / 9a and q = 2 / 9b,

        (1 - q) f - (1 - p)  =  z sqrt(q f^2 + p).

    Example:
        >>> round(variance_ratio(9, 90, 3.1), 2), variance_ratio(9, 2, 3.1)
        (3.51, inf)
    """
    p, q = 2 / (9 * a), 2 / (9 * b) if b > 0 else math.inf
    #   square    A f^2 - 2 B f + C = 0
    of_square, of_f, rest = (1 - q) ** 2 - z * z * q, (1 - q) * (1 - p), (1 - p) ** 2 - z * z * p
    if q >= 1 or of_square <= 0:
        return math.inf
    return ((of_f + math.sqrt(of_f**2 - of_square * rest)) / of_square) ** 3


def effective_draws(x: Tensor) -> Tensor:
    r"""The effective number of draws ``(chains, draws, *site)``; one draw of each counts as one.

    Of :math:`S` draws it is at most :math:`S \log_{10} S`: of a few draws that are antithetic by
    chance the estimate has no bound, or is negative.

    Reference:
        Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-normalization, folding, and
        localization.

    Example:
        >>> x = torch.tensor([1.0, -1.0]).repeat(4, 5) + 0.1 * torch.randn(4, 10)
        >>> effective_draws(x)
        tensor(64.0824)
    """
    chains, draws = x.shape[:2]
    if draws == 1:
        return x.new_full(x.shape[2:], chains)
    total = chains * draws
    most = total * max(1.0, math.log10(total))
    ess = effective_sample_size(x)
    return torch.where(ess < 0, most, ess.clamp(max=most))  # of a negative autocorrelation time


def nested_diagnostics(x: Tensor, num_superchains: int) -> OrderedDict[str, Tensor]:
    """The effective sample size and nested R-hat of a site, by Pyro's names."""
    return OrderedDict(n_eff=effective_draws(x), r_hat=nested_r_hat(x, num_superchains))


def print_nested_summary(samples: Mapping[str, Tensor], num_superchains: int, prob: float) -> None:
    """Prints Pyro's table of a run with nested R-hat, for any number of draws of each chain."""
    width = max([10, *(len(name) + 2 + 4 * (x.dim() - 2) for name, x in samples.items())])
    interval = [f"{50 * (1 - prob):.1f}%", f"{50 * (1 + prob):.1f}%"]
    columns = ["mean", "std", "median", *interval, "n_eff", "r_hat"]
    lines = ["", " " * width + "".join(f" {name:>9}" for name in columns)]
    for name, x in samples.items():
        flat = x.flatten(0, 1)
        parts = [flat.mean(0), flat.std(0), flat.median(0).values, *hpdi(flat, prob)]
        parts += nested_diagnostics(x, num_superchains).values()
        for index in product(*map(range, x.shape[2:])):
            label = name + (f"[{','.join(map(str, index))}]" if index else "")
            numbers = [f" {float(part[index]):>9.2f}" for part in parts]
            lines.append(f"{label:>{width}}" + "".join(numbers))
    chains = next(iter(samples.values())).shape[0] // num_superchains if samples else 0
    about = f"R-hat is nested, of {num_superchains} super-chains of {chains} chains"
    print("\n".join([*lines, "", about]))  # noqa: T201
