"""Settings of all tests."""

import pytest
import torch as th

from tests.helpers import ALGORITHMS, Algorithm

# The tests' networks are tiny: more threads would only wait for each other
th.set_num_threads(1)


@pytest.fixture(params=ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    """Every algorithm in turn: what SB3's users rely on holds for all."""
    return request.param
