"""Recurrent networks step by step, in operations that ``vmap`` maps.

Relies on ``torch._decomp.decompositions``, torch's own steps of them: a whole layer does not map,
nor do the steps of oneDNN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ebm.internals.lookup import Operation, internal


def _decomposition(name: str) -> Operation:
    return internal("torch._decomp.decompositions", name, "to map recurrent networks")


_gather, _run = _decomposition("gather_params"), _decomposition("_rnn_helper")
_lstm_layer = _decomposition("one_layer_lstm")


def _lstm(
    x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, *how: object
) -> tuple[Tensor, ...]:
    weights = _gather(params, has_biases, hx[0].shape[2] != hx[1].shape[2])
    out, last = _run(x, list(zip(*hx, strict=True)), weights, has_biases, *how, _lstm_layer)
    return out, *(torch.stack(each) for each in zip(*last, strict=True))


def _stepwise(func: Operation, steps: Operation) -> Operation:
    """A network step by step; of packed sequences, as it is."""
    return lambda *args: (steps if isinstance(args[3], bool) else func)(*args)


STEPWISE: dict[Operation, Operation] = {
    torch.gru: _stepwise(torch.gru, _decomposition("gru_impl")),
    torch.lstm: _stepwise(torch.lstm, _lstm),
    torch.rnn_relu: _stepwise(torch.rnn_relu, _decomposition("rnn_relu_input")),
    torch.rnn_tanh: _stepwise(torch.rnn_tanh, _decomposition("rnn_tanh_input")),
}
"""Functions to call in place of torch's layers."""
