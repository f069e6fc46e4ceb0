"""Tasks as Stable-Baselines3 wants them: DeepMind Control, Gymnasium-Robotics, HumanoidBench."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import WrapperSpec
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_checker import check_env

from sb3_mfpo import MFPO
from sb3_mfpo.envs import (
    NO_RENDERER,
    DMControlTask,
    NoRendererError,
    choose_renderer,
    find_renderer,
    is_of_shimmy,
    make_dm_control,
    ready_spec,
    register_dm_control,
    register_humanoid_bench,
    register_robotics,
)
from tests.helpers import SMALL, SMALL_POLICY

# What says how to render; none of it is set on a bare machine
RENDERING = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY", "PYOPENGL_PLATFORM")
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
def test_unknown_tasks_are_refused(env_id: str) -> None:
    with pytest.raises(ValueError, match=f"`env_id` must be the id of a DeepMind Control task.*not '{env_id}'"):
        make_dm_control(env_id)


class OwnTask(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(2, np.float32), self.scale, False, False, {}


def episode_length(env: gym.Env) -> int:
    env.reset(seed=0)
    for step in range(1, 2000):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            return step
    raise AssertionError("no end")


def test_tasks_of_shimmy_are_recognised_by_their_entry_point_not_by_their_id(monkeypatch: pytest.MonkeyPatch) -> None:
    register_dm_control()
    monkeypatch.setattr(gym.envs.registration, "registry", registry := dict(gym.registry))
    monkeypatch.setattr(gym, "registry", registry)
    gym.register("dm_control/own-task-v0", OwnTask, kwargs=dict(scale=5.0), max_episode_steps=50)
    gym.register("own/cartpole-v0", gym.spec("dm_control/cartpole-swingup-v0").entry_point)
    assert not is_of_shimmy(gym.spec("dm_control/own-task-v0"))
    with pytest.raises(ValueError, match=r"not 'dm_control/own-task-v0'; make a task of your own with `gymnasium.make`"):
        make_dm_control("dm_control/own-task-v0")
    for env_id in ("own/cartpole-v0", "dm_control/cartpole-swingup-v0", "dm_control/RodentTwoTouch-v0"):
        assert is_of_shimmy(gym.spec(env_id)) and is_of_shimmy(ready_spec(gym.spec(env_id)))
    assert not is_of_shimmy(gym.spec("Pendulum-v1"))
    assert make_dm_control("own/cartpole-v0").observation_space.shape == (5,)


@pytest.mark.parametrize(("limit", "length"), [(20, 20), (None, 100), (500, 100)])
def test_a_prepared_task_keeps_the_rest_of_its_spec(limit: int | None, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of shimmy's whose own time limit is a second, 100 steps."""
    register_dm_control()
    monkeypatch.setattr(gym.envs.registration, "registry", registry := dict(gym.registry))
    monkeypatch.setattr(gym, "registry", registry)
    gym.register(
        "dm_control/short-cartpole-v0",
        gym.spec("dm_control/cartpole-swingup-v0").entry_point,
        kwargs=dict(task_kwargs=dict(time_limit=1.0)),
        max_episode_steps=limit,
        reward_threshold=7.0,
        nondeterministic=True,
        order_enforce=False,
        disable_env_checker=True,
        additional_wrappers=(WrapperSpec("Scaled", "gymnasium.wrappers:TransformReward", dict(func=lambda reward: -1.0)),),
    )
    spec = gym.spec("dm_control/short-cartpole-v0")
    ready = ready_spec(spec)
    assert dataclasses.replace(ready, entry_point=spec.entry_point) == spec and ready_spec(ready) is ready
    env = make_dm_control("dm_control/short-cartpole-v0")
    assert episode_length(env) == length
    assert env.step(env.action_space.sample())[1] == -1.0
    assert not any("OrderEnforcing" in text or "Checker" in text for text in str(env).split("<"))
    assert env.spec is not None and env.spec.max_episode_steps == (limit or length)
    assert env.spec.reward_threshold == 7.0 and env.spec.nondeterministic


@pytest.mark.parametrize("package", ["shimmy", "dm_control"])
def test_missing_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"need shimmy and dm_control.*{package}.*sb3-mfpo\[dmc\]"):
        register_dm_control()


def bare_environment(**variables: str) -> dict[str, str]:
    """Environment variables of a process on a machine without a display where nobody has chosen a renderer."""
    kept = {name: value for name, value in os.environ.items() if name not in RENDERING}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for this process; what the test sets is undone."""
    for name in RENDERING:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@needs_renderer
def test_pixels_and_rendering_without_a_display() -> None:
    """In a process of its own, on a bare machine, after dm_control has been imported and has chosen what does not work."""
    code = """
import os
import numpy as np
from sb3_mfpo import MFPO
from sb3_mfpo.envs import make_dm_control
make_dm_control("dm_control/cartpole-balance-v0").reset(seed=0)
assert "MUJOCO_GL" not in os.environ, "chosen although nothing is rendered"
env = make_dm_control("dm_control/cartpole-balance-v0", pixels=True, image_size=48)
first, _ = env.reset(seed=0)
assert first.shape == (48, 48, 3) and first.dtype == np.uint8 and first.std() > 1
for _ in range(20):
    last, *_ = env.step(np.ones(1, np.float32))
assert not np.array_equal(first, last) and env.observation_space.contains(last)
MFPO("CnnPolicy", env, learning_starts=4, batch_size=4, buffer_size=20, policy_kwargs=dict(net_arch=[8])).learn(6)
other = make_dm_control("dm_control/cartpole-balance-v0", pixels=True, image_size=48, render_kwargs=dict(camera_id=1))
assert not np.array_equal(other.reset(seed=0)[0], first)
frame = make_dm_control("dm_control/cartpole-balance-v0", render_mode="rgb_array")
frame.reset()
assert frame.render().shape == (240, 320, 3)
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco/>")
assert mujoco.Renderer(model, 32, 32).render().shape == (32, 32, 3)
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], env=bare_environment(), capture_output=True, text=True)
    assert run.stdout.strip().endswith("done"), run.stderr


def test_without_a_renderer_only_rendering_fails(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what renders fails, and says why. No renderer works for this platform of PyOpenGL."""
    monkeypatch.setenv("PYOPENGL_PLATFORM", "nonsense")
    make_dm_control("dm_control/cartpole-balance-v0").reset(seed=0)
    for kwargs in (dict(pixels=True), dict(render_mode="depth_array")):
        with pytest.raises(NoRendererError) as error:
            make_dm_control("dm_control/cartpole-balance-v0", **kwargs)  # type: ignore[arg-type]
        assert str(error.value) == NO_RENDERER
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.parametrize(("name", "value"), [("MUJOCO_GL", "nonsense"), ("DISPLAY", ":0"), ("WAYLAND_DISPLAY", "wayland-0")])
def test_mujoco_gl_is_not_changed_if_it_is_set(name: str, value: str, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    choose_renderer()
    assert os.environ.get("MUJOCO_GL") == (value if name == "MUJOCO_GL" else None)


ROBOTICS = (
    "FetchReach-v4",
    "HandReach-v3",
    "HandManipulateBlock-v1",
    "AdroitHandDoor-v1",
    "PointMaze_UMaze-v3",
    "AntMaze_UMaze-v5",
)


@pytest.mark.parametrize("task", ROBOTICS)
def test_tasks_of_gymnasium_robotics_are_made_and_move(task: str) -> None:
    register_robotics()
    register_robotics()
    env = gym.make(task)
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    after, reward, *_ = env.step(env.action_space.sample())
    assert env.observation_space.contains(after) and np.isfinite(reward)
    if isinstance(after, dict):
        observation, after = observation["observation"], after["observation"]
    assert not np.array_equal(after, observation)


def test_fetch_reaches_where_it_is_told_to() -> None:
    """The joints that the correction is about are where they should be: half a metre forwards, and nowhere else."""
    register_robotics()
    env = gym.make("FetchReach-v4")
    before = env.reset(seed=0)[0]["achieved_goal"]
    for _ in range(20):
        after = env.step(np.array([1, 0, 0, 0], np.float32))[0]["achieved_goal"]
    assert np.allclose(after - before, [0.43, 0, 0.01], atol=0.02)


def test_hindsight_on_fetch() -> None:
    register_robotics()
    settings = dict(SMALL[MFPO], learning_starts=100, policy_kwargs=SMALL_POLICY)
    model = MFPO("MultiInputPolicy", "FetchReach-v4", replay_buffer_class=HerReplayBuffer, **settings)
    model.learn(110)
    assert model._n_updates == 10 and model.replay_buffer.pos == 110
    assert model.predict(model.get_env().reset())[0].shape == (1, 4)


# HumanoidBench's shape, as far as newer packages break it: each task reads every array of MuJoCo's structures in a list, some
# of which MuJoCo 3.17 no longer has, and the package imports a module that imports JAX.
HUMANOID_BENCH = {
    "__init__.py": """
        import gymnasium as gym

        from .env import TASKS

        for task in TASKS:
            entry_point = "humanoid_bench.env:HumanoidEnv"
            gym.register(f"h1-{task}-v0", entry_point, max_episode_steps=1000, kwargs=dict(task=task))
        """,
    "env.py": """
        import gymnasium as gym
        import mujoco
        import numpy as np

        from humanoid_bench.dmc_deps import dmc_sizes

        from .wrappers import TorchPolicy

        TASKS = ("walk", "stand")
        BODY = "<mujoco><worldbody><body><joint/><geom size='.1'/></body></worldbody></mujoco>"

        class HumanoidEnv(gym.Env):
            observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
            action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

            def __init__(self, task, policy=False):
                self.model = mujoco.MjModel.from_xml_string(BODY)
                self.data = mujoco.MjData(self.model)
                self.named = {
                    struct: {name: getattr(owner, name) for name in dmc_sizes.array_sizes[struct]}
                    for struct, owner in (("mjmodel", self.model), ("mjdata", self.data))
                }
                self.policy = TorchPolicy(2) if policy else None

            def observe(self):
                return np.concatenate([self.data.qpos, self.data.qvel])

            def reset(self, *, seed=None, options=None):
                mujoco.mj_resetData(self.model, self.data)
                return self.observe(), {}

            def step(self, action):
                self.data.qfrc_applied[:] = action
                mujoco.mj_step(self.model, self.data)
                return self.observe(), float(self.named["mjdata"]["qvel"][0]), False, False, {}
        """,
    "wrappers.py": "from humanoid_bench.mjx.flax_to_torch import TorchPolicy",
    "mjx/flax_to_torch.py": """
        import torch
        import jax.numpy as jnp

        class TorchPolicy(torch.nn.Linear):
            def __init__(self, inputs):
                super().__init__(inputs, 1)

        def convert(weights):
            return jnp.transpose(weights)
        """,
    "dmc_deps/dmc_sizes.py": """
        array_sizes = {
            "mjmodel": {"body_mass": ("nbody",), "light_directional": ("nlight",), "tex_rgb": ("ntexdata",)},
            "mjdata": {"qLDiagSqrtInv": ("nv",), "qM": ("nM",), "qpos": ("nq",), "qvel": ("nv",)},
        }
        """,
}


def write_humanoid_bench(folder: Path) -> None:
    for name, content in HUMANOID_BENCH.items():
        (file := folder / "humanoid_bench" / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(content))


@pytest.fixture
def clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No HumanoidBench and no JAX before the test; what it imports and registers is gone after it."""
    monkeypatch.setattr(gym.envs.registration, "registry", registry := dict(gym.registry))
    monkeypatch.setattr(gym, "registry", registry)
    before = dict(sys.modules)
    ours = [name for name in before if name.split(".")[0] in ("humanoid_bench", "jax")]
    for name in ours:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "humanoid_bench"]:
        del sys.modules[name]
    sys.modules.update({name: before[name] for name in ours})


@pytest.fixture
def humanoid_bench(clean_imports: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of HumanoidBench's shape, and no JAX."""
    write_humanoid_bench(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "jax", None)
    return tmp_path / "humanoid_bench"


def test_humanoid_bench_alone_does_not_work(humanoid_bench: Path) -> None:
    """The package of the following tests fails as HumanoidBench does."""
    with pytest.raises(ImportError, match="jax"):
        importlib.import_module("humanoid_bench")
    (humanoid_bench / "wrappers.py").write_text("TorchPolicy = None")
    importlib.invalidate_caches()
    importlib.import_module("humanoid_bench")
    with pytest.raises(AttributeError, match="light_directional"):
        gym.make("h1-walk-v0")


def test_tasks_of_humanoid_bench_are_made_and_move(humanoid_bench: Path) -> None:
    register_humanoid_bench()
    register_humanoid_bench()
    assert sys.modules.get("jax") is None and "jax.numpy" not in sys.modules
    env = gym.make("h1-walk-v0")
    task: Any = env.unwrapped
    assert {name: set(arrays) for name, arrays in task.named.items()} == dict(mjmodel={"body_mass"}, mjdata={"qpos", "qvel"})
    env.reset(seed=0)
    observation, reward, *_ = env.step(np.ones(1, np.float32))
    assert observation[1] == reward > 0
    # What needs PyTorch, but not JAX, works
    policy: Any = gym.make("h1-stand-v0", policy=True).unwrapped
    assert policy.policy(th.zeros(3, 2)).shape == (3, 1)


def test_an_incomplete_humanoid_bench_is_named(humanoid_bench: Path) -> None:
    """An installation that is not editable has only folders with an `__init__.py`."""
    (humanoid_bench / "mjx" / "flax_to_torch.py").unlink()
    with pytest.raises(ImportError, match=r"flax_to_torch\.py is missing.*pip install --no-deps -e"):
        register_humanoid_bench()


def test_a_missing_humanoid_bench_is_named(clean_imports: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "humanoid_bench", None)
    with pytest.raises(ImportError, match=r"HumanoidBench need it.*sb3-mfpo\[dmc\].*pip install --no-deps -e"):
        register_humanoid_bench()


@pytest.mark.skipif(importlib.util.find_spec("humanoid_bench") is None, reason="needs HumanoidBench, which is not on PyPI")
@pytest.mark.parametrize("task", ["h1-walk-v0", "h1-crawl-v0", "h1hand-stand-v0"])
def test_tasks_of_the_real_humanoid_bench(task: str) -> None:
    register_humanoid_bench()
    env = gym.make(task)
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    after, reward, *_ = env.step(env.action_space.sample())
    assert env.observation_space.contains(after) and np.isfinite(reward) and not np.array_equal(after, observation)
