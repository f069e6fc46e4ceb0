"""What SOM has beyond the other algorithms: one step, values in units of their spread, the recipe's switches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_mfpo import SOM
from sb3_mfpo.maths import boltzmann
from sb3_mfpo.som.som import PATHS
from tests.helpers import RandomEnv, make_model


def test_defaults_are_the_verified_form() -> None:
    """The verified form: linear path, posterior mean, plain loss, scores as they are, one step."""
    model = SOM("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu")
    assert (model.path, model.score_estimator, model.score_norm, model.adaptive_loss) == (
        "linear",
        "posterior_mean",
        None,
        False,
    )
    assert (model.intervals, model.equal_time_share, model.uniform_time_share) == ("any", 0.25, 1.0)
    assert model.normalize_q is True
    assert (model.inverse_temperature, model.n_samples) == (30.0, 32)
    assert (model.critic_reduction, model.policy_delay, model.target_update_interval) == ("min", 4, 1)
    assert (model.policy.sampling_steps, model.policy.n_action_candidates) == (1, 10)


@pytest.mark.parametrize("deterministic, rows", [(False, 1), (True, 10)])
def test_an_action_takes_one_evaluation(deterministic: bool, rows: int) -> None:
    """Of the actor: one row for a sample, one batch for the best of ten. The critics see the candidates in one batch too."""
    model = make_model(SOM).learn(12)
    batches: dict[str, list[int]] = {"actor": [], "critic": []}
    for name, network in (("actor", model.actor_target.network), ("critic", model.critic_target.q_networks[0])):
        network.body.register_forward_hook(
            lambda module, inputs, output, name=name: batches[name].append(output[..., 0].numel())
        )
    model.predict(model.observation_space.sample(), deterministic=deterministic)
    assert batches == {"actor": [rows], "critic": [rows] if deterministic else []}


def test_one_step_is_noise_minus_velocity() -> None:
    model = make_model(SOM)
    features, noise = th.randn(5, 3), 0.1 * th.randn(5, 2)
    one = th.ones(5, 1)
    with th.no_grad():
        expected = (noise - model.actor.network(features, noise, model.actor.network.embed(one, one))).clamp(-1, 1)
        assert th.allclose(model.policy.act(features, noise), expected, atol=1e-6)


def posterior_mean(model: SOM, scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> th.Tensor:
    """Mean action at some points, with the critics' values scaled and shifted."""
    th.manual_seed(seed)
    draws = model._draw(16)
    mu, sigma = PATHS[model.path][0](draws.actor.t)
    values = type(model.critic).q_values
    model.critic.q_values = lambda *args: scale * values(model.critic, *args) + shift  # type: ignore[method-assign]
    result, _ = model._posterior_mean(th.randn(16, 3), draws.actor.noise, mu, sigma, draws.proposals)
    return result


@pytest.mark.parametrize("score_estimator", ["posterior_mean", "gradient"])
def test_scaling_and_shifting_values_does_not_change_the_mean_action(score_estimator: str) -> None:
    model = make_model(SOM, score_estimator=score_estimator, inverse_temperature=3.0, n_samples=20, seed=0)
    expected = posterior_mean(model)
    assert expected.abs().max() > 0.1
    for scale, shift in ((1000.0, 0.0), (1e-3, 0.0), (1.0, 50.0)):
        # Rounding of the shifted values
        assert th.allclose(posterior_mean(model, scale, shift), expected, rtol=1e-3, atol=1e-3)
    model.inverse_temperature = 6.0
    assert not th.allclose(posterior_mean(model), expected, rtol=1e-2)


@pytest.mark.parametrize("score_estimator", ["posterior_mean", "gradient"])
def test_without_normalisation_only_the_product_with_the_temperature_matters(score_estimator: str) -> None:
    model = make_model(SOM, score_estimator=score_estimator, normalize_q=False, inverse_temperature=4.0, seed=0)
    expected = posterior_mean(model)
    model.inverse_temperature = 1.0
    assert th.allclose(posterior_mean(model, scale=4.0), expected, rtol=1e-3, atol=1e-4)
    assert not th.allclose(posterior_mean(model), expected, rtol=1e-2)


@pytest.mark.parametrize("score_estimator", ["posterior_mean", "gradient"])
def test_equal_values_give_the_score_of_the_box(score_estimator: str) -> None:
    """No division by a spread of zero: all actions weigh the same. Gradients do not see the box."""
    model = make_model(SOM, score_estimator=score_estimator, inverse_temperature=1e6)
    # A value of 0 everywhere: no rounding, no gradient
    result = posterior_mean(model, scale=0.0)
    assert th.isfinite(result).all()
    if score_estimator == "gradient":
        th.manual_seed(0)
        draws = model._draw(16)
        # A score of zero
        assert th.allclose(result, draws.actor.noise / (1 - draws.actor.t), rtol=1e-5)
    else:
        assert (result.abs() < 1).all()


VARIANTS: list[dict[str, Any]] = [
    {},
    dict(path="vp"),
    dict(score_norm=2.0),
    dict(adaptive_loss=True),
    dict(intervals="any", uniform_time_share=0.0, equal_time_share=0.75),
    dict(score_estimator="gradient"),
    dict(path="vp", score_estimator="gradient", score_norm=2.0, adaptive_loss=True),
]


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_the_loss_is_that_of_the_equations(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Written straight from them: derivatives by ``th.func.jvp``, estimates sample by sample."""
    model = make_model(SOM, seed=0, inverse_temperature=2.0, **kwargs)
    model.learn(10)
    batch = model.replay_buffer.sample(8)
    observations = batch.observations
    th.manual_seed(1)
    draws = model._draw(8)
    losses: dict[str, th.Tensor] = {}
    # Nothing is updated: the loss itself is kept
    monkeypatch.setattr(model, "_descend", lambda name, loss, optimizer: losses.setdefault(name, loss))
    model._update(batch, draws)
    loss = losses["actor_loss"]

    t, r, _, noise = draws.actor
    mu, sigma = PATHS[model.path][0](t)
    one = th.ones(8, 1)
    actions = (
        (draws.policy_noise - model.actor.network(observations, draws.policy_noise, model.actor.network.embed(one, one)))
        .clamp(-1, 1)
        .detach()
    )
    noisy = mu * actions + sigma * noise
    if model.score_estimator == "gradient":
        proposals = (noisy[:, None] - sigma[:, None] * draws.proposals) / mu[:, None]
    else:
        proposals = boltzmann.gaussian_proposal(noisy, mu, sigma, draws.proposals)
    proposals.requires_grad_()
    columns = [th.cat(model.critic(observations, proposals[:, k]), dim=1).min(dim=1).values for k in range(5)]
    log_p = 2.0 * th.stack(columns, dim=1)
    log_p = log_p / (log_p.detach().std(correction=0) / 2.0)
    weights = log_p.softmax(dim=1).detach()[..., None]
    if model.score_estimator == "gradient":
        scores = (weights * th.autograd.grad(log_p.sum(), proposals)[0]).sum(1) / mu
    else:
        scores = (mu * (weights * proposals).sum(1) - noisy) / sigma**2
    if model.score_norm is not None:
        scores = 2.0 * scores / scores.norm(dim=1, keepdim=True)
    if model.path == "linear":
        velocity = -(noisy + t * scores) / (1 - t)
    else:
        velocity = -0.5 * (0.1 + 19.9 * t) * (noisy + scores)
    velocity = velocity.detach()

    def average(noisy: th.Tensor, t: th.Tensor) -> th.Tensor:
        return model.actor.network(observations, noisy, model.actor.network.embed(t, t - r))

    output, derivative = th.func.jvp(average, (noisy, t), (velocity, one))
    errors = output - (velocity - (t - r) * derivative).detach()
    squared = errors.square()
    if model.adaptive_loss:
        squared = squared / (squared.detach().sum(1, keepdim=True) + 1e-3)
    assert loss.item() == pytest.approx(squared.mean().item(), rel=1e-3)
    # The gradient is that of the regression
    expected = th.autograd.grad(squared.mean(), list(model.actor.network.parameters()))
    actual = th.autograd.grad(loss, list(model.actor.network.parameters()))
    for one_gradient, other in zip(actual, expected, strict=True):
        assert th.allclose(one_gradient, other, rtol=1e-2, atol=1e-4 * other.abs().max().item())


def test_the_backup_has_no_entropy_bonus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next actions are samples of the policy as it is, and their values stand alone."""
    model = make_model(SOM, seed=0).learn(12)
    calls = []
    bellman_target = model.critic_target.bellman_target
    monkeypatch.setattr(model.critic_target, "bellman_target", lambda *args: calls.append(args) or bellman_target(*args))
    batch = model.replay_buffer.sample(8)
    draws = model._draw(8)
    with th.no_grad():
        next_actions = model.policy.act(model.actor.encode(batch.next_observations), draws.next_noise)
        expected = model.critic_target(batch.next_observations, next_actions, raw=True)
    model._update(batch, draws)
    ((outputs, rewards, discounts, entropy_bonus, _),) = calls
    assert th.allclose(outputs, expected, atol=1e-6)
    assert entropy_bonus.item() == 0
    assert th.equal(rewards, batch.rewards)
    assert th.allclose(discounts, (1 - batch.dones) * model.gamma)


def test_changed_settings_take_effect_at_the_next_gradient_step() -> None:
    """Nothing is fixed at construction: the next gradient step follows."""
    model = make_model(SOM, seed=0).learn(12)
    model.n_samples, model.path = 9, "vp"
    assert model._draw(8).proposals.shape == (8, 9, 2)
    model.train(1, batch_size=8)
    assert np.isfinite(model.logger.name_to_value["train/actor_loss"])
