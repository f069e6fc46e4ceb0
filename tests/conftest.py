"""Settings of all tests."""

import pytest
import torch as th

from tests.helpers import ALGORITHMS, Algorithm

# The tests' networks are tiny: more threads would only wait for each other
th.set_num_threads(1)

# These take minutes: `make quick` leaves them out. They come first, so that no core waits for another one's last file.
LONG = (
    "test_zoo",
    "test_examples",
    "test_benchmarks",
    "test_gpu",
    "test_acceleration",
    "test_exact_resume",
    "test_learning",
    "test_peers",
    "test_checkpoint",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.path.stem in LONG:
            item.add_marker("long")
        if item.get_closest_marker("cuda") and not th.cuda.is_available():
            item.add_marker(pytest.mark.skip("needs a CUDA device"))


@pytest.fixture(params=ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    """Every algorithm in turn: what SB3's users rely on holds for all."""
    return request.param
