"""The leaves of an autograd graph."""

from collections.abc import Iterator

from torch import Tensor


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that a tensor was computed from and that require gradients.

    Example:
        >>> w = torch.ones((), requires_grad=True)
        >>> [leaf is w for leaf in leaves(2 * w.exp())]
        [True]
    """
    if tensor.is_leaf and tensor.requires_grad:
        yield tensor
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the nodes that accumulate gradients
        if variable is not None:
            yield variable
        stack.extend(parent for parent, _ in node.next_functions)
