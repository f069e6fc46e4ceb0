"""The entropy from nearest neighbours against closed forms."""

from __future__ import annotations

import math

import pytest
import torch as th

from sb3_mfpo.maths.entropy import nearest_neighbour_entropy


def generator() -> th.Generator:
    return th.Generator().manual_seed(0)


@pytest.mark.parametrize("d", [1, 2, 6])
@pytest.mark.parametrize("std", [0.01, 1.0, 30.0])
def test_entropy_of_a_gaussian(d: int, std: float) -> None:
    samples = std * th.randn(2000, 16, d, generator=generator())
    exact = d * (0.5 * math.log(2 * math.pi * math.e) + math.log(std))
    # The estimate is unbiased where the density hardly changes between neighbours: the worse, the more coordinates
    assert nearest_neighbour_entropy(samples).mean().item() == pytest.approx(exact, abs=0.03 * d)


@pytest.mark.parametrize("d", [1, 2])
def test_entropy_of_several_modes(d: int) -> None:
    """Far from each other, n equal modes have log n nats more than one."""
    centres = th.randint(3, (4000, 16, 1), generator=generator()) * 100.0
    samples = centres + 0.05 * th.randn(4000, 16, d, generator=generator())
    exact = d * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.05)) + math.log(3)
    assert nearest_neighbour_entropy(samples).mean().item() == pytest.approx(exact, abs=0.1)


def test_entropy_of_a_uniform_distribution_on_an_interval() -> None:
    samples = 4 * th.rand(4000, 64, 1, generator=generator())
    assert nearest_neighbour_entropy(samples).mean().item() == pytest.approx(math.log(4), abs=0.03)


def test_two_samples_at_a_known_distance() -> None:
    """log V_1 + psi(2) - psi(1) + log distance = log 2 + 1 + log 0.5."""
    assert nearest_neighbour_entropy(th.tensor([[0.0], [0.5]])).item() == pytest.approx(1)


def test_scaling_adds_its_logarithm_per_coordinate() -> None:
    samples = th.randn(3, 8, 2, generator=generator(), dtype=th.float64)
    difference = nearest_neighbour_entropy(7 * samples) - nearest_neighbour_entropy(samples)
    assert th.allclose(difference, th.full((3,), 2 * math.log(7), dtype=th.float64))


def test_samples_that_coincide_have_a_low_entropy_but_a_finite_one() -> None:
    entropy = nearest_neighbour_entropy(th.zeros(4, 8, 2))
    assert th.isfinite(entropy).all() and (entropy < -25).all()


def test_a_single_sample_has_none() -> None:
    with pytest.raises(ValueError, match="at least two samples per row, not 1"):
        nearest_neighbour_entropy(th.zeros(4, 1, 2))
