"""Importance sampling: the truncated proposal against scipy, SNIS against closed forms."""

import numpy as np
import pytest
import torch as th
from scipy import stats

from sb3_mfpo.maths import boltzmann, paths
from sb3_mfpo.maths.paths import linear_path


@pytest.mark.parametrize("width", [1e-3, 0.03, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("centre", [-6.0, -3.0, -0.5, 0.0, 1.0, 4.0, 6.0])
def test_truncated_normal_matches_scipy(width: float, centre: float) -> None:
    n = 20_000
    uniform = th.rand(n, generator=th.Generator().manual_seed(0))
    lower, upper = th.tensor(centre - width / 2), th.tensor(centre + width / 2)
    draws = boltzmann.truncated_normal(uniform, lower, upper)
    assert (draws >= lower).all() and (draws <= upper).all()
    # In double precision: at a width of 1e-3 around 6, float32 itself has only about 2 000 values
    exact = boltzmann.truncated_normal(uniform, lower.double(), upper.double())
    assert th.equal(exact.float().clamp(lower, upper), draws)
    distribution = stats.truncnorm(lower.item(), upper.item())
    # 35 combinations: a true null falls below 1e-4 in one run of 300
    assert stats.kstest(exact.numpy(), distribution.cdf).pvalue > 1e-4


def test_quantiles_of_the_truncated_normal_are_exact_in_both_tails() -> None:
    """Quantiles, also far in the tails, on either side."""
    uniform = th.linspace(0.001, 0.999, 99, dtype=th.float64)
    for low, high in ((-1.0, 2.0), (5.0, 9.0), (-9.0, -5.0), (8.0, 30.0), (-1000.0, 3.0), (-2.0, 998.0), (20.0, 20.5)):
        draws = boltzmann.truncated_normal(uniform, th.tensor(low).double(), th.tensor(high).double())
        assert np.allclose(draws, stats.truncnorm(low, high).ppf(uniform), rtol=1e-6, atol=1e-9)


def test_extreme_uniform_numbers_stay_finite_and_within_the_bounds() -> None:
    uniform = th.tensor([0.0, 1.0 - 2.0**-24, 1.0])
    for low, high in ((-1000.0, 3.0), (-3.0, 1000.0), (-1000.0, 1000.0), (50.0, 60.0), (-60.0, -50.0)):
        draws = boltzmann.truncated_normal(uniform, th.tensor(low), th.tensor(high))
        assert th.isfinite(draws).all()
        assert (draws >= low).all() and (draws <= high).all()


def test_proposal_stays_in_the_box_without_nan_in_ten_million_draws() -> None:
    generator = th.Generator().manual_seed(0)
    n, k, d = 50_000, 8, 5
    for _ in range(5):
        t = 1e-3 + (1 - 2e-3) * th.rand(n, 1, generator=generator)
        t[:1000], t[1000:2000] = 1e-3, 1 - 1e-3
        actions = 2 * th.rand(n, d, generator=generator) - 1
        noisy = (1 - t) * actions + t * th.randn(n, d, generator=generator)
        samples = boltzmann.gaussian_proposal(noisy, *linear_path(t), th.rand(n, k, d, generator=generator))
        assert samples.shape == (n, k, d)
        assert samples.abs().max() <= 1  # false for NaN


def test_proposal_centres_on_the_posterior() -> None:
    """Far from the walls the proposal is N(a_t / (1 - t), (t / (1 - t))^2)."""
    t, noisy = th.tensor([[0.05]]), th.tensor([[0.1, -0.2]])
    uniform = th.rand(1, 100_000, 2, generator=th.Generator().manual_seed(0))
    samples = boltzmann.gaussian_proposal(noisy, *linear_path(t), uniform)[0]
    scale = 0.05 / 0.95
    for column, mean in zip(samples.T, (noisy / 0.95)[0].tolist(), strict=True):
        assert stats.kstest(column.numpy(), stats.norm(mean, scale).cdf).pvalue > 1e-3


def test_actions_and_noise_invert_each_other() -> None:
    t, actions, noise = th.rand(10, 1) * 0.9, th.rand(10, 3) * 2 - 1, th.randn(10, 3)
    assert th.allclose(paths.actions_from_noise((1 - t) * actions + t * noise, noise, *linear_path(t)), actions, atol=1e-5)
    low, high = paths.truncated_noise_bounds(th.tensor([[0.5]]), *linear_path(th.tensor([[0.25]])))
    assert paths.actions_from_noise(th.tensor([[0.5]]), low, *linear_path(th.tensor([[0.25]]))).item() == pytest.approx(1)
    assert paths.actions_from_noise(th.tensor([[0.5]]), high, *linear_path(th.tensor([[0.25]]))).item() == pytest.approx(-1)


def test_equal_weights_have_all_samples_effective() -> None:
    k = 7
    actions, noisy, t = th.randn(5, k, 2), th.randn(5, 2), th.full((5, 1), 0.4)
    mean_action, size = boltzmann.snis_mean(th.full((5, k), 1 / k), actions)
    assert th.allclose(size, th.full((5, 1), float(k)))
    assert th.allclose(paths.linear_velocity(noisy, mean_action, t), (noisy - actions.mean(1)) / 0.4, atol=1e-6)


def test_one_dominant_weight_leaves_one_sample() -> None:
    weights = th.tensor([[0.0, 1000.0, 3.0]]).softmax(1)
    actions = th.tensor([[[1.0], [2.0], [3.0]]])
    mean_action, size = boltzmann.snis_mean(weights, actions)
    assert size.item() == pytest.approx(1)
    assert mean_action.item() == pytest.approx(2)


def test_estimates_are_combined_by_effective_sample_size() -> None:
    combined, shares = boltzmann.combine_by_sample_size(
        [th.tensor([[1.0, 0.0]]), th.tensor([[0.0, 1.0]])], [th.tensor([[3.0]]), th.tensor([[1.0]])]
    )
    assert combined.tolist() == [[0.75, 0.25]]
    assert [share.item() for share in shares] == [0.75, 0.25]
    alone, (share,) = boltzmann.combine_by_sample_size([th.tensor([[2.0]])], [th.tensor([[5.0]])])
    assert alone.item() == 2 and share.item() == 1


def test_both_proposals_find_the_velocity_of_a_gaussian_policy() -> None:
    """
    Q = log N(mean, std^2) far from the walls: E[a_0 | a_t] is known, and either proposal must find it, whatever the
    temperature (which scales Q). The policy here is a wider Gaussian with its true log-probability.
    """
    generator = th.Generator().manual_seed(0)
    mean, std, ent_coef, k = 0.1, 0.1, 0.5, 200_000
    t, noisy = th.tensor([[0.1]]), th.tensor([[0.2]])
    posterior_precision = 1 / std**2 + 0.9**2 / 0.1**2
    expected = (0.2 - (mean / std**2 + 0.9 * 0.2 / 0.1**2) / posterior_precision) / 0.1

    def q(actions: th.Tensor) -> th.Tensor:
        return -ent_coef * 0.5 * ((actions - mean) / std).square().sum(-1)

    policy = th.distributions.Normal(0.0, 0.3)
    actions = 0.3 * th.randn(1, k, 1, generator=generator)
    log_weights = boltzmann.policy_log_weights(q(actions), policy.log_prob(actions).sum(-1), actions, noisy, t, ent_coef)
    from_policy, _ = boltzmann.snis_mean(log_weights.softmax(1), actions)

    actions = boltzmann.gaussian_proposal(noisy, *linear_path(t), th.rand(1, k, 1, generator=generator))
    from_gaussian, _ = boltzmann.snis_mean((q(actions) / ent_coef).softmax(1), actions)

    for mean_action in (from_policy, from_gaussian):
        assert paths.linear_velocity(noisy, mean_action, t).item() == pytest.approx(expected, abs=0.01)


def test_the_mean_action_respects_the_bounds() -> None:
    """Constant Q on the box: E[a_0 | a_t] is the mean of the truncated Gaussian."""
    t, noisy = th.tensor([[0.5]]), th.tensor([[0.6]])
    actions = boltzmann.gaussian_proposal(
        noisy, *linear_path(t), th.rand(1, 200_000, 1, generator=th.Generator().manual_seed(0))
    )
    mean_action, size = boltzmann.snis_mean(th.zeros(1, 200_000).softmax(1), actions)
    centre, scale = 0.6 / 0.5, 1.0
    expected = stats.truncnorm((-1 - centre) / scale, (1 - centre) / scale, centre, scale).mean()
    assert mean_action.item() == pytest.approx(expected, abs=0.005)
    assert size.item() == pytest.approx(200_000, rel=1e-3)


def test_a_latin_hypercube_has_one_draw_in_each_stratum() -> None:
    generator = th.Generator().manual_seed(0)
    b, k, d = 500, 12, 3
    order = th.rand(k, d, generator=generator).argsort(dim=0)
    draws = boltzmann.latin_hypercube(th.rand(b, k, d, generator=generator), order)
    assert th.equal((draws * k).long().sort(dim=1).values, th.arange(k)[:, None].expand(b, k, d))
    # All together are uniform, and their mean varies far less than that of independent draws, 1 / sqrt(12 k)
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    assert draws.mean(dim=1).std().item() < 0.2 * (12 * k) ** -0.5
    assert (boltzmann.latin_hypercube(th.full((1, k, d), 1 - 2.0**-24), order) < 1).all()


@pytest.mark.parametrize("t", [1e-3, 0.05, 0.5, 0.9, 0.999])
def test_density_of_the_proposal_is_that_of_scipy(t: float) -> None:
    generator = th.Generator().manual_seed(0)
    b, k, d = 40, 5, 3
    time = th.full((b, 1), t)
    noisy = (1 - t) * (2 * th.rand(b, d, generator=generator) - 1) + t * th.randn(b, d, generator=generator)
    actions = boltzmann.gaussian_proposal(noisy, *linear_path(time), th.rand(b, k, d, generator=generator))
    centre, scale = (noisy.double() / (1 - time.double())).unsqueeze(1).numpy(), t / (1 - t)
    density = stats.truncnorm((-1 - centre) / scale, (1 - centre) / scale, centre, scale)
    expected = density.logpdf(np.clip(actions.double().numpy(), -1, 1)).sum(-1)
    # At small t rounding of an action is a part of the proposal's width
    assert np.allclose(boltzmann.gaussian_log_prob(actions, noisy, *linear_path(time)), expected, atol=2e-3, rtol=1e-4)


def test_without_other_proposals_the_gaussians_weights_are_equal() -> None:
    weights = boltzmann.mixture_log_weights([100 * th.randn(4, 1, 7)], [7]).softmax(dim=1)
    assert th.allclose(weights, th.full((4, 7), 1 / 7), atol=1e-5)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("centres", [[-0.6], [0.6], [1.0], [-0.6, 0.5], [0.1, 0.1, -1.0]])
def test_gaussian_and_local_proposals_find_the_mean_action_between_modes(t: float, centres: list[float]) -> None:
    """
    Two modes of different weight, against quadrature: wherever the local proposals stand, at one of them, at both or at none,
    and whichever share of the actions is theirs.
    """
    generator = th.Generator().manual_seed(0)
    k, std, noisy, time = 100_000, 0.1, th.tensor([[0.05]]), th.tensor([[t]])

    def q(actions: th.Tensor) -> th.Tensor:
        distances = (actions.squeeze(-1).unsqueeze(-1) - th.tensor([-0.6, 0.5])) / 0.05
        return 0.5 * th.logsumexp(-0.5 * distances.square() + th.tensor([0.0, 1.0]), dim=-1)

    grid = th.linspace(-1, 1, 20_001, dtype=th.float64).view(1, -1, 1)
    posterior = (q(grid) / 0.5 - 0.5 * ((noisy - (1 - t) * grid) / t).square().squeeze(-1)).softmax(dim=1)
    expected = (posterior * grid.squeeze(-1)).sum().item()

    for share in (0.1, 0.5):
        n_local = int(share * k / len(centres))
        n_gaussian = k - n_local * len(centres)
        gaussian = (noisy, *linear_path(time))
        local = (th.tensor(centres).view(1, -1, 1), th.ones(1, 1), th.full((1, 1), std))
        of_gaussian = boltzmann.gaussian_proposal(*gaussian, th.rand(1, n_gaussian, 1, generator=generator))
        of_local = boltzmann.gaussian_proposal(*local, th.rand(1, len(centres), n_local, 1, generator=generator))
        actions = th.cat([of_gaussian, of_local.flatten(1, 2)], dim=1)
        log_probs = [
            boltzmann.gaussian_log_prob(actions, *gaussian).unsqueeze(1),
            boltzmann.gaussian_log_prob(actions.unsqueeze(1), *local),
        ]
        weights = (q(actions) / 0.5 + boltzmann.mixture_log_weights(log_probs, [n_gaussian, n_local])).softmax(dim=1)
        assert boltzmann.snis_mean(weights, actions)[0].item() == pytest.approx(expected, abs=0.01)
