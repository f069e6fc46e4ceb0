"""DeepMind Control tasks as Stable-Baselines3 wants them."""

import os
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env

from sb3_mfpo import MFPO
from sb3_mfpo.envs import DMControlTask, make_dm_control, register_dm_control
from sb3_mfpo.zoo.doctor import find_renderer
from tests.helpers import SMALL, SMALL_POLICY

needs_renderer = pytest.mark.skipif(find_renderer() is None, reason="needs EGL or OSMesa for offscreen rendering")


@pytest.mark.parametrize("task", ["cheetah-run", "humanoid-stand", "dog-run", "humanoid_CMU-run", "finger-turn_hard"])
def test_tasks_are_ready_for_sb3(task: str) -> None:
    env = make_dm_control(f"dm_control/{task}-v0")
    check_env(env, warn=False)
    observation, _ = env.reset(seed=0)
    assert isinstance(env.observation_space, spaces.Box) and isinstance(env.action_space, spaces.Box)
    assert observation.dtype == env.observation_space.dtype == env.action_space.dtype == np.float32
    assert env.observation_space.contains(observation) and observation.ndim == 1
    assert np.isfinite(env.action_space.low).all() and np.isfinite(env.action_space.high).all()
    assert env.spec is not None and env.spec.id == f"dm_control/{task}-v0"
    assert env.spec.max_episode_steps == 1000
    env.close()


def test_observations_hold_every_entry_also_scalars() -> None:
    """humanoid-stand has a scalar, the height of the head."""
    env = make_dm_control("dm_control/humanoid-stand-v0")
    entries = env.unwrapped.observation_space
    assert isinstance(entries, spaces.Dict) and entries["head_height"].shape == ()
    observation, _ = env.reset(seed=0)
    task: Any = env.unwrapped
    expected = task._env.task.get_observation(task._env.physics)
    flat = np.concatenate([np.ravel(expected[name]) for name in entries])
    assert observation.shape == (67,)
    np.testing.assert_allclose(observation, flat.astype(np.float32))


def test_seeds_reach_the_task() -> None:
    env, other = (make_dm_control("dm_control/walker-run-v0") for _ in range(2))
    first, _ = env.reset(seed=3)
    second, _ = env.reset()
    assert not np.array_equal(first, second)
    assert np.array_equal(other.reset(seed=3)[0], first)
    assert np.array_equal(other.reset()[0], second)
    assert not np.array_equal(other.reset(seed=4)[0], first)


def test_the_time_limit_truncates() -> None:
    env = make_dm_control("dm_control/cheetah-run-v0")
    env.reset(seed=0)
    action = np.zeros(6, np.float32)
    ends = [env.step(action)[2:4] for _ in range(1000)]
    assert ends[:-1] == [(False, False)] * 999
    assert ends[-1] == (False, True)


def test_time_limit_of_a_composer_task() -> None:
    """Given in seconds: 10 at 25 steps per second."""
    env = make_dm_control("dm_control/reach_site_features-v0")
    env.reset(seed=0)
    assert env.spec is not None and env.spec.max_episode_steps == 250
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(250)]
    assert not any(truncated for _, truncated in ends[:-1]) and ends[-1] == (False, True)


def test_mfpo_trains() -> None:
    env = make_dm_control("dm_control/cartpole-balance-v0")
    model = MFPO("MlpPolicy", env, **SMALL[MFPO], policy_kwargs=SMALL_POLICY).learn(20)
    assert model.replay_buffer.observations.dtype == np.float32


def test_unbounded_actions_are_refused() -> None:
    class Unbounded(gym.Env):
        observation_space = spaces.Dict(x=spaces.Box(-1, 1, ()))
        action_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)

    with pytest.raises(ValueError, match=r"actions are unbounded.*RescaleAction"):
        DMControlTask(Unbounded())


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "dm_control/nothing-v0"])
def test_unknown_tasks(env_id: str) -> None:
    with pytest.raises(ValueError, match=f"`env_id` must be the id of a DeepMind Control task.*not '{env_id}'"):
        make_dm_control(env_id)


@pytest.mark.parametrize("package", ["shimmy", "dm_control"])
def test_missing_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"need shimmy and dm_control.*{package}.*sb3-mfpo\[dmc\]"):
        register_dm_control()


@needs_renderer
def test_pixels_and_rendering() -> None:
    """In a process of its own: the renderer is chosen when dm_control is imported."""
    code = """
import numpy as np
from sb3_mfpo import MFPO
from sb3_mfpo.envs import make_dm_control
env = make_dm_control("dm_control/cartpole-balance-v0", pixels=True, image_size=48)
first, _ = env.reset(seed=0)
assert first.shape == (48, 48, 3) and first.dtype == np.uint8 and first.std() > 1
for _ in range(20):
    last, *_ = env.step(np.ones(1, np.float32))
assert not np.array_equal(first, last) and env.observation_space.contains(last)
MFPO("CnnPolicy", env, learning_starts=4, batch_size=4, buffer_size=20, policy_kwargs=dict(net_arch=[8])).learn(6)
frame = make_dm_control("dm_control/cartpole-balance-v0", render_mode="rgb_array")
frame.reset()
assert frame.render().shape == (240, 320, 3)
print("done")
"""
    environment = {**os.environ, "MUJOCO_GL": find_renderer() or ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip().endswith("done"), run.stderr
