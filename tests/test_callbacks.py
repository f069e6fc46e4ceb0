"""HealthCallback: every quantity, on a model for which it is known."""

import copy
import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import configure

from sb3_mfpo import MFPO, HealthCallback
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm
from tests.helpers import Algorithm, RandomEnv, make_model


def check(model: MeanFlowAlgorithm, **kwargs: Any) -> dict[str, float]:
    callback = HealthCallback(**{"max_bias": 1e6, **kwargs})
    callback.init_callback(model)
    return callback.check()


def test_the_exact_divergence_shows_no_bias() -> None:
    """Prediction and check then do the same computation."""
    policy_kwargs = dict(divergence_type="exact", actor_type="flow_matching", sampling_steps=7)
    result = check(make_model(MFPO, policy_kwargs=policy_kwargs, seed=0).learn(30), solver_steps=7)
    assert result["log_prob_bias"] == pytest.approx(0, abs=1e-5)
    assert result["log_prob_error"] == pytest.approx(0, abs=1e-5)


def test_a_constant_added_to_the_divergence_shows_as_bias() -> None:
    """The steps' lengths sum up to one: a constant added to the divergence is added to the log-probability."""
    model = make_model(MFPO, seed=0).learn(30)
    before = check(model)
    with th.no_grad():
        model.divergence.body[-1].bias += 2.5
    after = check(model)
    assert after["log_prob_bias"] - before["log_prob_bias"] == pytest.approx(2.5, abs=1e-4)


def test_the_euler_solve_has_converged() -> None:
    """Against a solve with ten times the steps; the divergence network of a fresh model is off by more."""
    model = make_model(MFPO, seed=0).learn(30)
    features, noise = th.randn(50, 3), th.randn(50, 2)
    with th.no_grad():
        (actions, log_prob), (fine_actions, fine_log_prob) = (model.policy.solve(features, noise, n) for n in (100, 1000))
        _, network_log_prob = model.policy.sample(features, noise)
    assert (actions - fine_actions).abs().max() < 0.02
    assert (log_prob - fine_log_prob).abs().mean() < 0.02
    assert (network_log_prob - fine_log_prob).abs().mean() > 0.1


def test_dead_units_actions_at_bounds_and_saturated_values_are_counted(algorithm: Algorithm) -> None:
    model = make_model(algorithm, seed=0).learn(30)
    healthy = check(model)
    assert ("log_prob_bias" in healthy) == (algorithm is MFPO)
    assert healthy["dead_units_actor"] == healthy["dead_units_critic"] == 0
    assert 0 <= healthy["critic_saturation"] < 0.5 and healthy["actions_at_bounds"] < 1
    with th.no_grad():
        # The layers have 16 and 12 units: 4 of 28 in the actor, 3 of the 56 in both critics
        for network, n in ((model.actor_target.network, 4), (model.critic.q_networks[0], 3)):
            network.body[0].weight[:n] = 0
        model.actor_target.network.body[-1].bias.fill_(-100)
        for q_network in model.critic.q_networks:
            q_network.body[-1].weight.zero_()
            q_network.body[-1].bias.copy_(th.tensor([np.log(3.0)] + [0.0] * 9 + [np.log(2.0)]))
    result = check(model)
    assert result["dead_units_actor"] == pytest.approx(4 / 28)
    assert result["dead_units_critic"] == pytest.approx(3 / 56)
    assert result["actions_at_bounds"] == 1
    # Weights 3, 2 and nine times 1
    assert result["critic_saturation"] == pytest.approx(5 / 14)


@pytest.mark.parametrize("critic_type", ["categorical", "scalar"])
def test_the_callback_does_not_change_training(algorithm: Algorithm, critic_type: str, tmp_path: Path) -> None:
    policy_kwargs = dict(critic_type=critic_type)
    callback = HealthCallback(check_freq=7, n_states=5, solver_steps=3, max_bias=1e6)
    watched = make_model(algorithm, seed=0, policy_kwargs=policy_kwargs)
    watched.set_logger(configure(str(tmp_path), ["csv"]))
    watched.learn(60, callback=callback)
    alone = make_model(algorithm, seed=0, policy_kwargs=policy_kwargs).learn(60)
    for one, other in zip(watched.policy.parameters(), alone.policy.parameters(), strict=True):
        assert th.equal(one, other)
    with (tmp_path / "progress.csv").open() as file:
        logged = {name.removeprefix("health/") for name in next(csv.reader(file)) if name.startswith("health/")}
    expected = {"actions_at_bounds", "dead_units_actor", "dead_units_critic"}
    if algorithm is MFPO:
        expected |= {"log_prob_bias", "log_prob_error"}
    assert logged == expected | ({"critic_saturation"} if critic_type == "categorical" else set())


def test_a_check_changes_no_mode_and_no_weight() -> None:
    model = make_model(MFPO, seed=0).learn(30)
    before = copy.deepcopy(model.policy.state_dict())
    for mode in (True, False):
        model.policy.set_training_mode(mode)
        check(model)
        assert model.policy.training == model.actor.training == mode and not model.actor_target.training
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())


def test_checks_come_at_the_given_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before training has begun."""
    steps: list[int] = []
    callback = HealthCallback(check_freq=4)
    monkeypatch.setattr(callback, "check", lambda: steps.append(callback.num_timesteps) or {})
    make_model(MFPO, learning_starts=10).learn(21, callback=callback)
    assert steps == [12, 16, 20]


@pytest.mark.parametrize("shift, warns", [(0.0, False), (10.0, True), (-10.0, True), (float("nan"), True)])
def test_a_bias_is_warned_of(shift: float, warns: bool) -> None:
    model = make_model(MFPO, seed=0).learn(30)
    with th.no_grad():
        model.divergence.body[-1].bias += shift
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(model, max_bias=2.0)
    messages = [str(warning.message) for warning in caught if "log-probabilities are off" in str(warning.message)]
    assert len(messages) == warns
    assert not warns or ("At step 30" in messages[0] and "`max_bias` = 2 per action coordinate" in messages[0])


@pytest.mark.parametrize(
    "argument", [dict(check_freq=0), dict(n_states=1), dict(solver_steps=0), dict(max_bias=-1.0), dict(max_bias=float("nan"))]
)
def test_bad_arguments_are_refused(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(argument))}`"):
        HealthCallback(**argument)


def test_other_algorithms_are_refused_before_the_first_step() -> None:
    model = SAC("MlpPolicy", RandomEnv(), device="cpu")
    with pytest.raises(ValueError, match="`HealthCallback` looks into the networks of MFPO or SOM, which SAC does not have"):
        model.learn(40, callback=HealthCallback(check_freq=10))
    assert model.num_timesteps == 0


@pytest.mark.parametrize("her", [False, True])
def test_a_loaded_model_is_checked_as_soon_as_its_buffer_can_be_sampled(
    algorithm: Algorithm, her: bool, tmp_path: Path
) -> None:
    """At first its replay buffer is empty; HER's gives nothing before the end of an episode, here of five steps."""
    env = BitFlippingEnv(n_bits=3, continuous=True, max_steps=5)
    kwargs = dict(replay_buffer_class=HerReplayBuffer) if her else {}
    make_model(algorithm, env, policy="MultiInputPolicy", **kwargs).learn(30).save(tmp_path / "model")
    model = algorithm.load(tmp_path / "model", env=env)
    model.set_logger(configure(str(tmp_path), []))
    steps: list[int] = []

    class Watched(HealthCallback):
        def check(self) -> dict[str, float]:
            steps.append(self.num_timesteps)
            return super().check()

    model.learn(9, callback=Watched(check_freq=1, max_bias=1e6))
    assert steps == list(range(steps[0], 10))
    first_episode = int(np.flatnonzero(model.replay_buffer.dones)[0]) + 1
    assert steps[0] == (first_episode if her else 1) + 1
