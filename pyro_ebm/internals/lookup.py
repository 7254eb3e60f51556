"""Internals of torch and Pyro by name, with an error that names what a version lacks."""

import importlib
from collections.abc import Callable
from typing import Any

Operation = Callable[..., Any]
"""A function of torch's, of any signature."""
Args = tuple[Any, ...]
Kwargs = dict[str, Any] | None
"""What a mode sees an operation called with."""


def internal(module: str, name: str, purpose: str) -> Any:
    """An object that a module of torch or Pyro holds, though it does not promise to.

    Args:
        module: the module's dotted name.
        name: the object's dotted name in there.
        purpose: what the package uses it for, as a verb: "to compile a graph".

    Raises:
        ImportError: if there is no such module or object; it names the library and its version.

    Example:
        >>> internal("torch.fx.experimental.proxy_tensor", "get_proxy_mode", "to see a capture")()
        >>> internal("torch", "_gone", "to fly")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ImportError: torch ... has no torch._gone, which pyro_ebm uses to fly: ...
    """
    library = importlib.import_module(module.partition(".")[0])
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{library.__name__} {library.__version__} has no {module}.{name}, which pyro_ebm uses"
            f" {purpose}: install a version that pyro_ebm was tested with (its pyproject.toml)"
        ) from error
    return found
