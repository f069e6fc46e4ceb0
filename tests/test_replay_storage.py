"""The replay buffer is SB3's: it holds what SAC's would hold, in the same arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tests.helpers import Algorithm, RandomEnv, make_model

BOX = spaces.Box(-np.inf, np.inf, (2,), np.float64)
DICT = spaces.Dict(a=BOX, b=spaces.Box(-1, 1, (3,), np.float32))


class Walk(gym.Env):
    """A walk in the plane that begins near a place and, as a goal task, should end near it."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, place: float, has_goal: bool = False):
        self.place, self.has_goal = place, has_goal
        self.observation_space = (
            spaces.Dict(observation=BOX, achieved_goal=BOX, desired_goal=BOX) if has_goal else BOX  # type: ignore[assignment]
        )

    def _observe(self) -> Any:
        position = self.position.copy()
        return dict(observation=position, achieved_goal=position, desired_goal=self.goal) if self.has_goal else position

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        return -(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.05).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.position, self.goal = self.place + self.np_random.normal(size=(2, 2))
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.position = self.position + 0.1 * action
        self.steps += 1
        return self._observe(), float(self.compute_reward(self.position, self.goal, {})), False, self.steps == 20, {}


def with_random_actions(algorithm: Any, env: Any, **kwargs: Any) -> Any:
    """A model that has only collected, with random actions: the same transitions for every algorithm."""
    kwargs = dict(learning_starts=10**6, buffer_size=1000, seed=0, device="cpu") | kwargs
    make = SAC if algorithm is SAC else (lambda *args, **kwargs: make_model(algorithm, args[1], policy=args[0], **kwargs))
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    return make(policy, env, **kwargs).learn(400)


def test_large_observations_are_stored_with_all_digits_for_normalisation(algorithm: Algorithm) -> None:
    """Around 5e8 float32 has steps of 32; with those, all positions of a walk are the same."""
    batches = []
    for each in (SAC, algorithm):
        model = with_random_actions(each, VecNormalize(DummyVecEnv([lambda: Walk(5e8)]), norm_reward=False))
        np.random.seed(1)
        batches.append(model.replay_buffer.sample(256, env=model.get_vec_normalize_env()).observations)
    assert th.equal(*batches)
    assert len(batches[0][:, 0].unique()) > 100


def test_hindsight_goals_are_reached_as_often_as_with_sac(algorithm: Algorithm) -> None:
    """Around 5e6 float32 has steps of 0.5, ten times the distance that counts as success."""
    rewards = []
    for each in (SAC, algorithm):
        model = with_random_actions(each, Walk(5e6, has_goal=True), replay_buffer_class=HerReplayBuffer)
        np.random.seed(1)
        rewards.append(model.replay_buffer.sample(2000).rewards)
    assert th.equal(*rewards)
    assert 0.05 < (rewards[0] == 0).float().mean() < 0.3


@pytest.mark.parametrize("space", [BOX, DICT, spaces.Box(0, 255, (3,), np.uint8)], ids=["box", "dict", "uint8"])
def test_the_buffer_takes_as_much_memory_as_sacs(algorithm: Algorithm, space: spaces.Space) -> None:
    """And so is SB3's warning of too little of it, which counts these arrays."""
    ours, sac = (with_random_actions(each, RandomEnv(space)).replay_buffer for each in (algorithm, SAC))
    for name in ("observations", "next_observations"):
        arrays = [getattr(buffer, name) for buffer in (ours, sac)]
        for key in arrays[1] if isinstance(space, spaces.Dict) else [...]:
            assert arrays[0][key].dtype == arrays[1][key].dtype
            assert np.array_equal(arrays[0][key], arrays[1][key])


def test_float32_observations_halve_the_memory(algorithm: Algorithm) -> None:
    """The way that the documentation names."""
    model = make_model(algorithm, gym.wrappers.DtypeObservation(RandomEnv(BOX), np.float32)).learn(30)
    assert model.replay_buffer.observations.dtype == model.replay_buffer.next_observations.dtype == np.float32
    assert model.predict(np.zeros(2))[0].shape == (2,)


class FilledBuffer(ReplayBuffer):
    """Comes with transitions, as from a data set."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        fill(self.observations, self.next_observations, self.rewards)
        self.pos = 100


class FilledDictBuffer(DictReplayBuffer):
    """The same for Dict observations."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        fill(*self.observations.values(), *self.next_observations.values(), self.rewards)
        self.pos = 100


def fill(*arrays: np.ndarray) -> None:
    for seed, array in enumerate(arrays):
        array[:100] = np.random.RandomState(seed).uniform(-1, 1, array[:100].shape)


@pytest.mark.parametrize("buffer_class, space", [(FilledBuffer, BOX), (FilledDictBuffer, DICT)])
def test_a_buffer_that_is_made_with_transitions_keeps_them(
    algorithm: Algorithm, tmp_path: Path, buffer_class: Any, space: spaces.Space
) -> None:
    kwargs = dict(policy="MultiInputPolicy") if isinstance(space, spaces.Dict) else {}
    model = make_model(algorithm, RandomEnv(space), replay_buffer_class=buffer_class, **kwargs)
    model.save(tmp_path / "model")
    for each in (model, algorithm.load(tmp_path / "model", env=RandomEnv(space))):
        expected = buffer_class(500, space, RandomEnv().action_space)
        for name in ("observations", "next_observations"):
            stored, filled = getattr(each.replay_buffer, name), getattr(expected, name)
            for key in filled if isinstance(space, spaces.Dict) else [...]:
                assert np.array_equal(stored[key], filled[key]) and filled[key].any()


class DiskBuffer(ReplayBuffer):
    """Keeps observations in files."""

    def __init__(self, *args: Any, folder: Path, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in ("observations", "next_observations"):
            array = getattr(self, name)
            setattr(self, name, np.memmap(folder / name, array.dtype, mode="w+", shape=array.shape))


def test_a_buffer_in_files_stays_in_files(algorithm: Algorithm, tmp_path: Path) -> None:
    kwargs = dict(replay_buffer_class=DiskBuffer, replay_buffer_kwargs=dict(folder=tmp_path))
    model = make_model(algorithm, RandomEnv(BOX), **kwargs).learn(40)
    for name in ("observations", "next_observations"):
        array = getattr(model.replay_buffer, name)
        assert isinstance(array, np.memmap)
        assert np.array_equal(np.fromfile(tmp_path / name, array.dtype)[:80].reshape(40, 1, 2), array[:40])
        assert array[:40].all()
