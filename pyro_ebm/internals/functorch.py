"""Tensors inside the transforms of ``torch.func``: ``vmap``, ``grad``.

Relies on ``is_functorch_wrapped_tensor``, which is true of tensors that stand for many; on
``_are_functorch_transforms_active``; on the getter of ``Tensor.data``, which a function mode gets
in place of a name; and on the key of a tensor's memory.
"""

from torch import Tensor

from pyro_ebm.internals.lookup import internal

_is_wrapped = internal(
    "torch._C._functorch", "is_functorch_wrapped_tensor", "to see which tensors vmap maps"
)
_are_active = internal(
    "torch._C", "_are_functorch_transforms_active", "to see whether a function is being mapped"
)
GET_DATA: object = internal("torch._C", "TensorBase.data.__get__", "to map reads of x.data")
"""What a function mode is given where ``x.data`` is read."""


def is_wrapped(x: Tensor) -> bool:
    """Whether a tensor stands for many, within ``vmap``, or is differentiated, within ``grad``.

    Example:
        >>> seen = []
        >>> _ = torch.vmap(lambda x: seen.append(is_wrapped(x)) or x)(torch.ones(2))
        >>> seen, is_wrapped(torch.ones(2))
        ([True], False)
    """
    return _is_wrapped(x)


def in_transform() -> bool:
    """Whether this code runs within a transform of ``torch.func``."""
    return _are_active()


def memory_key(x: Tensor) -> int:
    """A number that tensors share if they are views of the same memory."""
    return x.untyped_storage()._cdata
