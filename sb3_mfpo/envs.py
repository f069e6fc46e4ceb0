"""Tasks ready for Stable-Baselines3: DeepMind Control through shimmy, Gymnasium-Robotics and HumanoidBench."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

NO_RENDERER = (
    "No offscreen rendering: install an EGL driver (`apt install libegl1 libgl1-mesa-dri`); only videos and pixels need it."
)
RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render().shape == (32, 32, 3)
"""
# These modules read MUJOCO_GL when they are imported
CHOOSE_WHEN_IMPORTED = ("dm_control._render", "mujoco.rendering.classic.gl_context")
INSTALL_HUMANOID_BENCH = (
    "`git clone https://github.com/carlosferrazza/humanoid-bench && pip install --no-deps -e ./humanoid-bench`"
)
REACH_POLICY = "humanoid_bench.mjx.flax_to_torch"


class NoRendererError(RuntimeError):
    """Nothing can be rendered on this machine."""


def find_renderer() -> str | None:
    """
    :return: The first of MUJOCO_GL, egl, osmesa and glfw that renders, each tried in its own process
    """
    chosen = os.environ.get("MUJOCO_GL")
    for name in ([chosen] if chosen else []) + ["egl", "osmesa", "glfw"]:
        environment = {**os.environ, "MUJOCO_GL": name}
        try:
            run = subprocess.run([sys.executable, "-c", RENDER], env=environment, capture_output=True, timeout=60)
        except subprocess.TimeoutExpired:
            continue
        if run.returncode == 0:
            return name
    return None


def has_display() -> bool:
    """
    :return: Whether a window can be opened, by the environment variables
    """
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def choose_renderer() -> None:
    """
    Where no window can be opened and MUJOCO_GL is not set, set it to a renderer that works. The first call takes a second or
    more.

    :raises NoRendererError: If nothing renders
    """
    if "MUJOCO_GL" in os.environ or has_display():
        return
    renderer = find_renderer()
    if renderer is None:
        raise NoRendererError(NO_RENDERER)
    os.environ["MUJOCO_GL"] = renderer
    for name in CHOOSE_WHEN_IMPORTED:
        if name in sys.modules:
            importlib.reload(sys.modules[name])


def renders_offscreen(render_mode: str | None) -> bool:
    """
    :param render_mode: Of an environment
    :return: Whether it renders without a window
    """
    return render_mode not in (None, "human")


class DMControlTask(gym.Wrapper):
    """
    A DeepMind Control task as ``MlpPolicy`` wants it: one float32 vector as observation, float32 actions with finite bounds,
    the time limit in ``spec``. At the time limit the episode is truncated, not terminated (shimmy sees to that).

    :param env: A task from shimmy, with Dict observations
    :raises ValueError: If an action bound is infinite
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        flat = spaces.flatten_space(env.observation_space)
        assert isinstance(flat, spaces.Box)
        self.observation_space = spaces.Box(flat.low.astype(np.float32), flat.high.astype(np.float32), dtype=np.float32)
        actions = env.action_space
        assert isinstance(actions, spaces.Box)
        if not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
            raise ValueError(
                f"The task's actions are unbounded ({actions}): wrap it in `gymnasium.wrappers.RescaleAction` first."
            )
        self.action_space = spaces.Box(actions.low.astype(np.float32), actions.high.astype(np.float32), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._flatten(observation), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        actions = self.env.action_space
        assert isinstance(actions, spaces.Box)
        # Rounding to float32 may have moved a bound beyond the task's own
        clipped = np.clip(np.asarray(action, actions.dtype), actions.low, actions.high)
        observation, reward, terminated, truncated, info = self.env.step(clipped)
        return self._flatten(observation), float(reward), terminated, truncated, info

    def _flatten(self, observation: Any) -> np.ndarray:
        return np.asarray(spaces.flatten(self.env.observation_space, observation), np.float32)

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        spec, limit = self.env.spec, time_limit(self.env)
        return spec if spec is None or limit is None else dataclasses.replace(spec, max_episode_steps=limit)


def time_limit(env: gym.Env) -> int | None:
    """
    :param env: A task from shimmy
    :return: Number of steps after which an episode is truncated, None without a limit
    """
    task: Any = env.unwrapped
    limit = getattr(task, "_step_limit", None)
    if limit is None:
        # Composer tasks have a limit in seconds
        limit = getattr(task, "_time_limit", np.inf) / task.control_timestep()
    return round(float(limit)) if np.isfinite(limit) else None


@dataclasses.dataclass
class ReadyEntryPoint:
    """
    Makes a task with shimmy's entry point and prepares it for SB3.

    :param entry_point: From one of shimmy's specs
    """

    entry_point: Any

    def __call__(self, pixels: bool = False, image_size: int = 84, **kwargs: Any) -> gym.Env:
        if pixels:
            view = dict(height=image_size, width=image_size, camera_id=0)
            kwargs |= dict(render_mode="rgb_array", render_kwargs={**view, **(kwargs.get("render_kwargs") or {})})
        if renders_offscreen(kwargs.get("render_mode")):
            choose_renderer()
        env: gym.Env = DMControlTask(self.entry_point(**kwargs))
        return gym.wrappers.AddRenderObservation(env, render_only=True) if pixels else env


def is_of_shimmy(spec: EnvSpec) -> bool:
    """
    :param spec: A task's spec
    :return: Whether shimmy makes the task from one of DeepMind Control, under any id
    """
    maker: Any = spec.entry_point
    if isinstance(maker, ReadyEntryPoint):
        return True
    function = maker.func if isinstance(maker, functools.partial) else maker
    # shimmy's functions have no public names
    name = getattr(function, "__name__", "")
    return getattr(function, "__module__", None) == "shimmy.registration" and name.startswith("_make_dm_control")


def ready_spec(spec: EnvSpec) -> EnvSpec:
    """
    :param spec: One of shimmy's, or one that this function returned
    :return: The spec with an entry point that prepares the task; its ``make`` also takes ``pixels`` and ``image_size``
    """
    if isinstance(spec.entry_point, ReadyEntryPoint):
        return spec
    return dataclasses.replace(spec, entry_point=ReadyEntryPoint(spec.entry_point))


def register_dm_control() -> None:
    """
    Let shimmy register the tasks of DeepMind Control with Gymnasium.

    :raises ImportError: If shimmy or dm_control is not installed
    """
    try:
        import dm_control  # noqa: F401
        import shimmy
    except ImportError as error:
        raise ImportError(f"DeepMind Control tasks need shimmy and dm_control ({error}): install `sb3-mfpo[dmc]`.") from error
    gym.register_envs(shimmy)


def make_dm_control(env_id: str, pixels: bool = False, image_size: int = 84, **kwargs: Any) -> gym.Env:
    """
    Make a DeepMind Control task for ``MlpPolicy``, or from pixels for ``CnnPolicy``. If it renders, MUJOCO_GL is set to a
    renderer that works, unless it is set already or there is a display.

    :param env_id: Gymnasium id, such as "dm_control/dog-run-v0"
    :param pixels: Whether to observe rendered images instead of the state
    :param image_size: Their width and height in pixels
    :param kwargs: Those of ``gymnasium.make``, such as ``render_mode="rgb_array"``
    :return: The task
    :raises ImportError: If shimmy or dm_control is not installed
    :raises ValueError: If there is no such task, or it is not one of shimmy's
    :raises NoRendererError: If the task renders and no renderer works
    """
    register_dm_control()
    if env_id not in gym.registry or not is_of_shimmy(gym.spec(env_id)):
        raise ValueError(
            f'`env_id` must be the id of a DeepMind Control task of shimmy such as "dm_control/dog-run-v0", not {env_id!r}; '
            "make a task of your own with `gymnasium.make`."
        )
    return ready_spec(gym.spec(env_id)).make(pixels=pixels, image_size=image_size, **kwargs)


def register_robotics() -> None:
    """
    Let Gymnasium-Robotics register its tasks with Gymnasium, and correct what keeps Fetch and Hand from being made with MuJoCo
    3.17, where they end with an ``AssertionError``: they ask whether a NumPy integer is ``in`` a tuple of MuJoCo's enums, and
    these no longer equal such an integer from the left.

    :raises ImportError: If Gymnasium-Robotics or MuJoCo is not installed
    """
    try:
        import gymnasium_robotics
        import mujoco
        from gymnasium_robotics.utils import mujoco_utils
    except ImportError as error:
        raise ImportError(
            f"Tasks of Gymnasium-Robotics need it and MuJoCo ({error}): install `sb3-mfpo[robotics]`."
        ) from error
    gym.register_envs(gymnasium_robotics)
    joints = mujoco.mjtJoint
    if joints.mjJNT_HINGE != np.int32(int(joints.mjJNT_HINGE)):
        equal = enum.IntEnum("mjtJoint", {name: int(value) for name, value in joints.__members__.items()})  # type: ignore[misc]
        mujoco_utils.mujoco = SimpleNamespace(**{**vars(mujoco), "mjtJoint": equal})


def register_humanoid_bench() -> None:
    """
    Let HumanoidBench register its tasks with Gymnasium, and correct what keeps them from being made with newer packages than
    those it pins: it reads arrays that MuJoCo 3.17 no longer has, and imports JAX, which no task needs.

    :raises ImportError: If HumanoidBench, dm_control or MuJoCo is not installed
    """
    try:
        import mujoco

        if REACH_POLICY not in sys.modules and importlib.util.find_spec("jax") is None:
            _import_reach_policy_without_jax()
        import humanoid_bench
        from humanoid_bench.dmc_deps import dmc_sizes
    except ImportError as error:
        raise ImportError(
            f"Tasks of HumanoidBench need it, dm_control and MuJoCo ({error}): install `sb3-mfpo[dmc]`, and "
            f"{INSTALL_HUMANOID_BENCH}."
        ) from error
    gym.register_envs(humanoid_bench)
    for struct, owner in (("mjmodel", mujoco.MjModel), ("mjdata", mujoco.MjData)):
        arrays = dmc_sizes.array_sizes[struct]
        for name in [name for name in arrays if not hasattr(owner, name)]:
            del arrays[name]


def _import_reach_policy_without_jax() -> None:
    # This module of HumanoidBench uses JAX only to convert files, which no task does. An empty JAX takes its place, and only
    # while this one module is imported, because other packages ask whether JAX is there.
    package = importlib.util.find_spec("humanoid_bench")
    if package is None or not package.submodule_search_locations:
        raise ImportError("No module named 'humanoid_bench'")
    file = Path(package.submodule_search_locations[0], "mjx", "flax_to_torch.py")
    if not file.is_file():
        # An installation that is not editable leaves such folders out
        raise ImportError(f"{file} is missing")
    spec = importlib.util.spec_from_file_location(REACH_POLICY, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    empty = {name: ModuleType(name) for name in ("jax", "jax.numpy")}
    sys.modules.update(empty)
    try:
        spec.loader.exec_module(module)
    finally:
        for name in empty:
            del sys.modules[name]
    sys.modules[REACH_POLICY] = module
