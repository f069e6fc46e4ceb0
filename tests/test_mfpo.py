"""What MFPO has beyond the other algorithms: log-probabilities, a divergence network, a temperature."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_mfpo import MFPO
from sb3_mfpo.maths.mean_flow import few_step_sample
from sb3_mfpo.mfpo.mfpo import LOCAL_STD
from sb3_mfpo.nets.flow import embed_grid
from tests.helpers import RandomEnv, make_model


def test_defaults() -> None:
    model = MFPO("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu")
    assert model.target_entropy == -0.5 * 2
    assert make_model(MFPO, target_entropy="auto_0.3").target_entropy == pytest.approx(-0.3 * 2)
    assert make_model(MFPO, target_entropy=0.7).target_entropy == 0.7
    assert model._temperature().item() == pytest.approx(0.01)
    assert (model.n_policy_samples, model.n_gaussian_samples, model.n_local_samples) == (0, 6, 6)
    assert (model.n_probes, model.ent_coef_rate, model.actor_rate, model.actor_tau) == (2, 12.0, 3.0, 0.04)
    assert (model.intervals, model.equal_time_share, model.uniform_time_share) == ("grid", 0.5, 0.5)
    assert (model.time_mean, model.time_std) == (-0.4, 1.0)
    assert (model.critic_reduction, model.policy_delay, model.target_update_interval) == ("min", 8, 1)
    policy = model.policy
    assert (policy.sampling_steps, policy.n_action_candidates, len(policy.critic.q_networks)) == (2, 10, 2)
    # Values start around 0, in a range that follows the returns
    assert th.equal(policy.critic.atoms, th.linspace(-20, 20, 101)) and policy.v_min is None
    assert (policy.value_init, policy.value_range) == ("narrow", 20.0)
    assert policy.net_arch == [256, 256]
    assert policy.actor.sampling_times.tolist() == [1, 0.25, 0]
    assert policy.action_fourier_std == 0.5
    # [action, its features, state, time] and [state, action], two hidden layers
    assert policy.actor.network.input_layer.weight.shape == (256, 2 + 32 + 3 + 64)
    assert [m.out_features for m in policy.critic.q_networks[0].body if isinstance(m, nn.Linear)] == [256, 101]


def test_the_papers_settings() -> None:
    model = MFPO("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu", **MFPO.PAPER)
    # No other proposals, the entropy by the divergence network, one learning rate, no average
    assert (model.n_policy_samples, model.n_gaussian_samples, model.n_local_samples) == (16, 32, 0)
    assert (model.n_probes, model.ent_coef_rate, model.actor_rate, model.actor_tau) == (2, None, 1.0, 1.0)
    assert model.policy_delay == 1
    # Logit-normal pairs, a quarter of them with r < t
    assert (model.intervals, model.equal_time_share, model.uniform_time_share) == ("any", 0.75, 0.0)
    assert (model.time_mean, model.time_std, model.critic_reduction) == (-0.4, 1.0, "min")
    policy = model.policy
    assert th.equal(policy.critic.atoms, th.linspace(-1600, 1600, 101)) and policy.value_init == "uniform"
    assert policy.net_arch == [256, 256, 256]
    # Equal steps, [action, state, time]
    assert policy.actor.sampling_times.tolist() == [1, 0.5, 0]
    assert policy.actor.network.input_layer.weight.shape == (256, 2 + 3 + 64)
    assert policy.divergence.input_layer.weight.shape == (256, 2 + 3 + 64)


def test_policy_and_temperature_learn_at_rates_of_their_own() -> None:
    """Whatever the learning rate's schedule says, as many times as much."""
    rates = dict(learning_rate=lambda remaining: 1e-3 * (1 + remaining), actor_rate=2.0, ent_coef_rate=4.0)
    model = make_model(MFPO, **rates).learn(10)
    for progress in (1.0, 0.5, 0.0):
        model._current_progress_remaining = progress
        model._update_learning_rate(model._optimizers())
        found = [group["lr"] for optimizer in model._optimizers() for group in optimizer.param_groups]
        # Actor, critics, divergence network, temperature
        assert found == pytest.approx([factor * (1 + progress) for factor in (2e-3, 1e-3, 2e-3, 4e-3)])


@pytest.mark.parametrize(
    ("rate", "distance", "expected"),
    [(4.0, 0.15, 1e-3), (4.0, -0.3, -2e-3), (4.0, -9.0, -4e-3), (None, 1.0, 1e-3), (None, -0.15, -1e-3)],
)
def test_a_step_of_the_temperature(rate: float | None, distance: float, expected: float) -> None:
    """In two coordinates: its full length from 0.6 nats on, in proportion below; Adam's first step has one length."""

    def trained(target_entropy: float) -> MFPO:
        kwargs = dict(learning_rate=1e-3, ent_coef_rate=rate, ent_coef="auto_0.1", target_entropy=target_entropy)
        return make_model(MFPO, seed=0, policy_delay=1, **kwargs).learn(11)

    # The step comes after the entropy was taken, which therefore does not depend on the target
    entropy = trained(0.0).logger.name_to_value["train/entropy"]
    step = trained(entropy - distance).log_ent_coef.item() - math.log(0.1)
    assert step == pytest.approx(-expected, rel=1e-2)


def test_the_temperature_falls_no_faster_than_the_estimate_can_follow() -> None:
    """At an effective sample size of 1 not at all, from 2 on in full; it always rises in full."""
    model = make_model(MFPO, target_entropy=0.0, ent_coef_rate=6.0)
    for sample_size, entropy, expected in (
        (1.0, 5.0, 0.0),
        (1.3, 5.0, 0.3),
        (1.3, 0.12, 0.2),
        (2.0, 5.0, 1.0),
        (7.0, 5.0, 1.0),
        (1.0, -5.0, -1.0),
        (1.0, -0.12, -0.2),
    ):
        loss = model._temperature_loss(th.tensor(entropy), th.tensor(sample_size), 2)
        (step,) = th.autograd.grad(loss, model.log_ent_coef)
        assert step.item() == pytest.approx(expected, abs=1e-6)


def test_local_proposals_follow_the_policy_where_actions_have_many_coordinates() -> None:
    """Each surrounds an action of its own, and all of them together are what the weights are made for."""
    model = make_model(MFPO, seed=0, n_policy_samples=0, n_gaussian_samples=3, n_local_samples=4)
    centres = 2 * th.rand(5, 4, 2) - 1
    noisy, t = th.randn(5, 2), th.full((5, 1), 0.9)
    actions, log_weights = model._gaussian_proposals(noisy, centres, t, th.rand(5, 7, 2))
    assert actions.shape == (5, 7, 2)
    assert isinstance(log_weights, th.Tensor) and log_weights.shape == (5, 7)
    assert th.all((actions[:, 3:] - centres).abs() < 6 * LOCAL_STD)
    # An action that several proposals could have made counts for less
    crowded = model._gaussian_proposals(noisy, centres[:, :1].expand(-1, 4, -1), t, th.rand(5, 7, 2))[1]
    assert isinstance(crowded, th.Tensor)
    assert th.all(crowded[:, 3:].mean(1) < log_weights[:, 3:].mean(1))


def test_action_log_prob_returns_actions_and_log_probabilities() -> None:
    model = make_model(MFPO)
    obs, _ = model.policy.obs_to_tensor(th.randn(5, 3).numpy())
    noise = th.randn(5, 2)
    actions, log_prob = model.policy.action_log_prob(obs)
    assert actions.shape == (5, 2) and log_prob.shape == (5,)
    assert actions.abs().max() <= 1
    assert th.equal(model.policy(obs, deterministic=True), model.policy._predict(obs, deterministic=True))
    first, second = model.policy.action_log_prob(obs, noise), model.policy.action_log_prob(obs, noise)
    assert th.equal(first[0], second[0]) and th.equal(first[1], second[1])


def at_state(network: Any, features: th.Tensor, times: th.Tensor) -> Callable[[th.Tensor, int], th.Tensor]:
    intervals = embed_grid(network, times)
    return lambda actions, k: network(features, actions, intervals[k])


def test_log_probability_integrates_to_one_with_exact_divergence() -> None:
    """
    A fine solve with the exact divergence is a normalised density: E_pi[q / pi] = 1 for any density q, here N(0, 0.5^2)
    on the actions before the clip.
    """
    model = make_model(
        MFPO, policy_kwargs=dict(divergence_type="exact", actor_type="flow_matching", sampling_steps=50), seed=0
    )
    policy = model.policy
    n = 20_000
    noise = th.randn(n, 2, generator=th.Generator().manual_seed(0))
    features = policy.actor.encode(th.zeros(1, 3))
    with th.no_grad():
        networks = (policy.actor.network, policy.divergence)
        velocity, divergence = (at_state(network, features, policy.actor.sampling_times) for network in networks)
        actions, log_prob = few_step_sample(velocity, noise, policy.actor.sampling_times, divergence)
    reference = th.distributions.Normal(0.0, 0.5).log_prob(actions).sum(-1)
    ratio = (reference - log_prob).exp()
    assert abs(ratio.mean().item() - 1) < 4 * (ratio.std() / n**0.5).item() + 0.01


def test_flow_matching_ignores_the_interval() -> None:
    model = make_model(MFPO, policy_kwargs=dict(actor_type="flow_matching"))
    t = th.rand(4, 1)
    assert th.equal(model.actor.network.embed(t, t), model.actor.network.embed(t, 0 * t))
    draws = model._draw(8)
    assert (draws.actor.t == draws.actor.r).all()
    assert (draws.divergence.t[6:] > draws.divergence.r[6:]).all()


def test_without_divergence_network_nothing_of_it_is_trained() -> None:
    model = make_model(MFPO, policy_kwargs=dict(divergence_type="exact"))
    assert not list(model.divergence.parameters())
    assert "divergence.optimizer" not in model.get_parameters()
    # d = 2: the exact trace by automatic differentiation of the velocity itself
    features, point, t = th.randn(1, 3), th.randn(1, 2), th.full((1, 1), 0.6)
    interval = model.actor.network.embed(t, th.zeros_like(t))
    jacobian = th.autograd.functional.jacobian(lambda a: model.actor.network(features, a, interval)[0], point)[:, 0]
    assert th.allclose(model.divergence(features, point, t).squeeze(), jacobian.trace(), atol=1e-5)


def test_temperature_is_saved_learned_or_fixed() -> None:
    for ent_coef, name in (("auto_0.01", "log_ent_coef"), (0.1, "ent_coef_tensor")):
        assert make_model(MFPO, ent_coef=ent_coef)._get_torch_save_params()[1] == [name]


@pytest.mark.parametrize("divergence_type", ["mean_flow", "exact"])
def test_the_divergence_of_a_copied_policy_is_that_of_its_own_actor(divergence_type: str) -> None:
    model = make_model(MFPO, policy_kwargs=dict(divergence_type=divergence_type))
    twin = copy.deepcopy(model)
    obs, noise = th.randn(5, 3), th.randn(5, 2)
    _, before = model.policy.action_log_prob(obs, noise)
    for parameter in twin.actor_target.parameters():
        parameter.data.mul_(2)
    assert th.equal(model.policy.action_log_prob(obs, noise)[1], before)
    features, point, t = th.randn(1, 3), th.randn(1, 2), th.full((1, 1), 0.5)
    first, second = (network(features, point, network.embed(t, t)) for network in (model.divergence, twin.divergence))
    changed = not th.equal(first, second)
    assert changed == (divergence_type == "exact")


@pytest.mark.parametrize("rates", [(12.0, None), (None, 12.0)], ids=str)
def test_a_loaded_temperature_may_learn_in_another_way(rates: tuple[float | None, float | None], tmp_path: Path) -> None:
    before, after = rates
    model = make_model(MFPO, seed=0, ent_coef_rate=before).learn(30)
    model.save(tmp_path / "model")
    loaded = MFPO.load(tmp_path / "model", env=RandomEnv(), ent_coef_rate=after, device="cpu")
    assert loaded.log_ent_coef == model.log_ent_coef
    loaded.learn(20, reset_num_timesteps=False)
    assert isinstance(loaded.ent_coef_optimizer, th.optim.Adam if after is None else th.optim.SGD)
    assert loaded.log_ent_coef != model.log_ent_coef
