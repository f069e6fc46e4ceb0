"""A flow that is sharp after a thousand updates: a saw of known modes is fitted, by what the defaults add to the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.maths import mean_flow
from sb3_mfpo.maths.paths import interpolate, linear_path, linear_velocity
from tests.helpers import Algorithm, RandomEnv
from tests.test_mean_flow import gaussian_flow, gaussian_velocity

MODES, STD = th.tensor([-0.6, 0.0, 0.6]), 0.05


def velocity_of_modes(noisy_actions: th.Tensor, t: th.Tensor) -> th.Tensor:
    """Exact, for three narrow Gaussians: the posterior of each is Gaussian, and their weights follow from a_t."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    weights = (-0.5 * (noisy_actions - (1 - t) * MODES).square() / variance).softmax(dim=1)
    means = MODES + (1 - t) * STD**2 / variance * (noisy_actions - (1 - t) * MODES)
    return linear_velocity(noisy_actions, (weights * means).sum(dim=1, keepdim=True), t)


def fit(algorithm: Algorithm, updates: int, **settings: Any) -> Any:
    """Supervised: regress the actor on the exact velocity, as the algorithm does on its estimate."""
    env = RandomEnv(spaces.Box(-1, 1, (1,), np.float32), spaces.Box(-1, 1, (1,), np.float32))
    policy_kwargs = {**settings.pop("policy_kwargs", {}), "net_arch": [64, 64]}
    model = algorithm(
        "MlpPolicy", env, learning_rate=1e-3, buffer_size=10, seed=0, device="cpu", policy_kwargs=policy_kwargs, **settings
    )
    features = th.zeros(256, 1)
    for _ in range(updates):
        draws = model._draw_regression(256, "mean_flow")
        actions = MODES[th.randint(3, (256, 1))] + STD * th.randn(256, 1)
        noisy_actions = interpolate(actions, draws.noise, *linear_path(draws.t))
        velocity = velocity_of_modes(noisy_actions, draws.t)
        errors = model._regression_errors(model.actor, features, noisy_actions, draws, velocity, velocity)
        model.actor.optimizer.zero_grad()
        errors.square().mean().backward()
        model.actor.optimizer.step()
        model._update_target(model.actor_target, model.actor, model.actor_tau)
    return model


@th.no_grad()
def share_within_a_mode(model: Any, steps: int) -> float:
    """Within three standard deviations of 4 000 samples; of the truth 0.997."""
    model.policy.sampling_steps = steps
    noise = th.randn(4000, 1, generator=th.Generator().manual_seed(0))
    actions = model.policy.act(th.zeros(1, 1), noise)
    return ((actions - MODES).abs().amin(dim=1) <= 3 * STD).float().mean().item()


def test_a_thousand_updates_fit_a_saw() -> None:
    model = fit(MFPO, updates=1000)
    shares = {steps: share_within_a_mode(model, steps) for steps in (2, 20)}
    print(shares)
    assert shares[2] >= 0.85 and shares[20] >= 0.9
    # Each mode has its third
    with th.no_grad():
        nearest = (model.policy.act(th.zeros(1, 1), th.randn(4000, 1)) - MODES).abs().argmin(dim=1)
    assert (nearest.bincount(minlength=3) / 4000).tolist() == pytest.approx([1 / 3] * 3, abs=0.08)


def test_with_the_papers_settings_they_do_not() -> None:
    """The test above measures something."""
    assert share_within_a_mode(fit(MFPO, updates=1000, **MFPO.PAPER), 2) < 0.6


def test_features_of_the_action_make_one_step_of_som_sharper() -> None:
    ours = share_within_a_mode(fit(SOM, updates=1000), 1)
    without = share_within_a_mode(fit(SOM, updates=1000, policy_kwargs=dict(action_fourier_dim=0)), 1)
    print(ours, without)
    assert ours > without + 0.1


@pytest.mark.parametrize("power, expected", [(1.0, [1, 0.75, 0.5, 0.25, 0]), (2.0, [1, 0.5625, 0.25, 0.0625, 0])])
def test_the_sampling_grid_is_a_power(power: float, expected: list[float]) -> None:
    assert mean_flow.sampling_grid(4, power).tolist() == pytest.approx(expected)
    assert mean_flow.sampling_grid(1, power).tolist() == [1, 0]


def test_an_interval_starts_at_the_grid_point_below() -> None:
    t = th.tensor([[1e-6], [0.1], [0.25], [0.2500001], [0.9], [1.0]])
    start = mean_flow.start_on_grid(t, th.tensor([1.0, 0.25, 0.0]))
    assert start.flatten().tolist() == [0, 0, 0, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_on_grid_intervals_the_average_velocity_of_a_gaussian_satisfies_the_identity(steps: int) -> None:
    """With r on the grid, the target that the exact average gives is the exact average."""
    grid = mean_flow.sampling_grid(steps, 2.0).double()
    t = th.linspace(0.01, 1, 64, dtype=th.float64).unsqueeze(1)
    r, one = mean_flow.start_on_grid(t, grid), th.ones_like(t)
    actions = th.randn(64, 3, dtype=th.float64, generator=th.Generator().manual_seed(0))
    velocity = gaussian_velocity(actions, t, mean=0.3, std=0.2)
    average, derivative = th.func.jvp(gaussian_flow, (actions, t, t - r), (velocity, one, one))
    assert th.allclose(mean_flow.mean_flow_target(velocity, t - r, derivative), average, atol=1e-9)


@pytest.mark.parametrize("algorithm", [MFPO, SOM])
def test_training_times_are_mixed_and_their_intervals_those_of_the_sampler(algorithm: Algorithm) -> None:
    env = RandomEnv()
    times = dict(intervals="grid", uniform_time_share=0.5)
    model = algorithm("MlpPolicy", env, buffer_size=10, device="cpu", seed=0, policy_kwargs=dict(net_arch=[8]), **times)
    n, n_equal = 40_000, 10_000
    t, r = model._draw_times(n, n_equal)
    grid = model.actor.sampling_times
    assert (t[:n_equal] == r[:n_equal]).all() and (r < t)[n_equal:].all()
    assert set(r[n_equal:].flatten().tolist()) == set(grid[1:].tolist())
    # The interval holds no other point of the grid
    assert not ((grid > r[n_equal:]) & (grid < t[n_equal:])).any()
    # Half of the times are uniform, half logit-normal: means of the two, in equal and other rows alike
    logit_normal, _ = mean_flow.logit_normal_times(th.randn(n, 2), model.time_mean, model.time_std, 0)
    expected = 0.5 * 0.5 + 0.5 * logit_normal.mean().item()
    assert t[:n_equal].mean().item() == pytest.approx(expected, abs=0.01)
    assert t[n_equal:].mean().item() == pytest.approx(expected, abs=0.01)
    # Another number of steps has other intervals, at once
    model.policy.sampling_steps = 5
    _, r = model._draw_times(n, 0)
    assert set(r.flatten().tolist()) == set(model.actor.sampling_times[1:].tolist())


def test_any_intervals_are_drawn_as_in_the_papers() -> None:
    env, small = RandomEnv(), dict(buffer_size=10, device="cpu", seed=0, policy_kwargs=dict(net_arch=[8]))
    model = MFPO("MlpPolicy", env, intervals="any", uniform_time_share=0.0, **small)
    t, r = (th.logit(time) for time in model._draw_times(40_000, 0))
    # Larger and smaller of two normal numbers: their sum has the moments of the sum
    assert (t + r).mean().item() == pytest.approx(2 * -0.4, abs=0.03)
    assert (t + r).std().item() == pytest.approx(2**0.5, abs=0.03)
    model = SOM("MlpPolicy", env, **small)
    t, r = model._draw_times(40_000, 0)
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (r / t).mean().item() == pytest.approx(0.5, abs=0.01)
