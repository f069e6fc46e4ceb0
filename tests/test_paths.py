"""Paths, scores and velocities against densities whose scores are known."""

from __future__ import annotations

import math

import pytest
import torch as th
from scipy import stats

from sb3_mfpo.maths import boltzmann, mean_flow, paths
from sb3_mfpo.som.som import PATHS

TIMES = [0.05, 0.2, 0.4, 0.6, 0.9]
ANGLES = th.arange(6, dtype=th.float64) * math.pi / 3
MEANS = 0.7 * th.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
STD = 0.1


def log_density(actions: th.Tensor, means: th.Tensor = MEANS) -> th.Tensor:
    """Log-density of a mixture of Gaussians with equal weights, up to a constant."""
    return th.logsumexp(-0.5 * ((actions.unsqueeze(-2) - means) / STD).square().sum(-1), dim=-1)


def exact(
    noisy: th.Tensor, mu: th.Tensor, sigma: th.Tensor, means: th.Tensor = MEANS
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Score, E[a_0 | a_t] and E[eps | a_t] of the mixture at a_t: every component stays Gaussian."""
    variance = mu.square() * STD**2 + sigma.square()
    offsets = noisy.unsqueeze(-2) - mu.unsqueeze(-1) * means
    share = (-0.5 * offsets.square().sum(-1) / variance).softmax(-1).unsqueeze(-1)
    scores = -(share * offsets).sum(-2) / variance
    mean_action = (share * (means + mu.unsqueeze(-1) * STD**2 / variance.unsqueeze(-1) * offsets)).sum(-2)
    mean_noise = (share * sigma.unsqueeze(-1) / variance.unsqueeze(-1) * offsets).sum(-2)
    return scores, mean_action, mean_noise


def noisy_actions(path: str, t: float, n: int) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """Points on the paths of the mixture: t, a_t, mu_t, sigma_t."""
    generator = th.Generator().manual_seed(0)
    times = th.full((n, 1), t, dtype=th.float64)
    mu, sigma = PATHS[path][0](times)
    actions = MEANS[th.randint(6, (n,), generator=generator)]
    actions = actions + STD * th.randn(n, 2, generator=generator, dtype=th.float64)
    noise = th.randn(n, 2, generator=generator, dtype=th.float64)
    return times, paths.interpolate(actions, noise, mu, sigma), mu, sigma


def relative_error(estimate: th.Tensor, truth: th.Tensor) -> float:
    return ((estimate - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("path", PATHS)
def test_scores_and_velocities_agree(path: str, t: float) -> None:
    """
    Score from the posterior mean and back; and the velocity against mu' E[a_0] + sigma' E[eps], and the same
    with E[a_0] = (a_t - sigma E[eps]) / mu. mu' and sigma' come from automatic differentiation.
    """
    times, noisy, mu, sigma = noisy_actions(path, t, 500)
    scores, mean_action, mean_noise = exact(noisy, mu, sigma)
    assert relative_error(boltzmann.score_from_mean_action(mean_action, noisy, mu, sigma), scores) < 1e-9
    _, (d_mu, d_sigma) = th.func.jvp(PATHS[path][0], (times,), (th.ones_like(times),))
    assert relative_error(boltzmann.mean_action_from_score(scores, noisy, mu, sigma), mean_action) < 1e-9
    velocity = PATHS[path][1](noisy, mean_action, times)
    from_action = d_mu * mean_action + d_sigma * mean_noise
    from_noise = d_mu / mu * (noisy - sigma * mean_noise) + d_sigma * mean_noise
    assert relative_error(velocity, from_action) < 1e-6
    assert relative_error(velocity, from_noise) < 1e-6
    if path == "vp":
        # SOM's form
        assert relative_error(-0.5 * paths.noise_rate(times) * (noisy + scores), velocity) < 1e-6


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("path", PATHS)
def test_posterior_mean_estimates_the_score(path: str, t: float) -> None:
    """20 000 samples at 32 points; the error is that of Monte Carlo (the density beyond the walls is 0.1 %)."""
    _, noisy, mu, sigma = noisy_actions(path, t, 32)
    uniform = th.rand(32, 20_000, 2, generator=th.Generator().manual_seed(1))
    noisy, mu, sigma = noisy.float(), mu.float(), sigma.float()
    actions = boltzmann.gaussian_proposal(noisy, mu, sigma, uniform)
    mean_action, _ = boltzmann.snis_mean(log_density(actions.double()).softmax(dim=1).float(), actions)
    estimate = boltzmann.score_from_mean_action(mean_action, noisy, mu, sigma)
    truth, _, _ = exact(noisy.double(), mu.double(), sigma.double())
    error = relative_error(estimate.double(), truth)
    print(f"{path}, t = {t}: relative error {error:.3f}")
    assert error < 0.04


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("path", PATHS)
def test_gradients_give_the_score_in_the_limit(path: str, t: float) -> None:
    """With all of the space as samples (one dimension, a fine grid), the factor 1 / mu_t included."""
    means = th.tensor([[-0.6], [0.1], [0.7]], dtype=th.float64)
    times = th.full((5, 1), t, dtype=th.float64)
    mu, sigma = PATHS[path][0](times)
    noisy = th.linspace(-1.5, 1.5, 5, dtype=th.float64)[:, None]
    grid = th.linspace(-2, 2, 200_001, dtype=th.float64)[:, None].requires_grad_()
    log_p = log_density(grid, means)
    (gradients,) = th.autograd.grad(log_p.sum(), grid)
    noise = (noisy.unsqueeze(1) - mu.unsqueeze(1) * grid.detach()) / sigma.unsqueeze(1)
    weights = (log_p.detach() - 0.5 * noise.square().sum(-1)).softmax(dim=1)
    estimate = boltzmann.score_from_gradients(weights, gradients.expand(5, -1, -1), mu)
    truth, _, _ = exact(noisy, mu, sigma, means)
    assert relative_error(estimate, truth) < 1e-6


@pytest.mark.parametrize("t", [0.05, 0.2])
def test_gradients_give_the_score_by_sampling(t: float) -> None:
    """As SOM draws them, where their variance allows: linear path, small t."""
    _, noisy, mu, sigma = noisy_actions("linear", t, 64)
    normal = th.randn(64, 20_000, 2, generator=th.Generator().manual_seed(1), dtype=th.float64)
    actions = paths.actions_from_noise(noisy.unsqueeze(1), normal, mu.unsqueeze(1), sigma.unsqueeze(1))
    log_p = log_density(actions.requires_grad_())
    (gradients,) = th.autograd.grad(log_p.sum(), actions)
    estimate = boltzmann.score_from_gradients(log_p.detach().softmax(dim=1), gradients, mu)
    truth, _, _ = exact(noisy, mu, sigma)
    assert relative_error(estimate, truth) < 0.1


@pytest.mark.parametrize("path, t", [("linear", 0.2), ("linear", 0.6), ("vp", 0.2), ("vp", 0.6)])
def test_posterior_means_see_the_bounds_and_gradients_do_not(path: str, t: float) -> None:
    """Constant Q on the box: the posterior mean is that of a truncated Gaussian, while gradients see no walls."""
    times = th.full((3, 1), t, dtype=th.float64)
    mu, sigma = PATHS[path][0](times)
    noisy = mu * th.tensor([[0.0], [0.7], [1.4]], dtype=th.float64)
    uniform = th.rand(3, 100_000, 1, generator=th.Generator().manual_seed(0), dtype=th.float64)
    actions = boltzmann.gaussian_proposal(noisy, mu, sigma, uniform)
    weights = th.zeros(actions.shape[:2], dtype=th.float64).softmax(dim=1)
    estimate = boltzmann.score_from_mean_action(boltzmann.snis_mean(weights, actions)[0], noisy, mu, sigma)
    centres, scale = (noisy / mu).squeeze(1), (sigma / mu)[0].item()
    expected_mean = [stats.truncnorm((-1 - c) / scale, (1 - c) / scale, c, scale).mean() for c in centres.tolist()]
    expected = boltzmann.score_from_mean_action(th.tensor(expected_mean)[:, None], noisy, mu, sigma)
    print(expected.squeeze(1).tolist())
    assert th.allclose(estimate, expected, atol=0.02 * expected.abs().max().item())
    assert expected[2].item() < -0.2
    assert (boltzmann.score_from_gradients(weights, th.zeros_like(actions), mu) == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_fine_solve_carries_noise_to_the_mixture(path: str) -> None:
    """The velocity is that of the known score. Every mode gets a sixth of the samples, with the right spread."""
    generator = th.Generator().manual_seed(0)
    noise = th.randn(6000, 2, generator=generator, dtype=th.float64)
    # The linear path's velocity is not defined at t = 1
    times = th.linspace(1 - 1e-4, 1e-3, 501, dtype=th.float64)
    path_of, velocity_of = PATHS[path]

    def velocity(actions: th.Tensor, k: int) -> th.Tensor:
        t = times[k].reshape(1, 1)
        return velocity_of(actions, exact(actions, *path_of(t))[1], t)

    actions, _ = mean_flow.few_step_sample(velocity, noise, times)
    distance, nearest = th.cdist(actions, MEANS).min(dim=1)
    share = th.bincount(nearest, minlength=6) / 6000
    print(share, distance.square().mean().sqrt() / STD)
    # Four standard errors of a share
    assert (share - 1 / 6).abs().max() < 4 * math.sqrt(1 / 6 * 5 / 6 / 6000)
    assert distance.square().mean().sqrt().item() == pytest.approx(math.sqrt(2) * STD, rel=0.05)


def test_the_variance_preserving_path_keeps_the_variance() -> None:
    """It keeps the variance, its mu decays at half the noise rate, and single precision suffices."""
    t = th.linspace(0, 1, 101, dtype=th.float64)[:, None]
    mu, sigma = paths.variance_preserving_path(t)
    assert th.allclose(mu.square() + sigma.square(), th.ones_like(t), atol=1e-12)
    _, rate = th.func.jvp(lambda t: paths.variance_preserving_path(t)[0].log(), (t,), (th.ones_like(t),))
    assert th.allclose(rate, -0.5 * (0.1 + 19.9 * t), atol=1e-9)
    assert (mu[0].item(), sigma[0].item()) == (1, 0)
    assert mu[-1].item() == pytest.approx(math.exp(-0.5 * 10.05))
    for single, double in zip(paths.variance_preserving_path(t.float()), (mu, sigma), strict=True):
        assert th.allclose(single.double(), double, rtol=1e-5, atol=0)


def test_scores_are_scaled_to_a_given_length() -> None:
    scores = th.tensor([[3.0, 4.0], [0.0, 0.0], [-1e-3, 0.0]])
    assert th.allclose(boltzmann.with_length(scores, 5.0), th.tensor([[3.0, 4.0], [0.0, 0.0], [-5.0, 0.0]]))


def test_spread_is_the_standard_deviation_and_never_zero() -> None:
    assert boltzmann.spread(th.tensor([[1.0, 3.0], [5.0, 7.0]])).item() == pytest.approx(math.sqrt(5))
    # Equal values: zero up to rounding, and never exactly zero
    assert 0 < boltzmann.spread(th.full((4, 3), 7.3)).item() < 1e-6
    assert boltzmann.spread(th.ones(1, 1)).item() > 0
