r"""``loss(model, guide)`` as an ``nn.Module``, alone and inside ``DistributedDataParallel``.

Each of R ranks holds a shard of the data and the whole model. ``DistributedDataParallel`` (DDP)
replaces the gradient by its *mean* over the ranks, and the losses are *sums* over the data, scaled
by their plates. So every rank writes the plate that stands for all the data as if each rank held
as many as it does itself,

.. math:: N_r = R\, n_r, \qquad
          \frac1R \sum_r \frac{R\, n_r}{b_r} \sum_{i=1}^{b_r} \nabla \ell_{r i}
          = \sum_r \frac{n_r}{b_r} \sum_{i=1}^{b_r} \nabla \ell_{r i} ,

that is ``pyro.plate("data", world_size() * len(shard), subsample_size=len(batch))``: the gradient
of all the data, or an unbiased estimate of it, whether or not the shards are of one size. (Where
they are, :math:`N_r` is the number of all data.) Sites outside the plate, a global latent and its
guide, count once on each rank and so once in the mean.

What a loss reads off its own draws and acts upon is pooled over the ranks: the acceptance rate
that moves the step size of contrastive divergence, the accuracy that decides whose turn it is in
:class:`~pyro_ebm.FlowNCE`, the estimate that starts a log normalizer. Persistent chains stay with
their rank.
"""

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_ebm.distributions.core.introspection import sources
from pyro_ebm.internals.data_parallel import active_data_parallel, ignored_parameters
from pyro_ebm.losses.traces import older, parameters_in, replaced_parameters
from pyro_ebm.ops.code import outside_level
from pyro_ebm.ops.distributed import gathered
from pyro_ebm.ops.leaves import leaves


class EnergyLossModule(ELBOModule):
    r"""A loss with its model and guide: its value is the loss, its parameters are theirs.

    What ``loss(model, guide)`` returns. Modules given as ``model`` and ``guide`` are part of it;
    for functions, :meth:`initialize` takes in the networks and parameters that they use.

    Inside ``DistributedDataParallel`` the gradient is that of all ranks' data (the module's
    docstring says which plate to write). Give it ``find_unused_parameters=True`` where a step may
    leave parameters without a gradient: ``FlowNCE`` whose players take turns, score matching of a
    network with a last bias.

    Example:
        >>> from pyro_ebm import ScoreMatching
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", UnnormalizedEnergy(lambda x: precision * x**2 / 2), obs=x)
        >>> x = 0.5 * torch.randn(1000)
        >>> module = ScoreMatching()(model, lambda x: None).initialize(x)
        >>> optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     module(x).backward()
        ...     optimizer.step()
        >>> bool((pyro.param("precision") * x.square().mean() - 1).abs() < 0.01)
        True
    """

    elbo: Any

    def __init__(self, model: Any, guide: Any, elbo: Any):
        super().__init__(model, guide, elbo)
        self.networks = nn.ModuleDict()
        self.params = nn.ParameterDict()
        self._streams_checked = False
        self._held: tuple[int, dict[int, str]] = (0, {})

    def initialize(self, *args: object, **kwargs: object) -> Self:
        """Takes in what the model and the guide use: networks, and parameters of ``pyro.param``.

        Runs both once, without a gradient, so that the parameters are made; those of ``pyro.param``
        become ``nn.Parameter`` in Pyro's store too. Afterwards :meth:`parameters` and
        :meth:`state_dict` hold them all.

        Args:
            *args: what the model and the guide are called with.
            **kwargs: likewise.

        Returns:
            The module itself.
        """
        store = pyro.get_param_store()
        before = set(store)
        with torch.no_grad(), poutine.trace(param_only=True) as capture:
            guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            poutine.replay(self.model, trace=guide_trace)(*args, **kwargs)
        params = parameters_in(capture.trace)
        held = {id(p) for p in self.parameters()}
        replaced = replaced_parameters(capture.trace)
        of_networks = {name: p for name, p in params.items() if "$$$" in name}
        registered = {id(p): name.partition("$$$")[0] for name, p in of_networks.items()}
        for network in networks_of(self.model, self.guide):
            own = [p for p in network.parameters() if id(p) not in held]
            if own:
                names = [registered[id(p)] for p in own if id(p) in registered]
                self.networks[_free(names[0] if names else "network", self.networks)] = network
                held.update(map(id, own))
        outdated = dict.fromkeys(name for i, name in replaced.items() if i in held)
        if outdated:
            kept = [name for name in params if name in before and "$$$" not in name]
            kept = [name for name in kept if name not in outdated]
            others = f"; {kept} start where they were left" if kept else ""
            warnings.warn(
                f"{older(*outdated)}. The new one is trained, the store keeps the old one{others}",
                stacklevel=outside_level(),
            )
        for name, parameter in params.items():
            if id(parameter) not in held and name.partition("$$$")[0] not in outdated:
                if not isinstance(parameter, nn.Parameter):
                    parameter = nn.Parameter(parameter.detach())
                    # an existing name: the store changes the tensor and keeps the constraint
                    store.set_state({"params": {name: parameter}, "constraints": {}})
                self.params[_free(name, self.params)] = parameter
                held.add(id(parameter))
        return self

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """The loss, a scalar whose gradient is the method's."""
        ranks = active_data_parallel()
        if ranks is None or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        before = b"" if self._streams_checked else _random_state()
        self.elbo.group = ranks.process_group
        try:
            loss = super().forward(*args, **kwargs)
        finally:
            self.elbo.group = None
        if not self._streams_checked:
            self._check_streams(before, loss, ranks)
            self._streams_checked = True
        self._check_parameters(loss, ranks)
        return loss

    def extra_repr(self) -> str:
        """The loss, and the names of functions that are model and guide."""
        functions = {"model": self.model, "guide": self.guide}
        named = [
            f"{role}={getattr(function, '__name__', type(function).__name__)}"
            for role, function in functions.items()
            if not isinstance(function, nn.Module)
        ]
        return ", ".join([repr(self.elbo), *named])

    def _check_parameters(self, loss: Tensor, ranks: DistributedDataParallel) -> None:
        """Raises a ValueError unless the ranks average the gradients that the loss has."""
        if self._held[0] != id(ranks):
            ignored = ignored_parameters(ranks)
            named = ranks.module.named_parameters()
            averaged = {id(p): n for n, p in named if p.requires_grad and n not in ignored}
            self._held = id(ranks), averaged
        held = self._held[1]
        points = {id(x) for x in self.elbo.inputs}
        used = set()
        for leaf in leaves(loss):
            used.add(id(leaf))
            if id(leaf) not in held and id(leaf) not in points:
                name = pyro.get_param_store().param_name(leaf)
                called = f" ({name!r})" if name else ""
                raise ValueError(
                    f"a parameter of shape {tuple(leaf.shape)}{called} takes part in the loss, but"
                    " DistributedDataParallel does not hold it, and each rank would train its own:"
                    " wrap loss(model, guide).initialize(*args), which takes in what pyro.param and"
                    " pyro.module make, or make it a part of a model that is an nn.Module"
                )
        if not (ranks.find_unused_parameters or ranks.static_graph):
            unused = [name for i, name in held.items() if i not in used]
            if unused:
                raise ValueError(
                    f"{type(self.elbo).__name__} gives no gradient to {unused} at this step, for"
                    " which DistributedDataParallel would wait: write"
                    " DistributedDataParallel(module, find_unused_parameters=True)"
                )

    def _check_streams(self, before: bytes, loss: Tensor, ranks: DistributedDataParallel) -> None:
        """Warns if the ranks draw the same random numbers."""
        after = _random_state()
        digest = int.from_bytes(hashlib.sha256(after).digest()[:4], "big")
        words = torch.tensor([digest, int(after != before)], device=loss.device)
        streams = [tuple(pair) for pair in gathered(words, ranks.process_group).tolist()]
        twins = [r for r, stream in enumerate(streams) if stream[1] and streams.count(stream) > 1]
        if twins:
            warnings.warn(
                f"ranks {twins} draw the same random numbers, so that their noise and chains are"
                " copies of each other: after the networks are made, call"
                " pyro.set_rng_seed(rank_seed(0)), from pyro_ebm.ops.distributed",
                stacklevel=2,
            )


def networks_of(*functions: object) -> list[nn.Module]:
    """The networks with parameters or buffers that functions hold, none inside another.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> networks_of(lambda x: net(x))
        [Linear(in_features=1, out_features=1, bias=True)]
    """
    found = {id(m): m for f in functions for m in _held_by(f) if m.state_dict()}
    inside = {id(m) for top in found.values() for m in top.modules() if m is not top}
    return [m for i, m in found.items() if i not in inside]


def _held_by(function: object) -> Iterator[nn.Module]:
    parts = [function, *vars(getattr(function, "__self__", object)).values()]
    for part in parts if hasattr(function, "__self__") else [function]:
        yield from (m for m in sources(part) if isinstance(m, nn.Module))


def _free(name: str, taken: nn.ModuleDict | nn.ParameterDict) -> str:
    """The name as a key of a module, numbered if it is taken."""
    name = name.replace("$$$", "_").replace(".", "_")
    numbers = (f"{name}_{k}" if k else name for k in range(len(taken) + 1))
    return next(key for key in numbers if not hasattr(taken, key))


def _random_state() -> bytes:
    """Where the generators that draw are: the CPU's, and that of the current CUDA device."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return b"".join(state.numpy().tobytes() for state in states)
