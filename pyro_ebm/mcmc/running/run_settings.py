"""The settings, sites and data of a run as text, by which two runs are compared.

Numbers, strings and tensors are compared by value, and so are modules, by their parameters.
Functions are compared by their names, other objects by their type: two models are distinguished by
their potentials, see :meth:`~pyro_ebm.mcmc.running.chains.VectorizedRun.load_state_dict`.
"""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.mcmc.potentials.base import Potential
from pyro_ebm.ops.settings import HasSettings

RunSettings = dict[str, str]

# Settings of a kernel on which the draws do not depend, or that show in the potential.
NOT_COMPARED = {"model", "potential_fn", "transforms", "init_strategy", "ignore_jit_warnings"}


def fingerprint(value: object, name: str) -> RunSettings:
    """The parts of a value, each with its name and a description.

    Example:
        >>> fingerprint({"a": [1, True], "b": torch.zeros(2)}, "x")
        {"x['a'][0]": '1', "x['a'][1]": 'True', "x['b']": 'tensor (2,) float32 af5570f5'}
    """
    return dict(_described(value, name))


def _described(value: object, name: str) -> Iterator[tuple[str, str]]:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield name, _short(repr(value))
    elif isinstance(value, Tensor):
        yield name, f"tensor {_tensor(value.detach().cpu())}"
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield name, f"array {value.shape} {value.dtype} {_hash(value.tobytes())}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _described(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _described(item, f"{name}[{i}]")
    elif isinstance(value, HasSettings):
        yield name, type(value).__qualname__
        for key, item in value.settings.items():
            if key not in NOT_COMPARED:
                yield from _described(item, f"{name}.{key}")
    elif isinstance(value, nn.Module):
        yield name, type(value).__qualname__
        for key, item in value.state_dict().items():
            yield from _described(item, f"{name}.{key}")
    elif isinstance(value, Distribution):
        shapes = (tuple(value.batch_shape), tuple(value.event_shape))
        yield name, f"{type(value).__qualname__} {shapes}"
        parts = {key: getattr(value, key, None) for key in value.arg_constraints}
        parts = {k: x for k, x in {**vars(value), **parts}.items() if _defines(x, k in parts)}
        for key, item in parts.items():
            yield from _described(item, f"{name}.{key}")
    else:
        yield name, getattr(value, "__qualname__", type(value).__qualname__)


def _defines(part: object, is_parameter: bool) -> bool:
    """Whether a part of a distribution defines it, and is not a value that it caches."""
    return isinstance(part, Tensor) if is_parameter else isinstance(part, Distribution | nn.Module)


def _tensor(x: Tensor) -> str:
    dense = x.to_dense() if x.is_sparse else x
    data = dense.contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {_hash(data.data)}"


def _hash(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:30]}... {_hash(text.encode())}"


def of_sites(potential: Potential) -> RunSettings:
    """The shapes and dtypes of a potential's sites, and the dtype and device of positions."""
    found = {
        f"site {site.name!r}": f"{tuple(site.shape)} {str(site.dtype).removeprefix('torch.')}"
        for site in potential.sites
    }
    device, dtype = potential.device.type, str(potential.dtype).removeprefix("torch.")
    return {**found, "positions": f"{dtype} on {device}"}


def differences(now: RunSettings, then: RunSettings) -> list[str]:
    """The differences of two runs in words.

    Example:
        >>> differences({"thinning": "2", "x": "1"}, {"thinning": "1", "x": "1"})
        ['thinning is 2, and was 1']
    """
    found = []
    for name in {**then, **now}:
        here, there = now.get(name, "not there"), then.get(name, "not there")
        if here != there:
            found.append(f"{name} is {here}, and was {there}")
    return found


def machine() -> RunSettings:
    """The properties of this machine on which rounding may depend."""
    return {
        "torch": str(torch.__version__),
        "the number of threads": str(torch.get_num_threads()),
        "the processor": torch.backends.cpu.get_cpu_capability(),
    }
