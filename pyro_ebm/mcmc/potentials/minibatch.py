r"""The potential of a model that looks at a part of its data, given which part."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_ebm.distributions.checks.callers import Model
from pyro_ebm.internals.tracing import is_capturing
from pyro_ebm.mcmc.potentials.model import ModelPotential
from pyro_ebm.mcmc.potentials.singular import nan_where_singular
from pyro_ebm.models.checks.first_run import validated_trace
from pyro_ebm.models.over_chains import OverChains
from pyro_ebm.models.subsamples import (
    GivenRows,
    Rows,
    blocks,
    draw_rows,
    refuse_local_latents,
    stacked,
)
from pyro_ebm.ops.score import value_and_grad

ROWS_AT_ONCE = 20_000
"""So many rows are evaluated at once where all of the data are."""


class MinibatchPotential(ModelPotential):
    r"""The potential of a Pyro model with subsampled plates, at rows that are given.

    .. math:: U_S(z), \qquad \mathbb E_S\, U_S(z) = U(z)

    Called without rows it is one fixed density, that of the first rows of each plate. When it is
    made, all rows are looked at once, so that data which the model does not take are found.

    Args:
        model: a Pyro model, or a distribution.
        args: its positional arguments.
        kwargs: its keyword arguments.
        **settings: those of :class:`ModelPotential`.

    Raises:
        NotImplementedError: for a latent inside a subsampled plate.
        ValueError: if the model does not look at the rows that a plate draws, and all that
            :class:`ModelPotential` raises.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 4, subsample_size=2) as rows:
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])
        >>> potential = MinibatchPotential(model, (torch.arange(4.0),))
        >>> z, rows = torch.zeros(1, 1), {"data": torch.tensor([0, 3])}
        >>> potential.value_and_grad_at(z, rows)[1]  # (4 / 2) (0 + 3) of 0 + 1 + 2 + 3
        tensor([[-6.]])
        >>> potential.of_all_rows(z[0])[1]
        tensor([-6.])
    """

    def __init__(
        self,
        model: Model,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
        **settings: Any,
    ):
        self.given = GivenRows()
        super().__init__(model, args, kwargs, **settings)
        self._with_rows = OverChains(self._one_at, on_loop=self._on_loop)

    def _prepared(self, model: Model) -> Model:
        return self.given(model)

    def _first_run(self) -> poutine.Trace:
        run = self.bound.with_model(self._fixed(self.bound.model))
        trace = validated_trace(run, subsamples=True)
        if plates := self.given.plates:
            refuse_local_latents(trace, plates)
            self._look_at_all_rows(run.starting_at(trace))
        return trace

    def _look_at_all_rows(self, run: Any) -> None:
        """Validates the data of all rows, and sees that the model looks at them."""
        plates, first = self.given.plates, self.given.rows
        sums = []
        for rows, _ in blocks(plates, _device(first)):
            self.given.rows = rows
            sums.append(torch.as_tensor(validated_trace(run, subsamples=True).log_prob_sum()))
        self.given.rows = first
        if len(sums) > 1 and all(torch.equal(x, sums[0]) for x in sums):
            names = ", ".join(map(repr, plates))
            raise ValueError(
                f"the model has the same density whichever rows its subsampled plates ({names})"
                " draw: give it all the data, and index them by the rows, as in `with"
                ' pyro.plate("data", N, subsample_size=n) as rows: ... obs=y[rows]`'
            )

    # -- given rows ----------------------------------------------------------------------------

    def draw_rows(self, num: int | None = None) -> Rows:
        """A random subsample of each plate for all chains, ``(n,)``, or one each, ``(num, n)``."""
        plates = self.given.plates
        return draw_rows(plates, num, _device(self.given.rows)) if plates else {}

    def value_and_grad_at(self, z: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The potential ``(chains,)`` and its gradient ``(chains, dim)`` at the rows, detached.

        Args:
            z: positions, shape ``(chains, dim)``.
            rows: of each plate, shape ``(n,)`` for all chains or ``(chains, n)``.
        """
        before = self.given.rows
        try:
            if not (rows and next(iter(rows.values())).dim() > 1):
                self.given.rows = rows or before
                return self.value_and_grad(z)
            with self.evaluating():
                try:
                    return value_and_grad(lambda z: self._with_rows(z, rows), z)
                except torch.linalg.LinAlgError:
                    if is_capturing():
                        raise
                    return self._where_regular(z, rows)
        finally:
            self.given.rows = before

    def _where_regular(self, z: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The same where a matrix of some chain is singular: its potential is NaN."""

        def at(numbered: Tensor) -> tuple[Tensor, Tensor]:
            chain = numbered[:, -1].long()
            some = {name: x[chain] for name, x in rows.items()}
            value, grad = value_and_grad(lambda z: self._with_rows(z, some), numbered[:, :-1])
            return value, torch.cat([grad, grad.new_zeros(len(grad), 1)], -1)

        numbers = torch.arange(len(z), device=z.device, dtype=z.dtype)
        value, grad = nan_where_singular(at, torch.cat([z, numbers[:, None]], -1))
        return value, grad[:, :-1]

    def _one_at(self, z: Tensor, rows: Rows) -> Tensor:
        self.given.rows = rows
        return self._one(z)

    # -- all rows ------------------------------------------------------------------------------

    def of_all_rows(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The potential ``()`` of all the data and its gradient ``(dim,)`` at ``z``, ``(dim,)``."""
        value, grad = z.new_zeros((), dtype=torch.double), torch.zeros_like(z, dtype=torch.double)
        for rows, weights in self._block_batches():
            values, grads = self.value_and_grad_at(z.expand(len(weights), -1), rows)
            weight = weights.to(value)
            value, grad = value + weight @ values.double(), grad + weight @ grads.double()
        return value.to(z.dtype), grad.to(z.dtype)

    def hessian_products(self, z: Tensor, v: Tensor) -> Tensor:
        """Products of the Hessian of the potential of all the data, shape ``(k, dim)``.

        Args:
            z: a position, shape ``(dim,)``.
            v: the vectors that it is multiplied with, shape ``(k, dim)``.
        """
        total = torch.zeros_like(v, dtype=torch.double)
        for rows, weights in self._block_batches():
            total = total + self._block_products(z, v, rows, weights).double()
        return total.to(z.dtype)

    def _block_products(self, z: Tensor, v: Tensor, rows: Rows, weights: Tensor) -> Tensor:
        before = self.given.rows
        with self.evaluating(), torch.enable_grad():
            try:
                at = z.expand(len(weights), -1).clone().requires_grad_()
                values = self._with_rows(at, rows) if rows else self(at)
                weighted = (values * weights.to(values)).sum()
                (grad,) = torch.autograd.grad(weighted, at, create_graph=True)
                along = grad.sum(0)
                if not along.requires_grad:  # of a potential that is linear
                    return torch.zeros_like(v)
                products = []
                for each in v:
                    (product,) = torch.autograd.grad(
                        along @ each, at, retain_graph=True, allow_unused=True
                    )
                    products.append(torch.zeros_like(z) if product is None else product.sum(0))
                return torch.stack(products)
            finally:
                self.given.rows = before

    def _block_batches(self) -> Iterator[tuple[Rows, Tensor]]:
        """Blocks of rows, some at a time, and their weights."""
        plates = self.given.plates
        if not plates:
            yield {}, torch.ones(1, dtype=torch.double)
            return
        rows_of_one = 1
        for plate in plates.values():
            rows_of_one *= plate.subsample_size
        found = blocks(plates, _device(self.given.rows))
        while some := list(itertools.islice(found, max(1, ROWS_AT_ONCE // rows_of_one))):
            weights = torch.tensor([weight for _, weight in some], dtype=torch.double)
            yield stacked([rows for rows, _ in some]), weights


def _device(rows: Rows) -> torch.device:
    return next(iter(rows.values())).device
