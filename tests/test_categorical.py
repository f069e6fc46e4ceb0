"""Categorical value distributions: conservation laws and hand-computed numbers."""

import math

import pytest
import torch as th

from sb3_mfpo.maths import categorical

ATOMS = th.linspace(-10, 10, 21)


def random_probs(*shape: int) -> th.Tensor:
    return th.randn(*shape, 21, generator=th.Generator().manual_seed(0)).softmax(-1)


def test_projection_keeps_mass_and_mean_inside_the_support() -> None:
    probs = random_probs(50)
    positions = categorical.bellman_atoms(th.linspace(-1, 1, 50).unsqueeze(1), 0.9, th.zeros(50, 1), ATOMS)
    assert positions.abs().max() <= 10
    projected = categorical.project(probs, positions, ATOMS)
    assert th.allclose(projected.sum(-1), th.ones(50), atol=1e-6)
    assert (projected >= 0).all()
    assert th.allclose(categorical.expected_value(projected, ATOMS), (probs * positions).sum(-1), atol=1e-5)


def test_projection_clips_to_the_ends_and_keeps_mass() -> None:
    probs = random_probs(4)
    positions = ATOMS + th.tensor([[100.0], [-100.0], [5.0], [-1e30]])
    projected = categorical.project(probs, positions, ATOMS)
    assert th.allclose(projected.sum(-1), th.ones(4), atol=1e-6)
    assert projected[0, -1] == pytest.approx(1.0, abs=1e-6)
    assert projected[1, 0] == pytest.approx(1.0, abs=1e-6)
    assert projected[3, 0] == pytest.approx(1.0, abs=1e-6)
    # Shifted by 5 atoms: six atoms' mass meets at the top
    assert projected[2, -1] == pytest.approx(probs[2, -6:].sum().item(), abs=1e-6)
    assert th.allclose(projected[2, 5:-1], probs[2, :-6], atol=1e-6)


def test_projection_splits_linearly_and_keeps_exact_hits() -> None:
    atoms = th.tensor([0.0, 1.0, 2.0])
    probs = th.tensor([[0.2, 0.3, 0.5]])
    assert th.allclose(categorical.project(probs, atoms, atoms), probs)
    assert th.allclose(
        categorical.project(probs, th.tensor([0.25, 1.0, 1.5]), atoms), th.tensor([[0.15, 0.05 + 0.3 + 0.25, 0.25]])
    )


def test_clipped_mass_is_what_lies_outside() -> None:
    atoms = th.tensor([0.0, 1.0, 2.0])
    probs = th.tensor([[0.2, 0.3, 0.5]])
    assert categorical.clipped_mass(probs, atoms + 0.5, atoms).item() == pytest.approx(0.5)
    assert categorical.clipped_mass(probs, atoms - 1.5, atoms).item() == pytest.approx(0.5)
    assert categorical.clipped_mass(probs, atoms, atoms).item() == 0


@pytest.mark.parametrize(
    ("low", "high", "mean", "square"),
    # In atoms from the one next to 0: sums of k and k^2 times exp(-k^2 / 2) by hand, one-sided beyond the support
    [(-10, 10, 0, 1), (-20, 40, 0, 1), (5, 9, 0.5202, 0.7148), (-9, -5, -0.5202, 0.7148)],
)
def test_the_narrow_start_has_the_mean_and_width_that_it_should(low: float, high: float, mean: float, square: float) -> None:
    atoms = th.linspace(low, high, 101)
    logits = categorical.narrow_logits(atoms)
    probs = logits.softmax(-1)
    centre, width = min(max(0, low), high), (high - low) / 100
    # A thousandth is uniform: its mean and mean square come on top
    distances = (atoms - centre) / width
    expected = 0.999 * mean + 0.001 * distances.mean().item(), 0.999 * square + 0.001 * distances.square().mean().item()
    assert (probs * distances).sum().item() == pytest.approx(expected[0], abs=0.001)
    assert (probs * distances.square()).sum().item() == pytest.approx(expected[1], rel=0.01)
    # Within reach of some hundred steps of Adam
    assert logits.max() - logits.min() < 11.5


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.1, 1.9, 3.0])
@pytest.mark.parametrize("mean", [-4.0, 0.3, 5.0])
def test_a_distribution_stays_where_it_is_when_its_support_is_stretched(mean: float, factor: float) -> None:
    """A normal distribution wider than a step of the support: mean and deviation, and one linear map for all logits."""
    atoms = th.linspace(-20, 20, 101, dtype=th.float64)
    logits = -0.5 * ((atoms - mean) / 1.5).square()
    stretched = categorical.stretch_support(logits, factor)
    probs = stretched.softmax(0)
    assert (probs * factor * atoms).sum().item() == pytest.approx(mean, abs=0.05)
    assert (probs * (factor * atoms - mean).square()).sum().sqrt().item() == pytest.approx(1.5, rel=0.1)
    weight, hidden = th.randn(101, 7, dtype=th.float64), th.randn(7, dtype=th.float64)
    assert th.allclose(
        categorical.stretch_support(weight, factor) @ hidden, categorical.stretch_support(weight @ hidden, factor)
    )
    if factor == 1:
        assert th.equal(stretched, logits)


def test_backups_narrow_a_wide_distribution_by_the_discount() -> None:
    """Every backup multiplies the width by gamma, which is why a uniform start takes long."""
    atoms = th.linspace(-1600, 1600, 101)
    probs = th.full((1, 101), 1 / 101)
    for _ in range(70):
        positions = categorical.bellman_atoms(th.zeros(1, 1), 0.99, th.zeros(1, 1), atoms)
        probs = categorical.project(probs, positions, atoms)
    width = (probs * atoms.square()).sum().sqrt().item()
    assert width == pytest.approx(0.99**70 * (atoms.square().mean()).sqrt().item(), rel=0.02)


def test_backup_of_a_terminal_state_is_the_reward() -> None:
    positions = categorical.bellman_atoms(th.tensor([[3.0]]), th.zeros(1, 1), th.tensor([[7.0]]), ATOMS)
    assert (positions == 3).all()


def test_entropy_bonus_is_discounted_with_the_next_value() -> None:
    positions = categorical.bellman_atoms(th.tensor([[1.0]]), 0.5, th.tensor([[2.0]]), th.tensor([0.0, 4.0]))
    assert positions.tolist() == [[2.0, 4.0]]


def test_min_takes_the_whole_distribution_of_the_lower_mean_row_by_row() -> None:
    probs = random_probs(3, 40)
    means = categorical.expected_value(probs, ATOMS)
    reduced = categorical.reduce_distributions(probs, ATOMS, "min")
    assert th.equal(categorical.expected_value(reduced, ATOMS), means.amin(0))
    for row in range(40):
        assert th.equal(reduced[row], probs[means[:, row].argmin(), row])


def test_mean_takes_the_mixture_of_the_distributions() -> None:
    probs = random_probs(2, 5)
    assert th.allclose(categorical.reduce_distributions(probs, ATOMS, "mean"), (probs[0] + probs[1]) / 2)
    values = th.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert categorical.reduce_values(values, "mean").tolist() == [2.0, 3.5]
    assert categorical.reduce_values(values, "min").tolist() == [1.0, 2.0]


def test_cross_entropy_of_a_uniform_prediction() -> None:
    loss = categorical.cross_entropy(th.zeros(2, 5, 21), random_probs(5))
    assert loss.shape == (2,)
    assert loss.tolist() == pytest.approx([math.log(21)] * 2, rel=1e-6)
