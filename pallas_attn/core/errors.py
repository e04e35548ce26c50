"""What the library raises: each message says what is wrong, where, and what to do about it."""

import jax
import numpy as np
from jax.core import Tracer


class InvalidInput(ValueError):
    """An argument breaks the contract of the function; raised while tracing, before any kernel runs."""


class Unsupported(NotImplementedError):
    """The chosen backend cannot do what was asked, although the request itself is valid."""


def require(ok: bool, argument: str, value: object, fix: str) -> None:
    """Raise `InvalidInput` naming the argument, the value found and the fix, unless `ok`."""
    if not ok:
        raise InvalidInput(f"{argument}: got {value}; {fix}")


def is_concrete(x) -> bool:
    """Whether the value can be looked at while tracing."""
    return isinstance(x, bool | int | float | np.ndarray | np.generic) or (
        isinstance(x, jax.Array) and not isinstance(x, Tracer)
    )
