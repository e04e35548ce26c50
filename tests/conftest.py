"""Fixtures shared by all tests."""

import os
import sys

# Every thread of an interpreted kernel that waits at a barrier holds one of XLA's: as many as cores may be too few.
os.environ.setdefault("PJRT_NPROC", "16")

import jax
import jaxtyping
import numpy as np
import pytest

import pallas_attn as pa


@pytest.fixture
def rng(request):
    """A generator seeded by the test's name: order and selection of tests do not matter."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture(params=["reference", "xla"])
def backend(request):
    """Every portable backend, refusals being errors."""
    with pa.strict():
        yield request.param


@pytest.fixture
def without_type_checks():
    """The suite checks annotations at run time; users do not: here the library's own checks must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_sessionstart():
    """Runtime type checks wrap functions: those that Triton compiles from their source stay as they are."""
    for finder in sys.meta_path:
        if type(finder).__name__ == "_JaxtypingFinder":
            every = finder.should_instrument
            finder.should_instrument = lambda name, every=every: ".triton_" not in name and every(name)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need one."""
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def pytest_runtest_logreport(report):
    """After an illegal address the process has no GPU any more: a worker of xdist ends, and the next one goes on."""
    if report.failed and "CUDA_ERROR" in str(report.longrepr) and "PYTEST_XDIST_WORKER" in os.environ:
        print(report.longrepr, flush=True)
        os._exit(3)
