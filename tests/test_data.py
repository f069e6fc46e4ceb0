"""Transitions from datasets, in the buffers of models that did not collect them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mfpo import MFPO, RunCheckpointCallback
from sb3_mfpo.data import load_transitions
from tests.helpers import ALGORITHMS, Algorithm, RandomEnv, assert_equal, make_model

BOUNDS = spaces.Box(np.array([-2, 0], np.float32), np.array([1, 0.5], np.float32))


def collect(env: gym.Env, n: int) -> dict[str, Any]:
    """n transitions of random actions, in order."""
    rows: dict[str, list[Any]] = {
        name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    }
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    for _ in range(n):
        action = env.action_space.sample()
        after, reward, terminated, truncated, _ = env.step(action)
        for values, value in zip(rows.values(), (observation, action, reward, after, terminated, truncated), strict=True):
            values.append(value)
        observation = env.reset()[0] if terminated or truncated else after
    arrays: dict[str, Any] = {}
    for name, values in rows.items():
        if isinstance(values[0], dict):
            arrays[name] = {key: np.stack([value[key] for value in values]) for key in values[0]}
        else:
            arrays[name] = np.stack(values)
    return arrays


def contents(model: Any) -> dict[str, Any]:
    buffer = model.replay_buffer
    names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "pos", "full")
    return {name: getattr(buffer, name) for name in names}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("terminates", [True, False])
def test_a_buffer_is_as_if_the_model_had_collected_it(algorithm: Algorithm, terminates: bool) -> None:
    """Also the scale of the returns. The last transition ends an episode here."""
    collected = make_model(algorithm, RandomEnv(action_space=BOUNDS, terminates=terminates), learning_starts=100, seed=0)
    collected.learn(56)
    buffer = collected.replay_buffer
    dataset = {
        "observations": buffer.observations[:56, 0],
        "next_observations": buffer.next_observations[:56, 0],
        "actions": collected.policy.unscale_action(buffer.actions[:56, 0]),
        "rewards": buffer.rewards[:56, 0],
        "terminations": (buffer.dones * (1 - buffer.timeouts))[:56, 0],
        "truncations": buffer.timeouts[:56, 0],
    }
    loaded = make_model(algorithm, RandomEnv(action_space=BOUNDS, terminates=terminates), seed=1)
    assert load_transitions(loaded, dataset) == 56
    expected, actual = contents(collected), contents(loaded)
    assert np.allclose(expected.pop("actions"), actual.pop("actions"), atol=1e-6)
    assert_equal(actual, expected)
    assert actual["dones"].sum() == 8 and actual["timeouts"].sum() == (0 if terminates else 8)
    first, second = collected.return_scale, loaded.return_scale
    assert (first.largest, first.value) == pytest.approx((second.largest, second.value), rel=1e-6)


SPACES = {
    "images": ("CnnPolicy", spaces.Box(0, 255, (3, 36, 36), np.uint8)),
    "Dict": ("MultiInputPolicy", spaces.Dict(number=spaces.Discrete(3), vector=spaces.Box(-1, 1, (2,), np.float64))),
    "Discrete": ("MlpPolicy", spaces.Discrete(4)),
}


@pytest.mark.parametrize("policy, space", SPACES.values(), ids=SPACES.keys())
def test_spaces(policy: str, space: spaces.Space) -> None:
    """A gradient step before ``learn``, and ``learn`` after it, which keeps the data."""
    model = make_model(MFPO, RandomEnv(space), policy=policy, buffer_size=100, seed=0)
    dataset = collect(RandomEnv(space), 20)
    assert load_transitions(model, dataset) == 20
    before = copy.deepcopy(model.policy.actor.state_dict())
    model.train(gradient_steps=2, batch_size=8)
    assert model._n_updates == 2
    assert any(not th.equal(value, before[name]) for name, value in model.policy.actor.state_dict().items())
    model.learn(15)
    assert model.replay_buffer.pos == 35 and model.num_timesteps == 15
    assert np.allclose(model.replay_buffer.rewards[:20, 0], dataset["rewards"])


def test_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of Minari's, the last of which was cut, are the transitions that they were made from."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    arrays = collect(env := gym.make("Pendulum-v1"), 450)
    episodes = []
    for number, rows in enumerate((slice(0, 200), slice(200, 400), slice(400, 450))):
        observations = np.concatenate([arrays["observations"][rows], arrays["next_observations"][rows][-1:]])
        others = {name: arrays[name][rows] for name in ("actions", "rewards", "terminations", "truncations")}
        episodes.append(EpisodeBuffer(id=number, observations=list(observations), **{k: list(v) for k, v in others.items()}))
    with pytest.warns(UserWarning):
        # About an author, a licence and such
        dataset = minari.create_dataset_from_buffers("pendulum/random-v0", episodes, env=env)
    models = [MFPO("MlpPolicy", "Pendulum-v1", buffer_size=1000, device="cpu") for _ in range(2)]
    assert load_transitions(models[0], dataset) == load_transitions(models[1], arrays) == 450
    assert_equal(*map(contents, models))
    assert np.flatnonzero(models[0].replay_buffer.timeouts).tolist() == [199, 399, 449]
    with pytest.raises(ValueError, match="`dataset` has no episodes"):
        load_transitions(models[0], dataset.filter_episodes(lambda episode: False))


def test_returns_of_n_steps_end_with_the_data() -> None:
    """Row i is rewarded by 1, so that a return counts the steps that it holds; then other transitions follow."""
    model = make_model(MFPO, RandomEnv(episode_length=5), n_steps=3, gamma=1.0)
    dataset = collect(RandomEnv(episode_length=5), 8) | {"rewards": np.ones(8)}
    load_transitions(model, dataset)
    load_transitions(model, dataset)
    samples = model.replay_buffer._get_samples(np.arange(16))
    expected = [3, 3, 3, 2, 1, 3, 2, 1]
    assert samples.rewards.flatten().tolist() == 2 * expected
    assert np.allclose(samples.next_observations[5], dataset["next_observations"][7])


def test_an_episode_that_was_being_collected_ends_where_data_follow() -> None:
    """Its last transition has a return of one step, and no other end."""
    model = make_model(MFPO, RandomEnv(episode_length=100), n_steps=3, gamma=1.0, learning_starts=100).learn(4)
    model.replay_buffer.rewards[:4] = 1
    load_transitions(model, collect(RandomEnv(), 7) | {"rewards": np.ones(7)})
    samples = model.replay_buffer._get_samples(np.arange(11))
    assert samples.rewards.flatten().tolist() == [3, 3, 2, 1, 3, 3, 3, 3, 3, 2, 1]
    assert not samples.dones.any()


def test_several_environments_share_all_transitions() -> None:
    """Ten rows for three environments: pieces of four that overlap."""
    model = make_model(MFPO, DummyVecEnv([RandomEnv] * 3), gradient_steps=-1)
    dataset = collect(RandomEnv(episode_length=100), 10)
    assert load_transitions(model, dataset) == 10
    buffer = model.replay_buffer
    rows = [[0, 3, 6], [1, 4, 7], [2, 5, 8], [3, 6, 9]]
    assert buffer.pos == 4 and np.array_equal(buffer.observations[:4], dataset["observations"][rows])
    assert np.array_equal(buffer.dones[:4], buffer.timeouts[:4]) and buffer.dones[:4].sum(axis=1).tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize("keys", [None, ["vector"]], ids=["Box", "Dict"])
def test_statistics_of_observations_follow(keys: list[str] | None) -> None:
    vector = spaces.Box(-100, 100, (2,), np.float32)
    space = vector if keys is None else spaces.Dict(vector=vector, number=spaces.Discrete(3))
    normalizer = VecNormalize(DummyVecEnv([lambda: RandomEnv(space)]), norm_reward=False, norm_obs_keys=keys)
    model = make_model(MFPO, normalizer, policy="MlpPolicy" if keys is None else "MultiInputPolicy", buffer_size=1000)
    dataset = collect(RandomEnv(space), 400)
    raw = dataset["observations"] if keys is None else dataset["observations"]["vector"]

    normalizer.training = False
    load_transitions(model, dataset)
    moments: Any = normalizer.obs_rms if keys is None else normalizer.obs_rms["vector"]
    assert np.array_equal(moments.mean, [0, 0])
    normalizer.training = True
    load_transitions(model, dataset)
    assert np.allclose(moments.mean, raw.mean(axis=0), atol=0.01) and np.allclose(moments.var, raw.var(axis=0), rtol=0.01)
    # Stored as they are, normalised when they are sampled
    stored: Any = model.replay_buffer.observations
    assert np.array_equal((stored if keys is None else stored["vector"])[:400, 0], raw)


def test_hindsight(tmp_path: Path) -> None:
    """Goals are relabelled within the episodes of the data."""

    class Goals(RandomEnv):
        def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, info: Any) -> np.ndarray:
            return -np.abs(achieved - desired).sum(axis=-1)

    box = spaces.Box(-1, 1, (2,), np.float32)
    space = spaces.Dict(observation=box, achieved_goal=box, desired_goal=box)
    model = make_model(MFPO, Goals(space), policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    dataset = collect(Goals(space), 30)
    load_transitions(model, dataset)
    starts, lengths = model.replay_buffer.ep_start[:30, 0], model.replay_buffer.ep_length[:30, 0]
    assert starts.tolist() == [7 * (i // 7) for i in range(30)] and lengths.tolist() == 28 * [7] + 2 * [2]
    model.train(gradient_steps=1, batch_size=16)

    begun = make_model(MFPO, Goals(space), policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer).learn(10)
    load_transitions(begun, dataset)
    assert begun.replay_buffer.ep_length[:17, 0].tolist() == 7 * [7] + 3 * [3] + 7 * [7]


@pytest.mark.parametrize("once", [False, True], ids=["both observations", "every observation once"])
def test_an_episode_of_the_models_own_is_not_mixed_with_the_data(once: bool) -> None:
    """Ten steps of episodes of seven, then other data, then the rest of the second episode."""
    kwargs: dict[str, Any] = dict(learning_starts=1000, optimize_memory_usage=once, seed=0)
    if once:
        kwargs["replay_buffer_kwargs"] = dict(handle_timeout_termination=False)
    alone, model = (make_model(MFPO, RandomEnv(), **kwargs).learn(10) for _ in range(2))
    load_transitions(model, collect(RandomEnv(), 20))
    ends = model.replay_buffer.dones if once else model.replay_buffer.timeouts
    assert ends[9] == 1 and not ends[7:9].any()
    assert model._returns == alone._returns != 0


def test_a_run_that_began_with_data_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def begin() -> Any:
        model = make_model(MFPO, RandomEnv(), seed=0)
        load_transitions(model, collect(RandomEnv(), 30))
        return model

    whole = begin().learn(60)
    begun = begin()
    begun.learn(40, callback=RunCheckpointCallback(20, tmp_path))
    resumed = MFPO.resume(tmp_path, RandomEnv()).learn(60)
    assert_equal(contents(resumed), contents(whole))
    assert_equal(resumed.policy.state_dict(), whole.policy.state_dict())


def test_other_algorithms_take_them() -> None:
    model = SAC("MlpPolicy", RandomEnv(), buffer_size=50, device="cpu")
    assert load_transitions(model, collect(RandomEnv(), 20)) == model.replay_buffer.pos == 20


def change(name: str, of: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda dataset: dataset | {name: of(dataset[name].copy())}


def with_row(value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def changed(values: np.ndarray) -> np.ndarray:
        values[3] = value
        return values

    return changed


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda dataset: 3, r"`dataset` must be a `MinariDataset` or a mapping of 'observations', .* not <class 'int'>"),
        (lambda dataset: {"obs": 1}, "`dataset` must be .* not one of 'obs'"),
        (lambda dataset: {name: values[:0] for name, values in dataset.items()}, r"`rewards` must .* not \(0,\)"),
        (change("actions", lambda values: values[:-1]), r"`actions` must have the shape \(20, 2\), .* not \(19, 2\)"),
        (
            change("observations", lambda values: values[:, :2]),
            r"`observations` must have the shape \(20, 3\), .* not \(20, 2\)",
        ),
        (
            change("observations", lambda values: values.astype(complex)),
            "`observations` must be stored as float32, .* complex",
        ),
        (change("rewards", with_row(np.nan)), "`rewards` must be finite, which row 3 is not: nan"),
        (change("next_observations", with_row(np.inf)), "`next_observations` must be finite, which row 3 is not"),
        (change("actions", with_row(1.5)), r"`actions` must be in the bounds .* row 3 is not: \[1.5 1.5\]. Clip or rescale"),
        (change("terminations", lambda values: values + 2), "`terminations` must be 20 times True or False"),
        (change("truncations", lambda values: np.zeros(20)), r"Row 6 ends no episode, .*\(2 of 20 rows.*set `truncations`"),
        (lambda dataset: {name: values[::-1] for name, values in dataset.items()}, "Row 0 ends no episode"),
    ],
)
def test_bad_data_are_refused(broken: Callable[[dict[str, Any]], Any], message: str) -> None:
    model = make_model(MFPO)
    with pytest.raises(ValueError, match=message):
        load_transitions(model, broken(collect(RandomEnv(), 20)))
    assert model.replay_buffer.pos == 0 and model.return_scale.moments.count == 0


def test_more_than_the_buffer_holds() -> None:
    model = make_model(MFPO, buffer_size=15)
    with pytest.raises(ValueError, match=r"`dataset` has 20 transitions, of which the model keeps 15: .* `buffer_size`"):
        load_transitions(model, collect(RandomEnv(), 20))
    with pytest.raises(ValueError, match="`model` has no replay buffer"):
        load_transitions(SAC("MlpPolicy", RandomEnv(), _init_setup_model=False), {})


def test_images_with_channels_last_are_named() -> None:
    model = make_model(MFPO, RandomEnv(spaces.Box(0, 255, (36, 36, 3), np.uint8)), policy="CnnPolicy", buffer_size=50)
    with pytest.raises(ValueError, match=r"`observations` must have the shape .* channels first in the model"):
        load_transitions(model, collect(RandomEnv(spaces.Box(0, 255, (36, 36, 3), np.uint8)), 10))
