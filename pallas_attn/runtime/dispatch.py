"""Which backend runs an op: declared support, never trial and error; no silent fallback."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from pallas_attn.core.arch import Arch, arch_of
from pallas_attn.core.errors import Unsupported, require

ANY = ("cpu", "cuda", "rocm", "tpu")


class FallbackWarning(UserWarning):
    """A slower backend runs because every faster one refused."""


class Elsewhere(str):
    """A reason for refusing what a backend was not made for: the next one does it as well, and is no fallback."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op: a module, imported at first use, with `supports(problem)` and `run(problem, *args)`.

    `supports` is pure and needs no device; it returns None or the reason for refusing, an `Elsewhere` where nothing is
    lost by it. `cost` is what a user loses when the op falls back to this backend.
    """

    name: str
    module: str
    platforms: tuple[str, ...] = ANY
    archs: tuple[Arch, ...] | None = None  # of NVIDIA GPUs; None for all
    needs: tuple[str, ...] = ()  # packages beyond the library's own, as "name==version"
    cost: str = ""

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation: how to check a call, what it returns, who can run it, and how it transforms.

    `prepare(*args, **kwargs)` -> (problem, argument pytree); `outputs(problem)` -> shapes and dtypes, flat;
    `vjp` and `batch` are "module:function" strings, so that importing an op imports no kernel; an op without a `vjp` is
    differentiated through its backend "xla"; `support_cases()` yields (dimension, name, problem) for each row of the
    support table.
    """

    name: str
    prepare: Callable[..., tuple[Any, Any]]
    outputs: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]
    backends: tuple[Backend, ...]
    vjp: str | None
    batch: str | None = None
    support_cases: Callable[[], Iterator[tuple[str, str, Any]]] = lambda: iter(())

    def backend(self, name: str) -> Backend:
        """The backend of this name."""
        names = [b.name for b in self.backends]
        require(name in names, "backend", repr(name), f"{self.name} has {', '.join(names)}")
        return self.backends[names.index(name)]


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Make the op known to `explain` and the support table."""
    OPS[op.name] = op
    return op


def resolve(path: str) -> Callable:
    """The function named "module:function"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class Policy(NamedTuple):
    """How the next ops choose: a backend by name (None: the best that supports the call), and whether to fall back."""

    backend: str | None = None
    strict: bool = False


# Part of the jit cache key: a jitted function traced under one policy is traced again under another.
_policy = jax.make_user_context(default_value=Policy())


def policy() -> Policy:
    """The policy in force."""
    return _policy.value


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside on the backend of this name where the op has it; refusals raise `Unsupported`."""
    known = {b.name for op in OPS.values() for b in op.backends}
    require(name in known, "backend", repr(name), f"choose one of {', '.join(sorted(known))}")
    with _policy(policy()._replace(backend=name)):
        yield


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Raise `Unsupported` instead of falling back to a slower backend with a warning."""
    with _policy(policy()._replace(strict=True)):
        yield


def supports(backend: Backend, problem: Any) -> str | None:
    """None, or why the backend refuses the problem."""
    return backend.load().supports(problem)


def here(backend: Backend, platform: str) -> str | None:
    """None, or why the backend cannot run on this platform, its GPU (without one in sight, any) and its packages."""
    if platform not in backend.platforms:
        return f"not on {platform}"
    arch = present_arch() if platform == "cuda" and backend.archs is not None else None
    if arch is None or backend.archs is None or arch in backend.archs:
        return missing(backend.needs)
    return f"only on {', '.join(a.name for a in backend.archs)}"


@functools.cache
def missing(needs: tuple[str, ...]) -> str | None:
    """None, or which of the packages "name==version" is not here in that version."""
    for need in needs:
        name, _, version = need.partition("==")
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed: pip install {' '.join(needs)}"
        if found != version:
            return f"{name} {found} is installed, {version} is the version tested: pip install {' '.join(needs)}"
    return None


@functools.cache
def present_arch() -> Arch | None:
    """The generation of the first GPU, None where JAX sees none."""
    try:
        return arch_of(jax.devices("gpu")[0].compute_capability)
    except RuntimeError:
        return None


def named(op: Op, problem: Any, name: str) -> str:
    """`name`, once its backend has agreed to the problem."""
    reason = supports(op.backend(name), problem)
    if reason is not None:
        raise Unsupported(f"{op.name}: backend {name!r} refuses: {reason}; leave backend=None to let another run it")
    return name


def choose(op: Op, problem: Any, platform: str, strict: bool = False) -> Backend:
    """The first backend of the platform that supports the problem; says so once when it is not the first."""
    refused = []
    for backend in op.backends:
        if platform not in backend.platforms:
            continue
        reason = supports(backend, problem)
        if isinstance(reason, Elsewhere):
            continue
        reason = here(backend, platform) or reason
        if reason is None:
            if refused:
                _fall_back(op.name, backend, tuple(refused), strict)
            return backend
        refused.append(f"{backend.name}: {reason}")
    raise Unsupported(f"{op.name}: no backend on {platform} supports this call ({'; '.join(refused) or 'none exists'})")


def _fall_back(op: str, backend: Backend, refused: tuple[str, ...], strict: bool) -> None:
    message = f"{op} runs on {backend.name!r} ({backend.cost or 'slower'}), since {'; '.join(refused)}"
    if strict:
        raise Unsupported(f"{message}; pa.strict() forbids that")
    _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=2)


def explain(op: Callable | str, *args, **kwargs) -> dict[str, str]:
    """What each backend says to this very call, without running it.

    Args:
      op: a public function such as `pa.paged_attention`, a `functools.partial` of one, or its name; then its own
        arguments (arrays or `jax.ShapeDtypeStruct`s).
    Returns: backend name -> "chosen", "supported", "not on <platform>" or the reason for refusing.
    """
    if isinstance(op, functools.partial):
        op, args, kwargs = op.func, (*op.args, *args), op.keywords | kwargs
    name = op if isinstance(op, str) else op.__name__
    require(name in OPS, "op", name, f"choose one of {', '.join(OPS)}")
    spec = OPS[name]
    wanted = kwargs.pop("backend", None) or policy().backend
    problem, _ = spec.prepare(*args, **kwargs)
    platform = canonical(jax.default_backend())
    answer = {}
    for backend in spec.backends:
        reason = here(backend, platform) or supports(backend, problem)
        first = reason is None and "chosen" not in answer.values() and wanted in (None, backend.name)
        answer[backend.name] = reason or ("chosen" if first else "supported")
    return answer


def canonical(platform: str) -> str:
    """JAX calls NVIDIA's platform "gpu" or "cuda": here it is "cuda"."""
    return "cuda" if platform == "gpu" else platform
