"""A range of the values that follows the returns: what it is, what it does to a run, and what it must not do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_mfpo import MFPO
from sb3_mfpo.training.return_scale import ReturnScale, discounted_returns
from tests.helpers import Algorithm, RandomEnv, assert_equal, make_model


def scale_of(rewards: Any, starts: Any, gamma: float, value_range: float = 20.0) -> ReturnScale:
    scale, returns = ReturnScale(value_range), np.zeros(0)
    for one, start in zip(np.atleast_2d(rewards), np.atleast_2d(starts), strict=True):
        returns = discounted_returns(one, start, gamma, returns)
        scale.update(returns)
    return scale


def test_it_is_the_deviation_of_the_returns_or_their_largest_over_the_range() -> None:
    """Two environments, of which one begins an episode at the third step."""
    rewards = np.array([[1.0, -2.0], [3.0, 0.5], [0.0, 4.0]])
    starts = np.array([[True, True], [False, False], [True, False]])
    returns = np.array([[1.0, -2.0], [3.5, -0.5], [0.0, 3.75]])
    scale = scale_of(rewards, starts, gamma=0.5)
    assert scale.value == pytest.approx(returns.std(), rel=1e-12)
    assert scale_of(rewards, starts, gamma=0.5, value_range=1.0).value == pytest.approx(3.75, rel=1e-12)
    carried = discounted_returns(rewards[1], np.array([False, False]), 0.5, before=rewards[0])
    assert discounted_returns(rewards[2], np.array([True, False]), 0.5, carried).tolist() == [0.0, 3.75]


def test_the_scale_of_constant_rewards_that_never_end_is_that_of_their_returns() -> None:
    """G approaches r / (1 - gamma), where its deviation goes to 0: the largest return decides."""
    scale = scale_of(np.full((5000, 1), 2.0), np.zeros((5000, 1), bool), gamma=0.9, value_range=5.0)
    assert scale.largest == pytest.approx(20) and scale.value == pytest.approx(4)


@pytest.mark.parametrize("exponent", [-20, -1, 1, 20])
def test_a_power_of_two_scales_it_exactly(exponent: int) -> None:
    rng = np.random.default_rng(0)
    rewards, starts = rng.normal(size=(200, 3)).astype(np.float32), rng.random((200, 3)) < 0.1
    first, second = (scale_of(factor * rewards, starts, 0.99).value for factor in (1.0, 2.0**exponent))
    assert second == first * 2.0**exponent


def test_it_is_one_until_a_reward_is_not_zero() -> None:
    scale = scale_of(np.zeros((10, 2)), np.zeros((10, 2), bool), gamma=0.99)
    assert scale.value == 1.0 and not scale.settled
    scale.update(np.array([0.0, 1e-3]))
    assert scale.value == pytest.approx(np.std([0.0] * 21 + [1e-3]))


class ScaledRewards(gym.RewardWrapper):
    def __init__(self, env: gym.Env, factor: float):
        super().__init__(env)
        self.factor = factor

    def reward(self, reward: Any) -> float:
        return self.factor * float(reward)


def run(algorithm: Algorithm, factor: float, n_envs: int = 1, her: bool = False, **kwargs: Any) -> Any:
    """A short run on rewards that are multiplied by a factor."""
    env = (lambda: BitFlippingEnv(n_bits=3, continuous=True, max_steps=3)) if her else (lambda: RandomEnv(episode_length=7))
    if her:
        kwargs |= dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer)

    def scaled() -> gym.Env:
        wrapped = ScaledRewards(env(), factor)
        wrapped.compute_reward = lambda *args: factor * wrapped.unwrapped.compute_reward(*args)  # type: ignore[attr-defined]
        return wrapped

    return make_model(algorithm, DummyVecEnv([scaled] * n_envs), seed=0, **kwargs).learn(60)


def trained(model: Any) -> dict[str, Any]:
    """Everything that is learned, in units of the scale."""
    state = {
        name: value
        for name, value in model.policy.state_dict().items()
        if not name.endswith((".scale", ".atoms", "_extra_state"))
    }
    optimizers = [model.actor.optimizer.state_dict()["state"], model.critic.optimizer.state_dict()["state"]]
    return dict(policy=state, optimizers=optimizers, temperature=getattr(model, "log_ent_coef", None))


SETTINGS = {
    "defaults": dict(policy_kwargs=dict(value_init="narrow")),
    "values that differ from the start": {},
    "n-step": dict(n_steps=3),
    "hindsight": dict(her=True),
    "two environments": dict(n_envs=2, gradient_steps=-1),
    "scalar critics": dict(policy_kwargs=dict(critic_type="scalar")),
    "mean of the critics": dict(critic_reduction="mean"),
}


@pytest.mark.filterwarnings("ignore:.*norm.*:UserWarning")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_a_power_of_two_changes_no_bit_of_a_run(algorithm: Algorithm, settings: dict[str, Any]) -> None:
    """Rewards from a millionth to a million: the same weights, and values in proportion."""
    first = run(algorithm, 1.0, **settings)
    for exponent in (-20, -3, 1, 20):
        second = run(algorithm, 2.0**exponent, **settings)
        assert_equal(trained(second), trained(first))
        assert second.critic.scale == first.critic.scale * 2.0**exponent
        for name in ("q_value", *(["ent_coef"] if algorithm is MFPO else [])):
            values = [model.logger.name_to_value[f"train/{name}"] for model in (second, first)]
            assert values[0] == pytest.approx(values[1] * 2.0**exponent, rel=1e-12)


def test_other_factors_change_it_by_rounding(algorithm: Algorithm) -> None:
    first, second = (run(algorithm, factor) for factor in (1.0, 0.3))
    for one, other in zip(first.policy.actor.parameters(), second.policy.actor.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-3
    assert second.critic.scale.item() == pytest.approx(0.3 * first.critic.scale.item(), rel=1e-5)


def test_an_explicit_range_is_fixed(algorithm: Algorithm) -> None:
    model = make_model(algorithm, policy_kwargs=dict(v_min=-3.0, v_max=5.0, value_init="narrow")).learn(30)
    assert model.return_scale is None and model.critic.scale == 1
    assert (model.critic.atoms[0], model.critic.atoms[-1]) == (-3, 5)
    assert "train/return_scale" not in model.logger.name_to_value


def test_its_unit_follows_in_steps() -> None:
    scale = scale_of([[0.0]], [[True]], gamma=0.0)
    assert scale.follow() == 1.0 and scale.unit == 0.0
    # Of one reward that is not 0: its size over the range
    scale.update(np.array([40.0]))
    values = [scale.value]
    assert scale.follow() == 1.0 and scale.unit == scale.value == 20.0
    for reward in (41.0, 44.0, 60.0):
        scale.update(np.array([reward]))
        values.append(scale.value)
        unit, factor = scale.unit, scale.follow()
        assert scale.unit == pytest.approx(unit * factor, rel=1e-15)
        assert scale.unit == (scale.value if factor != 1 else unit)
        assert 1 / 1.1 < scale.value / scale.unit < 1.1
    assert len(set(values)) == 4


@pytest.mark.parametrize("critic_type", ["categorical", "scalar"])
def test_values_stay_when_the_scale_changes(algorithm: Algorithm, critic_type: str) -> None:
    """In units of return; by a large factor in small steps."""
    kwargs = dict(critic_type=critic_type, value_init="uniform", n_atoms=101, value_range=20.0)
    critic = make_model(algorithm, policy_kwargs=kwargs).critic
    for layer in critic._output_layers():
        nn.init.normal_(layer.weight, std=0.03 if critic_type == "categorical" else 1.0)
        if critic_type == "categorical":
            layer.bias.data = -0.5 * ((critic.grid - 2) / 1.5).square()
    observations, actions = th.randn(40, 3), th.rand(40, 2)
    with th.no_grad():
        before = th.cat(critic(observations, actions))
        for k in range(1, 11):
            critic.rescale(1.15**k, 1.15)
        after = th.cat(critic(observations, actions))
    # Distributions that become as narrow as the distance of two atoms are rounded
    rounding = 0.2 * (0.4 * 1.15**10) if critic_type == "categorical" else 1e-5
    assert (after - before).abs().max() < rounding < 0.2 * before.abs().max()


@pytest.mark.parametrize("terminates", [True, False])
def test_a_scale_that_rises_raises_no_value(algorithm: Algorithm, terminates: bool) -> None:
    env = RandomEnv(terminates=terminates)
    model = make_model(algorithm, env, seed=0, learning_rate=0.0, policy_kwargs=dict(critic_type="scalar")).learn(30)
    batch = model.replay_buffer.sample(20)
    before = [th.cat(critic(batch.observations, batch.actions)) for critic in (model.critic, model.critic_target)]
    model.return_scale.largest = 1e3 * model.return_scale.value_range
    model.train(1, batch_size=8)
    assert model.critic.scale == model.critic_target.scale == 1e3
    for critic, values in zip((model.critic, model.critic_target), before, strict=True):
        assert th.allclose(th.cat(critic(batch.observations, batch.actions)), values, rtol=1e-4)


def test_it_is_saved_and_logged(algorithm: Algorithm, tmp_path: Path) -> None:
    model = make_model(algorithm, seed=0).learn(40)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=RandomEnv(), device="cpu")
    assert loaded.return_scale.state() == model.return_scale.state()
    assert loaded.critic.scale == model.critic.scale == model.critic_target.scale
    # The rollout after the last update is in the scale already
    assert model.logger.name_to_value["train/return_scale"] == model.return_scale.value
    assert model.critic.scale.item() == pytest.approx(model.return_scale.unit, rel=1e-6)


def test_it_goes_on_in_another_environment(algorithm: Algorithm) -> None:
    """Whose episodes begin with a return of 0; what was seen stays."""
    model = make_model(algorithm, ScaledRewards(RandomEnv(), 100.0), seed=0).learn(30)
    scale = model.return_scale
    assert scale is not None
    largest = scale.largest
    model.set_env(ScaledRewards(RandomEnv(), 1.0))
    model.learn(1)
    assert scale.largest == largest > 10 * abs(model._returns).max()


@pytest.mark.parametrize("how", ["set_parameters", "load_weights"])
def test_it_goes_with_the_weights(algorithm: Algorithm, how: str, tmp_path: Path) -> None:
    """Another model acts and values alike, and goes on in that unit."""
    env = ScaledRewards(RandomEnv(terminates=True), 100.0)
    model, other = make_model(algorithm, env, seed=0).learn(60), make_model(algorithm, env, seed=1)
    if how == "set_parameters":
        other.set_parameters(model.get_parameters())
    else:
        model.policy.save_weights(tmp_path / "weights.pt")
        other.policy.load_weights(tmp_path / "weights.pt")
    observations = th.randn(200, 3).numpy()
    actions = model.predict(observations, deterministic=True)[0]
    assert np.array_equal(other.predict(observations, deterministic=True)[0], actions)
    assert other.return_scale.state() == model.return_scale.state()
    other.replay_buffer = model.replay_buffer
    other.train(1, 8)
    assert other.critic.scale == model.critic.scale > 10


def test_weights_of_before_it_went_with_them_load(algorithm: Algorithm) -> None:
    model, other = make_model(algorithm, seed=0).learn(30), make_model(algorithm, seed=1)
    weights = {name: value for name, value in model.policy.state_dict().items() if name != "_extra_state"}
    other.policy.load_state_dict(weights)
    assert_equal(other.policy.actor.state_dict(), model.policy.actor.state_dict())
    # Then two more numbers came first
    state = model.policy.get_extra_state()
    other.policy.load_state_dict(weights | {"_extra_state": th.cat([th.ones(2), state])})
    assert other.return_scale.state() == state.tolist()


@pytest.mark.parametrize("n_collected", [60, 130], ids=["half full", "full"])
def test_it_follows_a_buffer_that_others_have_filled(algorithm: Algorithm, n_collected: int, tmp_path: Path) -> None:
    env = ScaledRewards(RandomEnv(), 100.0)
    # The oldest of a full buffer are gone: whole episodes
    kwargs: dict[str, Any] = dict(buffer_size=105, learning_starts=1000, seed=0)
    collected = make_model(algorithm, env, **kwargs).learn(n_collected)
    collected.save_replay_buffer(tmp_path / "buffer.pkl")
    model = make_model(algorithm, env, **kwargs, policy_kwargs=dict(value_init="narrow"))
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    model.train(1, 32)
    if n_collected == 60:
        assert model.return_scale.largest == pytest.approx(collected.return_scale.largest, rel=1e-6)
        assert model.return_scale.moments.var == pytest.approx(collected.return_scale.moments.var, rel=1e-6)
    assert model.return_scale.value == pytest.approx(collected.return_scale.value, rel=0.2)
    assert model.return_scale.moments.count == min(n_collected, 105)


class Unreached(gym.Env):
    """A goal that no action reaches: all rewards are 0, and 100 where hindsight takes what was reached for the goal."""

    def __init__(self) -> None:
        box = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = gym.spaces.Dict(observation=box, achieved_goal=box, desired_goal=box)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def observe(self) -> dict[str, np.ndarray]:
        at = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return dict(observation=at, achieved_goal=at, desired_goal=np.full(2, 2, np.float32))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        self.steps += 1
        return self.observe(), 0.0, False, self.steps == 10, {}

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, info: Any) -> np.ndarray:
        return 100.0 * (np.abs(achieved - desired).max(axis=-1) < 1e-3)


def test_rewards_that_only_hindsight_finds_are_reported(algorithm: Algorithm) -> None:
    """The scale has seen none of them."""
    kwargs: dict[str, Any] = dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, learning_starts=150)
    model = make_model(algorithm, Unreached(), seed=0, batch_size=64, policy_kwargs=dict(value_range=20.0), **kwargs)
    with pytest.warns(
        UserWarning, match=r"of the value targets' mass lies outside of \[-20, 20\] .*Give a higher `value_range`"
    ):
        model.learn(200)


def test_an_evaluation_does_not_touch_it(algorithm: Algorithm) -> None:
    model = make_model(algorithm, seed=0).learn(30)
    assert model.return_scale is not None
    before = model.return_scale.value
    evaluate_policy(model, ScaledRewards(RandomEnv(), 1e6), 2, warn=False)
    assert model.return_scale.value == before


class Outlier(gym.RewardWrapper):
    """One reward of a million, at the 140th step."""

    steps = 0

    def reward(self, reward: Any) -> float:
        self.steps += 1
        return 1e6 if self.steps == 140 else float(reward)


def test_a_reward_that_moves_it_tenfold_is_reported(algorithm: Algorithm) -> None:
    model = make_model(algorithm, Outlier(RandomEnv()), seed=0)
    with pytest.warns(UserWarning, match="raised the scale of the returns from .* to .*clip them"):
        model.learn(160)


def test_a_first_reward_is_not(algorithm: Algorithm) -> None:
    """A task whose rewards were 0 so far: nothing has been learned that it could blur."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.wrappers.TransformReward(Outlier(RandomEnv()), lambda reward: float(reward == 1e6))
        model = make_model(algorithm, env, seed=0, policy_kwargs=dict(value_init="narrow", value_range=20.0)).learn(160)
    assert model.return_scale is not None and model.return_scale.largest == 1
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("reward", [None, 1.0])
def test_learning_from_the_first_step_is_not_reported(algorithm: Algorithm, reward: float | None) -> None:
    """The scale of the first returns, and a support as wide as the first of them, say nothing yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.wrappers.TransformReward(RandomEnv(), lambda r: r if reward is None else reward)
        kwargs = dict(value_range=20.0, value_init="narrow", n_atoms=101)
        make_model(algorithm, env, seed=0, learning_starts=0, policy_kwargs=kwargs).learn(300)


def test_rewards_that_are_normalised_already_are_reported(algorithm: Algorithm) -> None:
    with pytest.warns(UserWarning, match=r"`norm_reward=False`"):
        make_model(algorithm, VecNormalize(DummyVecEnv([RandomEnv])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model(algorithm, VecNormalize(DummyVecEnv([RandomEnv]), norm_reward=False))
