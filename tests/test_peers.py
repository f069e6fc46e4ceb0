"""The peers of the benchmarks, against closed forms, on known critics, and from start to file."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import peers_cost
import pytest
import suite as suites
import torch as th
from peers import DACER, DIME, PEERS, FlowRL, MaxEntDP, SACFlow, maths
from peers.common import frozen
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from sb3_mfpo import SOM, RunCheckpointCallback
from tests.helpers import RandomEnv, assert_equal

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL: dict[str, dict[str, Any]] = {
    "dime": dict(policy_kwargs=dict(sampling_steps=5)),
    "maxentdp": dict(n_samples=16, n_entropy_draws=2, policy_kwargs=dict(sampling_steps=5)),
    "dacer": dict(entropy_interval=7, n_entropy_samples=20, policy_kwargs=dict(sampling_steps=5)),
    "sacflow": dict(policy_kwargs=dict(sampling_steps=3)),
    "flowrl": dict(policy_kwargs=dict(sampling_steps=2)),
}
WITHOUT_TEMPERATURE = ("dacer", "flowrl")


def make(name: str, env: Any = None, **kwargs: Any) -> Any:
    """A small model; ``policy_kwargs`` are added to the small ones."""
    policy_kwargs = {"net_arch": [16], **SMALL[name]["policy_kwargs"], **kwargs.pop("policy_kwargs", {})}
    settings = dict(learning_starts=10, buffer_size=500, batch_size=8, device="cpu", seed=0)
    return PEERS[name](
        "MlpPolicy",
        RandomEnv() if env is None else env,
        **{**settings, **SMALL[name], **kwargs, "policy_kwargs": policy_kwargs},  # type: ignore[arg-type]
    )


def slopes(value: Callable[[], th.Tensor], network: th.nn.Module, generator: th.Generator) -> tuple[float, float]:
    """Slope of a value in a direction of all of a network's weights: by its gradient, and by a finite difference."""
    parameters = list(network.parameters())
    direction = [th.randn(parameter.shape, generator=generator, dtype=th.float64) for parameter in parameters]
    gradients = th.autograd.grad(value(), parameters)
    slope = sum((gradient * step).sum() for gradient, step in zip(gradients, direction, strict=True))
    values = []
    for shift in (1e-7, -2e-7):
        with th.no_grad():
            for parameter, step in zip(parameters, direction, strict=True):
                parameter += shift * step
        values.append(value().item())
    return float(slope), (values[0] - values[1]) / 2e-7


@pytest.fixture(params=PEERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# DIME


def zero_drift(n: int) -> tuple[Any, ...]:
    """Actions of DIME's uncontrolled diffusion in two coordinates, their bounds, their path costs."""
    model = DIME("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu", policy_kwargs=dict(net_arch=[8]))
    actor, generator = model.actor.double(), th.Generator().manual_seed(0)
    for parameter in actor.network.body[-1].parameters():
        th.nn.init.zeros_(parameter)
    noise = th.randn(n, actor.noise_dim, generator=generator, dtype=th.float64)
    with th.no_grad():
        return actor.sample(th.zeros(n, 3, dtype=th.float64), noise)


def test_without_drift_the_bound_of_dime_is_the_log_density() -> None:
    """The wide Gaussian that the path starts from is stationary, so its image under tanh is the policy."""
    actions, bound, cost = zero_drift(50_000)
    wide = Normal(th.zeros(2, dtype=th.float64), 2.5)
    expected = Independent(TransformedDistribution(wide, [TanhTransform()]), 1).log_prob(actions)
    inside = actions.abs().amax(dim=1) < 1 - 1e-9
    print(f"bound {bound.mean():.4f}, log-density {expected[inside].mean():.4f}, cost {cost.mean() / 2:.3f} per coordinate")
    assert inside.float().mean() > 0.999
    assert (bound - expected)[inside].mean().abs() < 0.02
    # The share of coordinates at the bounds, P(|2.5 z| > atanh(0.95)), and the cost, -E ln(1 - tanh(2.5 z)^2)
    assert (actions.abs() > 0.95).double().mean() == pytest.approx(math.erfc(math.atanh(0.95) / 2.5 / math.sqrt(2)), abs=5e-3)
    grid = th.linspace(-30, 30, 20_001, dtype=th.float64)
    density = wide.log_prob(grid.unsqueeze(1))[:, 0].exp()
    of_tanh = -(density * maths.log_tanh_derivative(grid)).sum() / density.sum()
    assert cost.mean() / 2 == pytest.approx(of_tanh.item(), abs=0.02)


def test_the_cost_of_a_path_is_the_log_ratio_of_its_kernels() -> None:
    """Of normal distributions, by PyTorch's own densities, with a drift and other step sizes per coordinate."""
    generator, prior_std = th.Generator().manual_seed(0), 1.7
    steps = 0.02 + 0.1 * th.rand(6, 3, generator=generator, dtype=th.float64)
    noise = th.randn(7, 40, 3, generator=generator, dtype=th.float64).unbind()

    def drift(x: th.Tensor, k: int) -> th.Tensor:
        return (k + 1) * (2 * x).sin()

    path = maths.langevin_path(drift, noise, steps, prior_std)
    assert th.equal(path[0], prior_std * noise[0])
    expected = th.zeros(40, dtype=th.float64)
    for k, h in enumerate(steps):
        forward = Normal(path[k] - h * path[k] / prior_std**2 + h * drift(path[k], k), (2 * h).sqrt())
        backward = Normal(path[k + 1] - h * path[k + 1] / prior_std**2, (2 * h).sqrt())
        assert th.allclose(path[k + 1], forward.mean + forward.stddev * noise[k + 1])
        expected += (forward.log_prob(path[k + 1]) - backward.log_prob(path[k])).sum(dim=-1)
    assert th.allclose(maths.langevin_cost(path, noise, steps, prior_std), expected)


def test_the_step_sizes_of_dime_fall_from_a_tenth_to_a_thousandth() -> None:
    model = DIME("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu")
    steps = model.actor.steps()
    assert steps.shape == (16, 2)
    expected = [0.1 * (0.999 * math.cos(math.pi / 2 * (0.008 + k / 16) / 1.008) ** 2 + 0.001) for k in range(16)]
    assert th.allclose(steps, th.tensor(expected).unsqueeze(1).expand(16, 2), rtol=1e-5)
    assert steps[0, 0].item() == pytest.approx(0.1, rel=1e-3) and steps[-1, 0].item() == pytest.approx(1e-3, rel=0.1)


def test_the_step_sizes_of_dime_are_learned_through_the_cost() -> None:
    """The gradient of the bound with respect to them, against finite differences: a cost that did not see them would miss."""
    model = make("dime")
    actor, noise = model.actor.double(), th.randn(64, model.actor.noise_dim, dtype=th.float64)
    th.nn.init.normal_(actor.network.body[-1].weight)
    features = th.randn(64, 3, dtype=th.float64)

    def bound() -> th.Tensor:
        return actor.sample(features, noise)[1].mean()

    (gradient,) = th.autograd.grad(bound(), actor.step_size)
    with th.no_grad():
        values = []
        for shift in (1e-4, -2e-4):
            actor.step_size += shift
            values.append(bound())
    assert gradient.item() == pytest.approx(((values[0] - values[1]) / 2e-4).item(), rel=1e-4)


def test_the_log_derivative_of_tanh_is_stable() -> None:
    x = th.tensor([-300.0, -3.0, -0.1, 0.0, 0.1, 3.0, 300.0])
    exact = -2 * th.log(th.cosh(x.double().clamp(-3, 3)))
    assert th.allclose(maths.log_tanh_derivative(x)[1:-1], exact[1:-1].float(), rtol=1e-5, atol=1e-6)
    # 2 ln 2 - 2 |x|, where the difference 1 - tanh^2 is 0
    assert maths.log_tanh_derivative(x)[[0, -1]].tolist() == pytest.approx([2 * math.log(2) - 600] * 2)
    x.requires_grad_()
    (gradient,) = th.autograd.grad(maths.log_tanh_derivative(x).sum(), x)
    assert th.allclose(gradient, -2 * x.tanh(), atol=1e-6)


def test_gradients_of_dimes_actor_are_clipped_one_by_one() -> None:
    model = make("dime")
    parameter = model.actor.step_size
    for slope, expected in ((0.3, 0.3), (-1e6, -1.0), (math.nan, 0.0)):
        parameter.grad = None
        (slope * parameter).backward()
        assert parameter.grad.item() == pytest.approx(expected)


def test_the_temperature_of_dime_rises_when_paths_cost_more_than_their_target() -> None:
    """The uncontrolled diffusion costs 2.85 nats per coordinate."""
    for target, rises in ((2.0, True), (4.0, False)):
        model = make("dime", target_cost=target, learning_starts=1, batch_size=64, learning_rate=0.0).learn(12)
        assert (model.temperature().item() > 1) == rises


# MaxEntDP


@pytest.mark.parametrize("time", [0.05, 0.3, 0.7])
def test_the_weighted_noise_is_that_of_a_gaussian_boltzmann_density(time: float) -> None:
    """
    Q = -(a - m)^2 / 2 at temperature s^2 is a Gaussian, far within the bounds. The score of its noised marginal
    N(mu m, mu^2 s^2 + sigma^2) is minus the mean noise over sigma.
    """
    centre, std = th.tensor([0.2, -0.3]), 0.12
    model = make("maxentdp", ent_coef=std**2)
    model.critic_target.q_values = lambda features, actions: -0.5 * (actions - centre).square().sum(-1).unsqueeze(0)
    generator = th.Generator().manual_seed(0)
    power = maths.cosine_power(th.full((64, 1), time))
    marginal_std = (power * std**2 + 1 - power).sqrt()
    points = power.sqrt() * centre + marginal_std * th.randn(64, 2, generator=generator)
    uniform = th.rand(64, 5_000, 2, generator=generator)
    noise, size = model._boltzmann_noise(th.zeros(64, 3), points, power, uniform, model._temperature())
    expected = (1 - power).sqrt() * (points - power.sqrt() * centre) / marginal_std.square()
    print(f"error {(noise - expected).abs().mean():.4f}, of {expected.abs().mean():.3f}, sample size {size:.0f}")
    assert (noise - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


def log_prob_of_gaussian(std: float, actions: th.Tensor, draws: int) -> tuple[th.Tensor, Any]:
    """MaxEntDP's estimate where the network is the exact predictor of the noise in N(0, std^2 I)."""
    model = MaxEntDP("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu")
    actor = model.actor
    power = th.tensor(actor.powers[1:])[:, None, None]

    class Exact(th.nn.Module):
        embed = actor.network.embed

        def forward(self, features: th.Tensor, points: th.Tensor, embedding: th.Tensor) -> th.Tensor:
            return (1 - power).sqrt() * points / (power * std**2 + 1 - power)

    actor.network = Exact()
    noise = th.randn(len(actions), 20, draws, 2, generator=th.Generator().manual_seed(1))
    with th.no_grad():
        return actor.log_prob(th.zeros(len(actions), 3), actions, noise), actor.powers


@pytest.mark.parametrize(("std", "missing"), [(0.3, None), (0.2, 0.18), (0.1, 0.41), (0.05, 0.82)])
def test_the_log_probability_of_a_gaussian(std: float, missing: float | None) -> None:
    """
    With the exact predictor the errors have a closed form, c^2 A a^2 + (c sqrt(1 - A) - 1)^2 for a prediction c x. Their sum
    over the levels falls short of the log-density as the integral stops at the first one, more so the sharper the density.
    """
    actions = std * th.randn(256, 2, generator=th.Generator().manual_seed(0))
    estimate, powers = log_prob_of_gaussian(std, actions, draws=200)
    power = th.tensor(powers[1:])
    c = (1 - power).sqrt() / (power * std**2 + 1 - power)
    errors = c.square() * power * actions.square().sum(1, keepdim=True) + 2 * (c * (1 - power).sqrt() - 1).square()
    expected = maths.log_prob_from_errors(errors, powers, d=2)
    truth = Independent(Normal(th.zeros(2), std), 1).log_prob(actions)
    print(f"estimate {estimate.mean():.3f}, closed form {expected.mean():.3f}, log-density {truth.mean():.3f}")
    assert (estimate - expected).mean().abs() < 0.03
    # One action's, with the noise of 200 draws per level
    assert (estimate - expected).abs().mean() < 0.2
    assert np.corrcoef(estimate, truth)[0, 1] > 0.98
    if missing is not None:
        # Per coordinate; over all actions the mean error is the variance of the noise given the noisy action
        variances = 2 * power * std**2 / (power * std**2 + 1 - power)
        of_density = maths.log_prob_from_errors(variances, powers, d=2) / 2
        assert -0.5 * math.log(2 * math.pi * math.e * std**2) - of_density.item() == pytest.approx(missing, abs=0.01)


def test_the_levels_of_maxentdp() -> None:
    actor = MaxEntDP("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu").actor
    u = 0.001 + 0.9936 * np.arange(21) / 20
    amplitude = np.cos(np.pi / 2 * (u + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)
    np.testing.assert_allclose(actor.powers, amplitude**2, rtol=1e-10)
    assert actor.powers[0] == pytest.approx(0.99996, abs=5e-6)
    np.testing.assert_allclose(actor.variances, 1 - amplitude[1:] ** 2 / amplitude[:-1] ** 2)
    # From noise to action
    np.testing.assert_allclose(actor.times.flip(0), np.log(amplitude**2 / (1 - amplitude**2))[1:], rtol=1e-4)


# DACER


@pytest.mark.parametrize("k", [1, 2, 11, 20])
def test_the_ancestral_step_is_the_posterior(k: int) -> None:
    """Of x_{k-1} given x_k and the action, by Bayes' rule for Gaussians."""
    powers = maths.variance_preserving_powers(20)
    x, action = th.tensor([0.4, -1.3]).double(), th.tensor([0.9, 0.2]).double()
    kept, below = powers[k] / powers[k - 1], powers[k - 1]
    mean = maths.ancestral_mean(x, action, powers[k], below)
    if k == 1:
        assert th.allclose(mean, action) and maths.posterior_variances(powers)[0] == 0
        return
    precision = 1 / (1 - below) + kept / (1 - kept)
    expected = (below**0.5 * action / (1 - below) + kept**0.5 * x / (1 - kept)) / precision
    assert th.allclose(mean, expected)
    assert maths.posterior_variances(powers)[k - 1] == pytest.approx(1 / precision)


def test_the_levels_of_dacer() -> None:
    actor = DACER("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu").actor
    assert len(actor.powers) == 21 and actor.powers[0] == 1
    # The product of the spec's factors: the odd numbers up to 2 T - 1 add to T^2
    for k in (1, 7, 20):
        assert actor.powers[k] == pytest.approx(math.exp(-0.1 * k / 20 - 4.95 * k**2 / 400))
    assert actor.powers[20] == pytest.approx(0.0064, abs=5e-5)
    assert th.allclose(actor.times, th.arange(20, 0, -1) / 20)


def test_a_chain_with_the_exact_noise_has_the_moments_of_the_action() -> None:
    """The network predicts the noise of one Gaussian within the bounds: the chain ends in it, in a thousand short steps."""
    powers, generator, centre, std = maths.variance_preserving_powers(1000), th.Generator().manual_seed(0), 0.3, 0.1

    def exact(x: th.Tensor, step: int) -> th.Tensor:
        power = powers[1000 - step]
        return (1 - power) ** 0.5 * (x - power**0.5 * centre) / (power * std**2 + 1 - power)

    noise = th.randn(1000, 10_000, 1, generator=generator).unbind()
    actions = maths.ancestral_chain(exact, noise, powers, maths.posterior_variances(powers))
    assert actions.mean() == pytest.approx(centre, abs=0.01) and actions.std() == pytest.approx(std, rel=0.04)


def test_the_gradient_through_the_whole_chain() -> None:
    """With clips on the way, against finite differences in a direction of all the network's weights."""
    model = make("dacer", policy_kwargs=dict(sampling_steps=20))
    actor = model.actor.double()
    generator = th.Generator().manual_seed(0)
    features = th.randn(32, 3, generator=generator, dtype=th.float64)
    noise = th.randn(32, actor.noise_dim, generator=generator, dtype=th.float64)
    # Away from the bounds, where half of the actions of a new chain are
    th.nn.init.normal_(actor.network.body[-1].weight, std=1.0, generator=generator)
    slope, difference = slopes(lambda: (actor.act(features, noise) - 0.1).square().sum(), actor.network, generator)
    assert abs(slope) > 1 and slope == pytest.approx(difference, rel=1e-4)
    # Every level is reached by the gradient
    leaf = noise.clone().requires_grad_()
    (of_noise,) = th.autograd.grad((actor.act(features, leaf) - 0.1).square().sum(), leaf)
    assert (of_noise.view(32, 20, 2).abs().sum(dim=(0, 2)) > 0).all()


def test_the_entropy_of_a_mixture() -> None:
    """Three Gaussians that do not overlap, with full covariances; a single one is at most ln 3 too high."""
    generator = th.Generator().manual_seed(0)
    roots = 0.02 * th.randn(3, 2, 2, generator=generator).tril() + 0.05 * th.eye(2)
    means, weights = th.tensor([[-0.7, 0.5], [0.0, -0.6], [0.7, 0.4]]), th.tensor([0.5, 0.2, 0.3])
    chosen = th.multinomial(weights, 8 * 2000, replacement=True, generator=generator)
    samples = means[chosen] + (roots[chosen] @ th.randn(8 * 2000, 2, 1, generator=generator)).squeeze(-1)
    of_gaussians = 1 + math.log(2 * math.pi) + roots.logdet()
    expected = (weights * (of_gaussians - weights.log())).sum()
    entropies = maths.mixture_entropy(samples.view(8, 2000, 2))
    # Some starts leave two components within one Gaussian
    assert entropies.median().item() == pytest.approx(expected.item(), abs=0.05)
    single = maths.mixture_entropy(0.1 * th.randn(8, 2000, 2, generator=generator)).mean().item()
    truth = 1 + math.log(2 * math.pi) + 2 * math.log(0.1)
    assert truth - 0.05 < single < truth + math.log(3) + 0.05
    # Samples on bounds, and more coordinates than a component has samples
    crowded = th.randn(4, 40, 17, generator=generator).clamp(-1, 1)
    assert th.isfinite(maths.mixture_entropy(crowded)).all() and th.isfinite(maths.mixture_entropy(th.ones(2, 20, 3))).all()


# SAC-Flow


def test_the_log_density_of_a_path_is_that_of_all_its_steps() -> None:
    """By PyTorch's own densities of the points on the way, with other noise for every state."""
    model = make("sacflow", policy_kwargs=dict(sampling_steps=4))
    actor, generator = model.actor.double(), th.Generator().manual_seed(0)
    features = th.randn(50, 3, generator=generator, dtype=th.float64)
    # Small, as PyTorch's inverse of tanh is infinite far out
    noise = 0.3 * th.randn(50, actor.noise_dim, generator=generator, dtype=th.float64)
    points, velocity, std = [], actor.on_chain(features), actor.log_std(features).exp()

    def watched(x: th.Tensor, step: int) -> th.Tensor:
        points.append(x)
        return velocity(x, step)

    with th.no_grad():
        points.append(maths.noisy_flow(watched, actor.split(noise), std))
        actions, log_prob, _ = actor.sample(features, noise)
        expected = Normal(th.zeros(2, dtype=th.float64), 1.0).log_prob(points[0]).sum(dim=-1)
        for step in range(4):
            kernel = Normal(points[step] + velocity(points[step], step) / 4, std)
            end = TransformedDistribution(kernel, [TanhTransform()]) if step == 3 else kernel
            expected += end.log_prob(actions if step == 3 else points[step + 1]).sum(dim=-1)
    assert len(points) == 5 and std.std(dim=0).min() > 0.01
    assert th.allclose(actions, points[-1].tanh()) and th.allclose(actor.act(features, noise), actions)
    assert th.allclose(log_prob, expected)


def test_with_closed_gates_a_path_is_a_random_walk() -> None:
    """Its end is a Gaussian of the variance 1 + T sigma^2, and one step's density is that of a Gaussian around its start."""
    generator, std = th.Generator().manual_seed(0), th.tensor([0.3, 0.7]).double()
    noise = th.randn(5, 100_000, 2, generator=generator, dtype=th.float64).unbind()

    def closed(x: th.Tensor, step: int) -> th.Tensor:
        return maths.gated_velocity(x, gate=x.new_tensor(-math.inf), candidate=7 * x)

    end = maths.noisy_flow(closed, noise, std)
    assert th.allclose(end.var(dim=0), 1 + 4 * std.square(), rtol=0.02)
    step, of_start = maths.noisy_flow(closed, noise[:2], std), Normal(th.zeros(2, dtype=th.float64), 1.0).log_prob(noise[0])
    expected = of_start + Normal(noise[0], std).log_prob(step)
    assert th.allclose(maths.noisy_flow_log_prob(noise[:2], std.log()), expected.sum(dim=-1))


def test_an_open_gate_leads_to_its_candidate() -> None:
    """In T Euler steps of 1 / T a share (1 - 1 / T)^T of the way is left, in one step none; noise adds up as it shrinks."""
    start, target = th.tensor([0.4, -1.3]), th.tensor([-0.2, 0.5])

    def opened(x: th.Tensor, step: int) -> th.Tensor:
        return maths.gated_velocity(x, gate=x.new_tensor(100.0), candidate=target)

    for n_steps, left in ((1, 0.0), (4, 0.75**4)):
        still = [start] + n_steps * [th.zeros(2)]
        assert th.allclose(maths.noisy_flow(opened, still, th.ones(2)), target + left * (start - target))
    draws = [start, *th.eye(2).repeat(2, 1)]
    expected = target + 0.75**4 * (start - target) + 0.1 * th.tensor([0.75**3 + 0.75, 0.75**2 + 1])
    assert th.allclose(maths.noisy_flow(opened, draws, th.tensor(0.1)), expected)


def test_the_flow_starts_with_open_gates_and_bounded_noise() -> None:
    actor = SACFlow("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu").actor
    assert th.allclose(actor.times, th.tensor([1.0, 0.75, 0.5, 0.25]))
    features, x = th.randn(20, 3), th.randn(20, 2)
    gate, candidate = actor.network(features, x, actor.embed(th.ones(1, 1))).chunk(2, dim=-1)
    assert th.allclose(gate.sigmoid(), th.tensor(1 / (1 + math.exp(-5))))
    assert candidate.std() > 0.1
    assert th.allclose(actor.on_chain(features)(x, 0), gate.sigmoid() * (candidate - x), atol=1e-6)
    bounds = maths.bounded_log_std(th.tensor([-50.0, 0.0, 50.0]))
    assert bounds.tolist() == [-5, -1.5, 2]
    # The noise is the state's
    assert actor.log_std(features).std(dim=0).min() > 0.01


def test_the_gradient_of_values_and_density_through_the_flow() -> None:
    """Of what the actor descends on, against finite differences in a direction of all weights, also of the noise's network."""
    actor, generator = make("sacflow").actor.double(), th.Generator().manual_seed(0)
    features = th.randn(32, 3, generator=generator, dtype=th.float64)
    noise = th.randn(32, actor.noise_dim, generator=generator, dtype=th.float64)

    def loss() -> th.Tensor:
        actions, log_prob, _ = actor.sample(features, noise)
        return (0.2 * log_prob + (actions - 0.1).square().sum(dim=-1)).sum()

    for network in (actor.network, actor.std_network):
        slope, difference = slopes(loss, network, generator)
        assert abs(slope) > 1 and slope == pytest.approx(difference, rel=1e-4)
    # The start and every step are reached by the gradient
    leaf = noise.clone().requires_grad_()
    (of_noise,) = th.autograd.grad(actor.act(features, leaf).sum(), leaf)
    assert (of_noise.view(32, 4, 2).abs().sum(dim=(0, 2)) > 0).all()


def test_the_temperature_of_sacflow_rises_when_the_entropy_is_below_its_target() -> None:
    for target, rises in ((5.0, True), (-15.0, False)):
        model = make("sacflow", target_entropy=target, learning_starts=20).learn(12)
        entropy = model._gradient_step(model.replay_buffer.sample(8))["entropy"]
        assert (entropy < 2 * target) == (model.temperature().item() > 0.2) == rises


# FlowRL


@pytest.mark.parametrize("n_steps", [1, 3])
def test_midpoint_steps(n_steps: int) -> None:
    """Exact where the velocity is linear in time; where it is c x a step multiplies by the second-order Taylor polynomial."""
    noise, h = th.tensor([[0.5, -1.0]], dtype=th.float64), 1 / n_steps
    times = [1 - step * h / 2 for step in range(2 * n_steps)]
    end = maths.midpoint_flow(lambda x, step: th.full_like(x, 3 * times[step] - 0.7), noise, n_steps)
    assert th.allclose(end, noise - (1.5 - 0.7), atol=1e-12)
    end = maths.midpoint_flow(lambda x, step: 0.8 * x, noise, n_steps)
    assert th.allclose(end, noise * (1 - 0.8 * h + (0.8 * h) ** 2 / 2) ** n_steps, atol=1e-12)


def test_the_actor_of_flowrl_is_told_those_times_and_starts_within_the_bounds() -> None:
    actor = make("flowrl", policy_kwargs=dict(sampling_steps=2)).actor
    assert actor.times.tolist() == [1, 0.75, 0.5, 0.25]
    features = th.randn(4, 3)
    assert th.equal(actor.act(features, th.full((4, 2), 9.0)), actor.act(features, th.ones(4, 2)))
    # By hand
    x, y = th.rand(4, 2), th.ones(4, 1)
    end = x
    for t in (1.0, 0.5):
        end = end - 0.5 * actor.velocity(features, end - 0.25 * actor.velocity(features, end, t * y), (t - 0.25) * y)
    assert th.allclose(actor.act(features, x), end.tanh(), atol=1e-6)


def test_the_least_expectile_loss_is_at_the_expectile() -> None:
    """Of 0 and 1 in equal shares the expectile q is q itself: q (1 - m) = (1 - q) m."""
    values = th.tensor([0.0, 1.0], dtype=th.float64)
    for expectile in (0.9, 0.5, 0.2):
        prediction = th.tensor(expectile, dtype=th.float64, requires_grad=True)
        loss = maths.expectile_loss(values - prediction, expectile)
        (slope,) = th.autograd.grad(loss, prediction)
        assert slope.item() == pytest.approx(0, abs=1e-7)
        assert loss.item() == pytest.approx(expectile * (1 - expectile) / 2, rel=1e-6)


def test_weights_are_those_of_better_actions() -> None:
    """Actions that are worse than the policy's count as much as equal ones; the weights lie between the ends."""
    assert th.allclose(maths.constraint_weights(th.tensor([-5.0, 0.0, -1.0]), 0.1), th.tensor(0.1))
    mean = math.log(3) / 2
    expected = 0.1 * th.tensor([math.exp(-mean), 3 * math.exp(-mean)])
    assert th.allclose(maths.constraint_weights(th.tensor([-1.0, math.log(3)]), 0.1), expected)
    assert th.allclose(maths.constraint_weights(th.tensor([0.0, 80.0]), 0.1), th.tensor([0.001, 1.0]))


def test_the_gradient_through_both_evaluations() -> None:
    """Against finite differences in a direction of all weights."""
    actor, generator = make("flowrl", policy_kwargs=dict(sampling_steps=1)).actor.double(), th.Generator().manual_seed(0)
    features = th.randn(32, 3, generator=generator, dtype=th.float64)
    noise = th.randn(32, 2, generator=generator, dtype=th.float64)
    slope, difference = slopes(lambda: (actor.act(features, noise) - 0.1).square().sum(), actor.network, generator)
    assert abs(slope) > 1 and slope == pytest.approx(difference, rel=1e-4)


class Coin(RandomEnv):
    """One state, one step: 100 for a first coordinate above 0, else 0."""

    def step(self, action: np.ndarray) -> Any:
        return np.zeros(3, np.float32), 100.0 * (action[0] > 0), True, False, {}

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        return np.zeros(3, np.float32), {}


def test_the_value_of_the_buffer_is_a_high_expectile_of_its_rewards() -> None:
    """
    Of random actions, a good half of which get 100. The critics learn what each gets; the value counts those with more nine
    times.
    """
    model = make(
        "flowrl", Coin(), learning_starts=200, learning_rate=3e-3, tau=0.1, batch_size=128, policy_kwargs=dict(net_arch=[64])
    )
    model.learn(200)
    model.train(600, 128)
    policy, observations = model.policy, th.zeros(2, 3)
    values = th.cat(policy.buffer_critic(observations, th.tensor([[0.5, 0.0], [-0.5, 0.0]])), dim=1).mean(dim=1)
    share = float((model.replay_buffer.rewards[:200] > 0).mean())
    expected = 100 * 0.9 * share / (0.9 * share + 0.1 * (1 - share))
    value = policy.buffer_value(observations)[0].item() * model.return_scale.value
    print(values, value, expected)
    assert values.tolist() == pytest.approx([100, 0], abs=8)
    assert value == pytest.approx(expected, abs=4)


def test_values_of_the_buffer_stay_when_the_scale_rises() -> None:
    model = make("flowrl").learn(40)
    batch, policy = model.replay_buffer.sample(8), model.policy

    def in_units_of_return() -> tuple[th.Tensor, ...]:
        critics = (policy.buffer_critic, policy.buffer_critic_target)
        values = [critic(batch.observations, batch.actions)[0] for critic in critics]
        return *values, policy.buffer_value(batch.observations) * policy.buffer_critic.scale

    with th.no_grad():
        before, scale = in_units_of_return(), policy.buffer_critic.scale.item()
        model.return_scale.update(np.array([1e4, -1e4]))
        model.train(0)
        assert policy.buffer_critic.scale > 2 * scale
        for old, new in zip(before, in_units_of_return(), strict=True):
            assert th.allclose(old, new, rtol=1e-4, atol=1e-4)


# All of them


def test_peers_have_the_networks_of_the_package(name: str) -> None:
    """
    Actor and critics but for what the method adds: DIME's step sizes and SAC-Flow's network of the noise are not in the
    network, and SAC-Flow's has a gate beside its candidate.
    """
    peer = PEERS[name]("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu")
    som = SOM("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu")
    if name == "sacflow":
        assert peer.actor.network.output_layer.out_features == 2 * som.actor.network.output_layer.out_features
        assert [layer.out_features for layer in peer.actor.std_network.modules() if isinstance(layer, th.nn.Linear)] == [
            256,
            256,
            2,
        ]
        peer.actor.network.body[-1] = som.actor.network.body[-1]
    for network, other in ((peer.actor.network, som.actor.network), (peer.critic, som.critic)):
        assert {key: value.shape for key, value in network.state_dict().items()} == {
            key: value.shape for key, value in other.state_dict().items()
        }
        assert str(network) == str(other)
    assert (peer.tau, peer.gamma, peer.policy_delay, peer.batch_size) == (0.005, 0.99, 1, 256)
    assert (peer.lr_schedule(1), peer.actor.optimizer.param_groups[0]["betas"]) == (3e-4, (0.9, 0.999))


def test_no_mfpo_inside() -> None:
    """Peers import nothing of MFPO and SOM; both names of their package work."""
    from benchmarks.peers import PEERS as same

    assert list(same) == list(PEERS)
    files = sorted((BENCHMARKS / "peers").glob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not re.search(r"sb3_mfpo\.(mfpo|som)|sb3_mfpo import", path.read_text()), path


def test_values_have_a_gradient_for_the_actions_alone(name: str) -> None:
    model = make(name).learn(12)
    actions = th.zeros(8, 2, requires_grad=True)
    value = model._value(model.replay_buffer.sample(8).observations, actions).sum()
    value.backward()
    assert actions.grad is not None and all(parameter.grad_fn is None for parameter in model.critic.parameters())
    with frozen(model.critic):
        assert not any(parameter.requires_grad for parameter in model.critic.parameters())
    assert all(parameter.requires_grad for parameter in model.critic.parameters())


def test_a_model_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    """The same actions, sampled and best of ten, and the same training from there on."""
    model = make(name).learn(40)
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy"))
    loaded = PEERS[name].load(tmp_path / "model", env=RandomEnv(), device="cpu")
    policy = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    observations = np.random.RandomState(0).uniform(-1, 1, (5, 3)).astype(np.float32)
    for deterministic in (False, True):
        actions = []
        for one in (model, loaded, policy):
            th.manual_seed(0)
            actions.append(one.predict(observations, deterministic=deterministic)[0])
        assert np.array_equal(actions[0], actions[1]) and np.array_equal(actions[0], actions[2])
    batch = model.replay_buffer.sample(8)
    for one in (model, loaded):
        th.manual_seed(1)
        one.policy.set_training_mode(True)
        one._gradient_step(batch)
    assert_equal(model.policy.state_dict(), loaded.policy.state_dict())


def test_a_resumed_run_equals_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole = make(name).learn(40, callback=RunCheckpointCallback(25, tmp_path))
    checkpoint = next(tmp_path.glob("run_25_steps.zip"))
    resumed = PEERS[name].resume(checkpoint, RandomEnv(), device="cpu").learn(40)
    assert_equal(whole.policy.state_dict(), resumed.policy.state_dict())
    if name not in WITHOUT_TEMPERATURE:
        assert th.equal(whole.temperature.log, resumed.temperature.log)
        assert whole.temperature.log.item() != 0 or not whole.learned


# Known critics


def load_toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("multimodal", BENCHMARKS.parent / "examples" / "multimodal.py")
    assert spec is not None and spec.loader is not None
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    toy.ALGORITHMS.update(
        DIME=(DIME, dict(ent_coef=1.0, target_cost=None)),
        MaxEntDP=(MaxEntDP, dict(ent_coef=1.0, n_samples=64, n_entropy_draws=1)),
        # A step of the scale at every fourth update instead of every 10 000th
        DACER=(DACER, dict(entropy_interval=4, n_entropy_samples=50)),
        SACFlow=(SACFlow, dict(ent_coef=1.0, target_entropy=None)),
        FlowRL=(FlowRL, {}),
    )
    return toy


@th.no_grad()
def samples_of(model: Any, n: int = 5000) -> th.Tensor:
    th.manual_seed(0)
    return th.as_tensor(model.predict(np.zeros((n, 1), np.float32), deterministic=False)[0])


def train_on(toy: ModuleType, algorithm: str, target: Any, updates: int, seed: int = 0, **kwargs: Any) -> Any:
    policy_kwargs = dict(net_arch=[64, 64], sampling_steps=kwargs.pop("sampling_steps"))
    return toy.train(algorithm, target, updates, seed, device="cpu", policy_kwargs=policy_kwargs, **kwargs)


@pytest.mark.parametrize(("algorithm", "updates", "strays"), [("DIME", 350, 0.4), ("MaxEntDP", 250, 0.3)])
def test_maximum_entropy_peers_find_six_modes(algorithm: str, updates: int, strays: float) -> None:
    """Untrained they have none, and nine of ten samples are strays; a collapsed policy would have one."""
    toy = load_toy()
    target = toy.TARGETS["six modes"]
    settings = dict(learning_rate=3e-3, batch_size=128, sampling_steps=8)
    untrained, trained = (
        toy.evaluate(target, samples_of(train_on(toy, algorithm, target, n, **settings)), None) for n in (1, updates)
    )
    print(algorithm, untrained, trained)
    assert untrained["modes"] == 0 and untrained["strays"] > 0.85
    assert trained["modes"] == 6 and trained["strays"] < strays and trained["sliced_wasserstein"] < 0.1


def test_dacer_finds_the_peak_with_the_entropy_of_its_target() -> None:
    """
    Nothing in its loss rewards entropy: it finds a peak, and its noise gives the policy the entropy -0.9 d, which for a
    Gaussian is the standard deviation 0.098. The noise begins with 0.3; an untrained policy is in the corners.
    """
    toy = load_toy()
    target = toy.Mixture(th.tensor([[0.3, -0.2]]), 0.2, th.zeros(1, dtype=th.long))
    settings = dict(learning_rate=1e-3, batch_size=64, sampling_steps=20)
    actions = samples_of(train_on(toy, "DACER", target, 200, **settings))
    print(actions.mean(dim=0), actions.std(dim=0))
    assert th.allclose(actions.mean(dim=0), target.means[0], atol=0.05)
    assert 0.05 < actions.std(dim=0).min() and actions.std(dim=0).max() < 0.13


@pytest.mark.parametrize("n_steps", [1, 4])
def test_the_noise_of_sacflow_fits_a_peak(n_steps: int) -> None:
    """
    The noise of each step is rewarded with ln sigma. For Q the log-density of N(m, s^2), E[Q] + T ln sigma is greatest where
    the noise brings the action a variance of T s^2, whatever the velocity. With one step that is the density itself.
    """
    toy, std = load_toy(), 0.05
    target = toy.Mixture(th.tensor([[0.3, -0.2]]), std, th.zeros(1, dtype=th.long))
    settings = dict(learning_rate=3e-3, batch_size=128, sampling_steps=n_steps)
    actions = samples_of(train_on(toy, "SACFlow", target, 300, **settings))
    print(actions.mean(dim=0), actions.std(dim=0))
    assert th.allclose(actions.mean(dim=0), target.means[0], atol=0.01)
    assert th.allclose(actions.std(dim=0), th.tensor(std * n_steps**0.5), rtol=0.1)


def test_sacflow_keeps_one_of_six_modes() -> None:
    """At the temperature 1 / T, which fits the width of a mode: the path's entropy does not reward that there are six."""
    toy = load_toy()
    target = toy.TARGETS["six modes"]
    settings = dict(learning_rate=3e-3, batch_size=128, sampling_steps=4, ent_coef=1 / 4)
    trained = toy.evaluate(target, samples_of(train_on(toy, "SACFlow", target, 350, **settings)), None)
    print(trained)
    assert trained["modes"] == 1 and trained["strays"] < 0.05


def test_flowrl_finds_the_peak() -> None:
    """Nothing in its loss rewards entropy: of the noise little is left. An untrained policy is everywhere."""
    toy = load_toy()
    target = toy.Mixture(th.tensor([[0.3, -0.2]]), 0.2, th.zeros(1, dtype=th.long))
    settings = dict(learning_rate=1e-3, batch_size=64, sampling_steps=1)
    untrained, actions = (samples_of(train_on(toy, "FlowRL", target, n, **settings)) for n in (1, 300))
    print(actions.mean(dim=0), actions.std(dim=0), untrained.std(dim=0))
    assert untrained.std(dim=0).min() > 0.3
    assert th.allclose(actions.mean(dim=0), target.means[0], atol=0.05) and actions.std(dim=0).max() < 0.1


class Repeat(IdentityEnvBox):
    """Costs the squared distance between action and observation: -67 for 100 random actions, -33 for zeros."""

    def _get_reward(self, action: np.ndarray) -> float:
        return -float(np.square(self.state - action).sum())


def test_peers_learn_to_repeat_what_they_see(name: str) -> None:
    """DACER with all of its steps and scalar critics: with C51, which is slow to tell actions apart, it stays at a bound."""
    kwargs: dict[str, Any] = dict(learning_rate=1e-3, gamma=0.0, learning_starts=100, batch_size=64, tau=0.05)
    policy_kwargs: dict[str, Any] = dict(net_arch=[64])
    if name == "dacer":
        kwargs["learning_rate"] = 3e-4
        policy_kwargs |= dict(sampling_steps=20, critic_type="scalar", noise_scale=1.0)
    elif name not in WITHOUT_TEMPERATURE:
        kwargs["ent_coef"] = 0.02
    model = make(name, Repeat(), policy_kwargs=policy_kwargs, **kwargs).learn(350)
    th.manual_seed(0)
    sample, best = (evaluate_policy(model, Repeat(), 3, deterministic=mode, warn=False)[0] for mode in (False, True))
    print(name, sample, best)
    assert min(sample, best) > -15


@pytest.mark.parametrize("deterministic, rows", [(False, 1), (True, 10)])
def test_an_action_takes_all_steps(name: str, deterministic: bool, rows: int) -> None:
    """As many evaluations of the actor as the method has steps, one after the other, for ten candidates at once."""
    model = PEERS[name]("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu")
    seen: list[int] = []
    body = model.actor_target.network.body
    body.register_forward_hook(lambda module, inputs, output: seen.append(output[..., 0].numel()))
    model.predict(model.observation_space.sample(), deterministic=deterministic)
    assert seen == [rows] * {"dime": 16, "maxentdp": 20, "dacer": 20, "sacflow": 4, "flowrl": 2}[name]


def test_the_command_for_the_cost(tmp_path: Path) -> None:
    """That it works, not how fast anything is."""
    arguments = ["--quick", "--env", "Pendulum-v1", "--output", str(tmp_path / "out" / "cost.csv")]
    table = peers_cost.main(arguments)
    written = pd.read_csv(tmp_path / "out" / "cost.csv")
    assert len(written) == len(table) == 6 * 9 and (written["milliseconds"] > 0).all()
    assert not written.duplicated(["what", "batch", "algorithm"]).any()
    samples = written[written["what"] == "sample"].set_index("algorithm")
    assert samples.loc["DACER", ["passes", "chain"]].eq(20).all(axis=None)
    # The network of the noise is asked once, beside the first step
    flow = samples.loc["SAC-Flow (Flow-G)"]
    assert flow["passes"].eq(5).all() and flow["chain"].eq(4).all()
    assert samples.drop(index="SAC-Flow (Flow-G)").eval("passes == chain").all()
    choices = written[written["what"] == "chosen action"]
    assert choices[["ratio to MFPO: sample", "ratio to MFPO: chosen action"]].notna().all(axis=None)
    assert (written[written["what"] == "learn"]["ratio to MFPO"] > 0).all()


@pytest.mark.nightly
def test_the_cost_of_compiled_steps(tmp_path: Path) -> None:
    arguments = ["--quick", "--compiled", "--algorithms", "MFPO", "SAC", "--env", "Pendulum-v1"]
    table = peers_cost.main([*arguments, "--output", str(tmp_path / "cost.csv")])
    assert set(table["what"]) == {"gradient step", "learn"} and len(table) == 2 * 2


def test_the_cost_is_told_in_mfpos(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers_cost.main(["--algorithms", "SAC", "DIME"])
    assert "`--algorithms` must have MFPO" in capsys.readouterr().err


@pytest.mark.parametrize("algo", ["dime", "sacflow"])
def test_the_zoos_command_trains_and_resumes_a_peer(algo: str, tmp_path: Path) -> None:
    """As a suite calls it: half of a run first, of which the checkpoint stays, then the whole."""
    policy_kwargs = dict(net_arch=[8], sampling_steps=2)
    params = dict(learning_starts=50, batch_size=16, buffer_size=1000, policy_kwargs=policy_kwargs)
    half = suites.Run("a peer", "Pendulum-v1", seed=0, algo=algo, steps=100, every=100, episodes=1, params=params)
    folder = suites.folder_of(half, tmp_path)
    environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent}"}
    subprocess.run(suites.command_of(half, folder, "cpu"), env=environment, check=True, capture_output=True)
    assert (folder / "run_100_steps.zip").exists()
    rows = suites.train(replace(half, steps=200), tmp_path)
    assert list(rows["step"]) == [100, 100, 200, 200] and np.isfinite(rows["return"]).all()
    assert "Going on with the run in" in (folder / "log.txt").read_text()
    assert PEERS[algo].load(folder / algo / "Pendulum-v1_2" / "Pendulum-v1.zip").num_timesteps == 200


def test_arguments_out_of_range_are_named() -> None:
    mistakes: list[tuple[str, dict[str, Any], str]] = [
        ("dime", dict(ent_coef=0.0), "ent_coef"),
        ("dime", dict(policy_kwargs=dict(prior_std=-1.0)), "prior_std"),
        ("dime", dict(policy_kwargs=dict(sampling_steps=0)), "sampling_steps"),
        ("maxentdp", dict(n_samples=0), "n_samples"),
        ("maxentdp", dict(target_entropy=math.nan), "target_entropy"),
        ("dacer", dict(entropy_interval=0), "entropy_interval"),
        ("dacer", dict(policy_kwargs=dict(noise_scale=0.0)), "noise_scale"),
        ("sacflow", dict(target_entropy=math.inf), "target_entropy"),
        ("flowrl", dict(expectile=0.0), "expectile"),
        ("flowrl", dict(constraint_factor=-0.1), "constraint_factor"),
    ]
    for name, kwargs, message in mistakes:
        with pytest.raises(ValueError, match=f"`{message}`"):
            make(name, **kwargs)
