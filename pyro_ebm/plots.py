r"""Pictures of densities, samples and trainings, by matplotlib.

Each function draws on the axes that it is given, else on new ones, and returns them: titles, limits
and saving are matplotlib's, ``plot_density(p).figure.savefig("p.png")``. Matplotlib is imported at
the first call, and comes with ``pip install 'pyro-ebm[plots]'``. A grid lies on torch's default
device: a network elsewhere is drawn within ``with torch.device("cuda"):``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.distributions.energy import UnnormalizedEnergy
from pyro_ebm.ops.arguments import check_callable, check_count, shown
from pyro_ebm.ops.eval_mode import called_in_eval_mode

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Extent = tuple[float, float, float, float]
"""The edges of a picture as matplotlib has them: left, right, bottom, top."""

EXTENT = (-4.5, 4.5, -4.5, 4.5)


class WithHistory(Protocol):
    """What has a history, as :class:`~pyro_ebm.losses.FitResult`."""

    history: dict[str, np.ndarray]


def grid(extent: Extent = EXTENT, num_points: int = 200) -> tuple[Tensor, float]:
    """Midpoints of the cells of a grid on the plane, as a picture has them.

    Args:
        extent: the edges, left, right, bottom and top.
        num_points: how many on a side.

    Returns:
        Points, shape ``(num_points, num_points, 2)``, whose first index goes up and whose second
        goes right; and the area of a cell.

    Raises:
        ValueError: for edges out of order.

    Example:
        >>> x, cell = grid((0, 2, 0, 1), num_points=2)
        >>> x.tolist(), cell
        ([[[0.5, 0.25], [1.5, 0.25]], [[0.5, 0.75], [1.5, 0.75]]], 0.5)
    """
    n = check_count("num_points", num_points)
    left, right, bottom, top = extent
    if not (left < right and bottom < top):
        raise ValueError(f"extent must be (left, right, bottom, top), got {shown(extent)}")
    width, height = (right - left) / n, (top - bottom) / n
    steps = torch.arange(n) + 0.5
    x, y = torch.meshgrid(left + width * steps, bottom + height * steps, indexing="xy")
    return torch.stack([x, y], -1), width * height


def plot_density(
    p: Distribution | Callable[[Tensor], Tensor],
    ax: "Axes | None" = None,
    extent: Extent = EXTENT,
    num_points: int = 200,
    **kwargs: Any,
) -> "Axes":
    r"""The density of a distribution or an energy on the plane.

    Args:
        p: a distribution over points of the plane, whose ``log_prob`` is drawn. An
            :class:`~pyro_ebm.UnnormalizedEnergy`, whether or not its log Z is known, and a function
            :math:`E(x)`, ``(*batch, 2) -> (*batch)``, are normalized by their sum over the grid,
            which should hold their mass.
        ax: axes to draw on; by default new ones.
        extent: left, right, bottom and top.
        num_points: of the grid, on a side.
        **kwargs: of matplotlib's ``imshow``, such as ``vmax``, to compare densities.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a distribution of other points, a batch of distributions, or a density that
            is NaN.

    Example:
        >>> from pyro_ebm.datasets import TwoMoons
        >>> ax = plot_density(TwoMoons())
        >>> ax = plot_density(lambda x: x.square().sum(-1) / 2, ax)
    """
    density = _density(p, extent, num_points)
    ax = _axes(ax)
    settings = {"cmap": "viridis", "vmin": 0.0, "interpolation": "bilinear", **kwargs}
    ax.imshow(density.numpy(), origin="lower", extent=extent, **settings)
    return ax


def _density(
    p: Distribution | Callable[[Tensor], Tensor], extent: Extent, num_points: int
) -> Tensor:
    """The density on the grid, shape ``(num_points, num_points)``."""
    if not isinstance(p, Distribution):
        check_callable("p", p, "a distribution or an energy")
    elif p.event_shape != (2,) or p.batch_shape:
        raise ValueError(
            f"p must be one distribution of points (2,), got batch_shape {tuple(p.batch_shape)}"
            f" and event_shape {tuple(p.event_shape)}"
        )
    x, cell = grid(extent, num_points)
    x = x.flatten(0, 1)
    with torch.no_grad(), called_in_eval_mode():
        if isinstance(p, UnnormalizedEnergy):
            values = p.unnormalized_log_prob(x)
        else:
            values = p.log_prob(x) if isinstance(p, Distribution) else -p(x)
    if values.shape != (num_points**2,):
        raise ValueError(
            f"p must give one number for each point, (n, 2) -> (n,), got the shape"
            f" {tuple(values.shape)} for {num_points**2} points"
        )
    if values.isnan().any():
        raise ValueError("the density is NaN at some points of the grid: give another extent")
    if isinstance(p, UnnormalizedEnergy) or not isinstance(p, Distribution):
        values = values - (values.logsumexp(0) + math.log(cell))
    return values.exp().reshape(num_points, num_points).cpu()


def plot_samples(
    x: Tensor | np.ndarray,
    p: Distribution | Callable[[Tensor], Tensor] | None = None,
    ax: "Axes | None" = None,
    extent: Extent | None = None,
    **kwargs: Any,
) -> "Axes":
    """Points of the plane, and a density behind them.

    Args:
        x: points, shape ``(*sample, 2)``.
        p: a density, as in :func:`plot_density`.
        ax: axes to draw on; by default new ones.
        extent: left, right, bottom and top; by default that of :func:`plot_density` with a density,
            and as the points lie without.
        **kwargs: of matplotlib's ``plot``, such as ``color``.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: for points that are not of the plane.

    Example:
        >>> from pyro_ebm.datasets import TwoMoons, two_moons
        >>> ax = plot_samples(two_moons(500), TwoMoons())
    """
    points = torch.as_tensor(x).detach().cpu()
    if points.dim() < 1 or points.shape[-1] != 2:
        raise ValueError(f"x must be points (*sample, 2), got the shape {tuple(points.shape)}")
    ax = _axes(ax)
    if p is not None:
        plot_density(p, ax, extent or EXTENT)
    color = "black" if p is None else "red"
    settings = {"marker": ".", "ms": 3, "mew": 0, "color": color, "alpha": 0.6, **kwargs}
    ax.plot(*points.reshape(-1, 2).T.numpy(), linestyle="none", **settings)
    ax.set_aspect("equal")
    if extent is not None or p is not None:
        left, right, bottom, top = extent or EXTENT
        ax.set(xlim=(left, right), ylim=(bottom, top))
    return ax


def plot_images(
    images: Tensor | np.ndarray, ax: "Axes | None" = None, num_columns: int = 10, **kwargs: Any
) -> "Axes":
    """Images in rows, on one scale of grey.

    Args:
        images: shape ``(n, height, width)``, ``(n, 1, height, width)``, or of three colours
            ``(n, 3, height, width)``.
        ax: axes to draw on; by default new ones.
        num_columns: images in a row.
        **kwargs: of matplotlib's ``imshow``, such as ``cmap``, ``vmin`` and ``vmax``.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: for other shapes, or no image.

    Example:
        >>> from pyro_ebm.datasets import ising
        >>> ax = plot_images(ising(6), num_columns=3)
    """
    x = torch.as_tensor(images).detach().cpu()
    x = x[:, None] if x.dim() == 3 else x
    if x.dim() != 4 or x.shape[1] not in (1, 3) or not x.numel():
        raise ValueError(
            "images must have the shape (n, height, width), (n, 1, height, width) or"
            f" (n, 3, height, width), got {tuple(torch.as_tensor(images).shape)}"
        )
    n, channels, height, width = x.shape
    columns = min(check_count("num_columns", num_columns), n)
    rows = math.ceil(n / columns)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # NaN is drawn as nothing, so that the colour of the axes parts the images
    sheet = x.new_full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), math.nan)
    for i, image in enumerate(x.movedim(1, -1)):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = image
    if channels == 3:  # with a fourth channel, the opacity
        sheet = torch.cat([sheet.nan_to_num(0.0), sheet[..., :1].isfinite().to(sheet)], -1)
    ax = _axes(ax, (0.6 * columns, 0.6 * rows * height / width))
    ax.imshow(sheet.squeeze(-1).numpy(), **{"cmap": "gray", "interpolation": "nearest", **kwargs})
    ax.set(xticks=[], yticks=[], facecolor="0.75")
    ax.spines[:].set_visible(False)
    return ax


def plot_history(
    history: Mapping[str, np.ndarray] | WithHistory,
    names: Sequence[str] | None = None,
    ax: "Axes | np.ndarray | None" = None,
) -> np.ndarray:
    """The loss and the diagnostics of a training, a panel for each.

    A line is the mean of about a fiftieth of the training; behind it is each step.

    Args:
        history: what :func:`~pyro_ebm.fit` returns, or its ``history``.
        names: what to draw, in this order; by default all there is.
        ax: an array of as many axes, or one for one name; by default new ones.

    Returns:
        The axes, an array of shape ``(len(names),)``.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a name that is not in the history, or another number of axes.

    Example:
        >>> axes = plot_history({"loss": np.linspace(1, 0, 100), "lr": np.ones(100)})
        >>> [ax.get_title() for ax in axes]
        ['loss', 'lr']
    """
    columns = history if isinstance(history, Mapping) else history.history
    if names is None:
        names = [name for name in columns if name != "metric_step"]
    unknown = [name for name in names if name not in columns]
    if unknown or not names:
        raise ValueError(f"names must be of {list(columns)}, got {unknown}")
    axes = np.asarray(_panels(len(names)) if ax is None else ax, dtype=object).ravel()
    if len(axes) != len(names):
        raise ValueError(f"there are {len(names)} names for {len(axes)} axes: give as many")
    for panel, name in zip(axes, names):
        values = np.asarray(columns[name], dtype=float)
        steps = np.arange(1, len(values) + 1)
        if name == "metric" and "metric_step" in columns:
            steps = np.asarray(columns["metric_step"])
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
        window = max(len(values) // 50, 1)
        if window > 1:
            panel.plot(steps, values, color="C0", lw=0.5, alpha=0.3)
        sums = np.convolve(values, np.ones(window), "valid") if len(values) else values
        middle = slice((window - 1) // 2, (window - 1) // 2 + len(sums))
        panel.plot(steps[middle], sums / window, color="C0", marker="." if len(values) < 30 else "")
        panel.set(title=name, xlabel="step")
        panel.spines[["top", "right"]].set_visible(False)
    return axes


def _axes(ax: "Axes | None", size: tuple[float, float] = (4.0, 4.0)) -> "Axes":
    """These axes, or new ones."""
    return _pyplot().subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _panels(n: int) -> np.ndarray:
    """New axes, shape ``(n,)``, four in a row."""
    columns, rows = min(n, 4), math.ceil(n / 4)
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(3 * columns, 2.3 * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[n:]:
        figure.delaxes(ax)
    return axes.flat[:n]


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plots need the package matplotlib: pip install 'pyro-ebm[plots]'"
        ) from error
    return plt


__all__ = ["grid", "plot_density", "plot_history", "plot_images", "plot_samples"]
