r"""The check that an energy is smooth enough for score matching.

Score matching replaces the unknown score of the data by a divergence: with a Hessian :math:`H` of
:math:`\log p_\theta`, the trace of :math:`H` is to be the whole of it. Of a piecewise linear energy
(a network of ReLU, an absolute value) the score :math:`s` is constant but for jumps, and autograd's
Hessian, which does not see jumps, is 0. What is left of the objective, :math:`|s|^2 / 2`, is
smallest where the energy is flat, whatever the data are.

A divergence without a gradient in some parameter is not the sign: that of a Gaussian has none in
the mean, and rightly so. The sign is that between two points :math:`x` and :math:`x + d` the
parameter moves the change of the score and not its derivative,

.. math:: d^\top \big(s(x + d) - s(x)\big) \ne \int_0^1 d^\top H(x + t d)\, d\, dt .
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from pyro_ebm.ops.eval_mode import eval_mode
from pyro_ebm.ops.integration.line_integral import gradient_tells_all
from pyro_ebm.ops.leaves import leaves
from pyro_ebm.ops.score import value_and_grad


def refuse_jumping_score(
    name: str,
    log_prob: Callable[[Tensor], Tensor],
    x: Tensor,
    modules: Iterable[nn.Module] = (),
    hessian: bool = True,
) -> None:
    r"""Refuses an energy whose score jumps where its parameters should move it smoothly.

    Args:
        name: the site's name.
        log_prob: the unnormalized log density of flat points, ``(rows, d) -> (rows,)``, row by row.
        x: points, shape ``(rows, d)``.
        modules: those of the energy, looked at in evaluation mode.
        hessian: whether the objective needs the derivative of the score, or the score alone.

    Raises:
        ValueError: names the site and the ways out.
    """
    half = len(x) // 2
    x = x.detach().requires_grad_()
    y = x.detach().roll(half, 0).requires_grad_()
    d = (y - x).detach()
    d[half:] = 0  # the first half of the rows with the second: each pair once
    weight = torch.linspace(1, 2, len(x), dtype=x.dtype, device=x.device)[:half]

    def along(points: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities and ``d . s``, with a graph."""
        with eval_mode(modules):
            value, s = value_and_grad(log_prob, points, create_graph=True)
        return value, (d * s).sum(-1)

    (value_x, along_x), (value_y, along_y) = along(x), along(y)
    parameters = [leaf for leaf in leaves(value_x.sum()) if leaf is not x]
    if not parameters or not d.any():
        return
    scores = [*_gradients(along_x, parameters), *_gradients(along_y, parameters)]
    if not any(g.any() for g in scores):
        # as of E = |x - mu|, or of steps: E moves, and its slope at the points does not
        if _differ(weight * value_y[:half], weight * value_x[:half], parameters):
            raise ValueError(
                f"site {name!r}: parameters move the energy, and its score at no point of the data:"
                " it is piecewise linear in them, or a step, and score matching would never train"
                f" them. {_WAYS_OUT}, or use ContrastiveDivergence or NCE, which need no score"
            )
        return
    if not hessian:
        return
    (bend,) = (
        torch.autograd.grad(along_x.sum(), x, create_graph=True, allow_unused=True)
        if along_x.requires_grad
        else (None,)
    )
    bends = _gradients(None if bend is None else (bend * d).sum(-1), parameters)
    blind = [p for p, g in zip(parameters, bends, strict=True) if not g.any()]
    if not blind or not _differ(along_y, along_x, blind):
        return

    def value_and_slope(points: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            value = along(points)[1]
            if not value.requires_grad:
                return value, torch.zeros_like(points)
            (slope,) = torch.autograd.grad(value.sum(), points, allow_unused=True)
        return value.detach(), torch.zeros_like(points) if slope is None else slope

    if not gradient_tells_all(value_and_slope, x.detach(), y.detach()):
        raise ValueError(
            f"site {name!r}: the score of the energy jumps, and its derivative between the jumps,"
            " which is all that score matching sees, does not depend on the parameters (of shape"
            f" {', '.join(str(tuple(p.shape)) for p in blind)}): piecewise linear activations"
            f" (ReLU, abs, max) have no second derivative. {_WAYS_OUT}, or use"
            " DenoisingScoreMatching, which needs none"
        )


_WAYS_OUT = "Use smooth ones instead (SiLU, softplus, sqrt(1 + x^2), logsumexp)"


def _gradients(value: Tensor | None, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a sum, 0 where there is none."""
    if value is None or not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    grads = torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def _differ(a: Tensor, b: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether some parameter moves the sum of ``a`` otherwise than that of ``b``."""
    for one, two in zip(_gradients(a, parameters), _gradients(b, parameters), strict=True):
        if (one - two).norm() > 1e-3 * (one.norm() + two.norm()):
            return True
    return False
