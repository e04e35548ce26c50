"""Fixtures shared by all tests."""

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
