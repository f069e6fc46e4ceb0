"""Where a run was killed makes no difference: the state of environments and wrappers, and whole trainings that are killed."""

from __future__ import annotations

import csv
import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from dm_control import suite
from gymnasium import spaces, wrappers
from gymnasium.envs.classic_control import PendulumEnv
from rl_zoo3.gym_patches import PatchedTimeLimit
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_mfpo import MFPO, RunCheckpointCallback
from sb3_mfpo.envs import make_dm_control, register_dm_control
from sb3_mfpo.runs.environments import WRAPPERS, UnknownState, capture, restore
from tests import resumable
from tests.helpers import RandomEnv, make_model

register_dm_control()
CLASSIC = ("Pendulum-v1", "MountainCarContinuous-v0", "MountainCar-v0", "CartPole-v1", "Acrobot-v1")
MUJOCO = [
    f"{name}-v5"
    for name in (
        *("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum"),
        *("Pusher", "Reacher", "Swimmer", "Walker2d"),
    )
]
# Quadruped-escape renders at every reset, which needs a display or its replacement
DM_CONTROL = [f"dm_control/{domain}-{task}-v0" for domain, task in suite.ALL_TASKS if task != "escape"]


def make_task(task: str, **kwargs: Any) -> gym.Env:
    return make_dm_control(task, **kwargs) if task.startswith("dm_control/") else gym.make(task, **kwargs)


Steps = list[tuple[np.ndarray, ...]]


def drive(venv: VecEnv, n_steps: int, seed: int = 0) -> Steps:
    """What random actions lead to: observations, rewards, ends of episodes."""
    venv.action_space.seed(seed)
    steps = []
    for _ in range(n_steps):
        observations, rewards, dones, infos = venv.step(np.stack([venv.action_space.sample() for _ in range(venv.num_envs)]))
        values = list(observations.values()) if isinstance(observations, dict) else [observations]
        episodes = [[info["episode"][name] for name in "rl"] for info in infos if "episode" in info]
        steps.append((*(value.copy() for value in values), rewards.copy(), dones.copy(), np.array(episodes)))
    return steps


def assert_goes_on(make_env: Callable[[], VecEnv], before: int, after: int) -> None:
    """A new environment with the state of the old one does what the old one does."""
    old = make_env()
    old.seed(1)
    old.reset()
    drive(old, before)
    state = pickle.loads(pickle.dumps(capture(old)))
    assert state["unknown"] is None
    expected = drive(old, after, seed=1)
    new = make_env()
    new.seed(7)
    new.reset()
    drive(new, 3, seed=2)
    restore(new, state, within_episode=True)
    for step, (one, other) in enumerate(zip(expected, drive(new, after, seed=1), strict=True)):
        assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True)), step
    for venv in (old, new):
        venv.close()


# Tasks


@pytest.mark.parametrize("task", [*CLASSIC, *MUJOCO, *DM_CONTROL])
def test_a_task_resumes_within_an_episode(task: str) -> None:
    """In a new simulator, beyond the episode's end where that is near. Monitor's sums continue too."""
    limit = dict(max_episode_steps=40) if not task.startswith("dm_control/") else {}
    assert_goes_on(lambda: DummyVecEnv([lambda: Monitor(make_task(task, **limit))]), before=13, after=45)


@pytest.mark.parametrize("task", ["walker-stand", "hopper-hop", "quadruped-walk", "humanoid-run", "manipulator-bring_ball"])
def test_a_robot_that_lies_on_the_floor_resumes(task: str) -> None:
    """The next step begins from its contacts."""
    assert_goes_on(lambda: DummyVecEnv([lambda: make_task(f"dm_control/{task}-v0")]), before=150, after=20)


@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
def test_several_environments_resume(vec_env_class: type) -> None:
    tasks = [lambda length=length: Monitor(gym.make("Reacher-v5", max_episode_steps=length)) for length in (10, 7)]
    assert_goes_on(lambda: vec_env_class(tasks), before=12, after=25)


# Wrappers


# Gymnasium's own, whoever has imported rl_zoo3 before
time_limit: Any = PatchedTimeLimit.__base__


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=20)


def dictionary() -> gym.Env:
    space = spaces.Dict(vector=spaces.Box(-1, 1, (3,), np.float32), other=spaces.Box(-1, 1, (2,), np.float32))
    return RandomEnv(space)


def image() -> gym.Env:
    return RandomEnv(spaces.Box(0, 255, (8, 8, 3), np.uint8))


def double(value: Any) -> Any:
    return 2 * value


def keep(value: Any) -> Any:
    return value


# What makes an environment with the wrapper, by the wrapper's name
LAYERS: dict[str, Callable[[], gym.Env]] = {
    # Here as in a process of the zoo, which has replaced it
    "TimeLimit": lambda: time_limit(PendulumEnv(), 20),
    "PatchedTimeLimit": pendulum,
    # These are part of what `gymnasium.make` returns
    "OrderEnforcing": pendulum,
    "PassiveEnvChecker": pendulum,
    "DMControlTask": lambda: make_dm_control("dm_control/pendulum-swingup-v0"),
    "Monitor": lambda: Monitor(pendulum()),
    "RecordEpisodeStatistics": lambda: wrappers.RecordEpisodeStatistics(pendulum()),
    "FrameStackObservation": lambda: wrappers.FrameStackObservation(pendulum(), 3),
    "DelayObservation": lambda: wrappers.DelayObservation(pendulum(), 3),
    "TimeAwareObservation": lambda: wrappers.TimeAwareObservation(pendulum()),
    "MaxAndSkipObservation": lambda: wrappers.MaxAndSkipObservation(pendulum(), 2),
    "NormalizeObservation": lambda: wrappers.NormalizeObservation(pendulum()),
    "NormalizeReward": lambda: wrappers.NormalizeReward(pendulum()),
    "StickyAction": lambda: wrappers.StickyAction(pendulum(), 0.5, (2, 4)),
    "RepeatAction": lambda: wrappers.RepeatAction(pendulum(), 2),
    "ClipAction": lambda: wrappers.ClipAction(pendulum()),
    "RescaleAction": lambda: wrappers.RescaleAction(pendulum(), np.float32(-1), np.float32(1)),
    "TransformAction": lambda: wrappers.TransformAction(pendulum(), np.tanh, None),
    "DiscretizeAction": lambda: wrappers.DiscretizeAction(pendulum(), 5),
    "ClipReward": lambda: wrappers.ClipReward(pendulum(), -1, 1),
    "TransformReward": lambda: wrappers.TransformReward(pendulum(), double),
    "AddRenderObservation": lambda: wrappers.AddRenderObservation(gym.make("Pendulum-v1", render_mode="rgb_array")),
    "DiscretizeObservation": lambda: wrappers.DiscretizeObservation(RandomEnv(), 5),
    "DtypeObservation": lambda: wrappers.DtypeObservation(pendulum(), np.float64),
    "FilterObservation": lambda: wrappers.FilterObservation(dictionary(), ["vector"]),
    "FlattenObservation": lambda: wrappers.FlattenObservation(dictionary()),
    "GrayscaleObservation": lambda: wrappers.GrayscaleObservation(image()),
    "RescaleObservation": lambda: wrappers.RescaleObservation(RandomEnv(), np.float32(-2), np.float32(2)),
    "ReshapeObservation": lambda: wrappers.ReshapeObservation(image(), (8, 24)),
    "ResizeObservation": lambda: wrappers.ResizeObservation(image(), (4, 4)),
    "TransformObservation": lambda: wrappers.TransformObservation(pendulum(), double, None),
}
VEC_LAYERS: dict[str, Callable[[], VecEnv]] = {
    "DummyVecEnv": lambda: DummyVecEnv([pendulum, pendulum]),
    "SubprocVecEnv": lambda: SubprocVecEnv([pendulum, pendulum]),
    "VecNormalize": lambda: VecNormalize(DummyVecEnv([pendulum, pendulum])),
    "VecNormalize of a dictionary": lambda: VecNormalize(DummyVecEnv([dictionary]), norm_obs_keys=["vector"]),
    "VecNormalize of rewards": lambda: VecNormalize(DummyVecEnv([pendulum]), norm_obs=False),
    "VecMonitor": lambda: VecMonitor(DummyVecEnv([pendulum, pendulum])),
    "VecFrameStack": lambda: VecFrameStack(DummyVecEnv([pendulum, pendulum]), 3),
    "VecFrameStack of a dictionary": lambda: VecFrameStack(DummyVecEnv([dictionary]), 2),
    "VecTransposeImage": lambda: VecTransposeImage(DummyVecEnv([image])),
    "VecExtractDictObs": lambda: VecExtractDictObs(DummyVecEnv([dictionary]), "vector"),
    "VecCheckNan": lambda: VecCheckNan(DummyVecEnv([pendulum])),
}


def test_every_known_wrapper_is_tested() -> None:
    assert {name.split(".")[-1] for name in WRAPPERS} == {name.split(" ")[0] for name in (*LAYERS, *VEC_LAYERS)}


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrapper_resumes_within_an_episode(name: str) -> None:
    if name == "ResizeObservation":
        pytest.importorskip("cv2", reason="Gymnasium resizes with opencv")
    env = LAYERS[name]()
    layers = [type(env).__name__]
    while isinstance(env, gym.Wrapper):
        env = env.env
        layers.append(type(env).__name__)
    assert name in layers
    assert_goes_on(lambda: DummyVecEnv([LAYERS[name]]), before=9, after=45)


@pytest.mark.parametrize("name", VEC_LAYERS)
def test_a_wrapper_of_vectorized_environments_resumes(name: str) -> None:
    assert_goes_on(VEC_LAYERS[name], before=13, after=25)


def test_a_wrapper_of_a_user_without_attributes_has_no_state() -> None:
    class Halve(gym.ActionWrapper):
        def action(self, action: np.ndarray) -> np.ndarray:
            return action / 2

    assert_goes_on(lambda: DummyVecEnv([lambda: Halve(pendulum())]), before=9, after=25)


# What is not known


class Derived(PendulumEnv):
    """A user's class: it may have a state that its base does not have."""


class External:
    """A simulator elsewhere."""


def with_a_simulator() -> gym.Env:
    env = gym.make("Pendulum-v1")
    env.unwrapped.simulator = External()  # type: ignore[attr-defined]
    return env


class Failing(RandomEnv):
    def state_dict(self) -> dict[str, Any]:
        raise OSError("the simulator does not answer")


class NotToBePickled(RandomEnv):
    def state_dict(self) -> dict[str, Any]:
        return {"steps": lambda: self.steps}


UNKNOWN: dict[str, tuple[Callable[[], gym.Env], str]] = {
    "a class derived from a known one": (Derived, "Derived has no `state_dict`"),
    "an attribute that nobody knows": (with_a_simulator, "`simulator` of .*PendulumEnv is a .*External"),
    "a task of dm_control beyond its suite": (
        lambda: make_dm_control("dm_control/reach_site_features-v0"),
        "dm_control.composer.environment.Environment is not a task of dm_control's suite",
    ),
    "a state that is not to be had": (Failing, "Failing: OSError.*does not answer"),
    "a state that cannot be pickled": (NotToBePickled, "NotToBePickled: "),
}


class WrapperOfUser(VecEnvWrapper):
    """Offers a state that cannot be saved."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()

    def state_dict(self) -> Any:
        return lambda: None

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError


def test_a_wrapper_whose_state_cannot_be_pickled_does_not_end_the_training(tmp_path: Path) -> None:
    venv = WrapperOfUser(DummyVecEnv([RandomEnv]))
    with pytest.warns(UserWarning, match=r"do not hold the state of its environments: .*WrapperOfUser"):
        make_model(MFPO, venv).learn(20, callback=RunCheckpointCallback(10, tmp_path))
    with pytest.warns(UserWarning, match="begin new episodes"):
        assert MFPO.resume(tmp_path, venv).learn(30).num_timesteps == 30


class OldGenerator(RandomEnv):
    """Draws from a generator of NumPy's older kind."""

    def reset(self, **kwargs: Any) -> Any:
        self._np_random = getattr(self, "_np_random", None) or np.random.RandomState(kwargs.get("seed"))  # type: ignore
        return super().reset()

    def step(self, action: np.ndarray) -> Any:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, self._np_random.rand(), terminated, truncated, info


def test_random_generators_of_any_kind_resume() -> None:
    assert_goes_on(lambda: DummyVecEnv([OldGenerator]), before=9, after=20)


@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_environments_and_wrappers_are_named(case: str, vec_env_class: type) -> None:
    make_env, reason = UNKNOWN[case]
    venv = vec_env_class([make_env])
    venv.reset()
    state = capture(venv)
    assert state["unknown"] is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(state["unknown"])
    # The environment is there still
    drive(venv, 3)
    venv.close()


def test_environments_with_other_wrappers_begin_a_new_episode() -> None:
    """What belongs to the run is restored."""
    old = DummyVecEnv([lambda: Monitor(pendulum())])
    old.reset()
    drive(old, 50)
    new = VecMonitor(DummyVecEnv([lambda: Monitor(wrappers.ClipAction(pendulum()))]))
    new.reset()
    with pytest.raises(UnknownState, match=r"the environments were .*DummyVecEnv and are .*VecMonitor < .*DummyVecEnv"):
        restore(new, capture(old), within_episode=True)
    monitors: list[Any] = [venv.envs[0] for venv in (old, new.venv)]  # type: ignore[attr-defined]
    assert monitors[1].total_steps == 50 and monitors[1].episode_returns == monitors[0].episode_returns
    assert monitors[1].rewards == []


def test_the_state_of_another_robot_is_refused() -> None:
    old = DummyVecEnv([lambda: make_dm_control("dm_control/swimmer-swimmer6-v0")])
    new = DummyVecEnv([lambda: make_dm_control("dm_control/swimmer-swimmer15-v0")])
    for venv in (old, new):
        venv.reset()
    with pytest.raises(UnknownState, match="of the simulator's model is another one"):
        restore(new, capture(old), within_episode=True)


# Log and monitor files


def test_log_files_continue_without_repeated_rows(tmp_path: Path) -> None:
    """What a killed run had logged after its last checkpoint is not repeated."""
    formats = ["csv", "json", "log"]

    def train(folder: Path, steps: int, resumed: bool = False) -> None:
        env = Monitor(RandomEnv(), str(folder / "train"))
        callback = RunCheckpointCallback(20, tmp_path / f"checkpoints of {folder.name}", keep=9)
        if resumed:
            model = MFPO.resume(tmp_path / f"checkpoints of {folder.name}" / "run_20_steps.zip", env, device="cpu")
            for path in callback.save_path.glob("*.zip"):
                if "_20_" not in path.name:
                    path.unlink()
        else:
            model = make_model(MFPO, env, seed=0)
        model.set_logger(configure(str(folder), formats))
        model.learn(steps, callback=callback, log_interval=1)
        env.close()

    for folder in (tmp_path / "whole", tmp_path / "killed"):
        folder.mkdir()
    train(tmp_path / "whole", 50)
    train(tmp_path / "killed", 34)
    train(tmp_path / "killed", 50, resumed=True)
    for name in ("progress.csv", "train.monitor.csv"):
        assert resumable.rows(tmp_path / "killed" / name) == resumable.rows(tmp_path / "whole" / name)
    assert len(resumable.rows(tmp_path / "whole" / "train.monitor.csv")) == 7
    records = [
        [
            {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
            for line in (tmp_path / folder / "progress.json").read_text().splitlines()
        ]
        for folder in ("whole", "killed")
    ]
    assert len(records[0]) == 7 and records[0] == records[1]
    tables = [(tmp_path / folder / "log.txt").read_text().count("total_timesteps") for folder in ("whole", "killed")]
    assert tables == [7, 7]


def test_monitor_files_continue_where_the_episode_cannot(tmp_path: Path) -> None:
    """SB3's monitor empties its file when it is made."""

    def make_env() -> Any:
        return Monitor(wrappers.TimeLimit(Derived(), 10), str(tmp_path / "train"))

    with pytest.warns(UserWarning, match="do not hold the state"):
        make_model(MFPO, make_env()).learn(25, callback=RunCheckpointCallback(20, tmp_path))
    model = MFPO.resume(tmp_path, make_env())
    with pytest.warns(UserWarning, match="begin new episodes"):
        model.learn(45)
    with (tmp_path / "train.monitor.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [row["l"] for row in rows] == ["10"] * 4


def test_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = dict(seed=0, tensorboard_log=str(tmp_path / "log"))
    make_model(MFPO, Monitor(RandomEnv()), **kwargs).learn(
        34, callback=RunCheckpointCallback(20, tmp_path, keep=9), log_interval=1
    )
    (tmp_path / "run_34_steps.zip").unlink()
    MFPO.resume(tmp_path, Monitor(RandomEnv()), device="cpu").learn(50, log_interval=1)
    (folder,) = (tmp_path / "log").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("rollout/ep_rew_mean")] == [7, 14, 21, 28, 35, 42, 49]


# Trainings that are killed


def start(task: str, folder: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", resumable.__file__, task, str(folder), str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen) -> dict[str, str]:
    output, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


def survives(task: str, kills: int, steps: int, longest: float, tmp_path: Path) -> None:
    """Killed at random moments, many times, and in the end the same as a run that was left alone."""
    draw = random.Random(task)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    expected = result(start(task, tmp_path / "whole", steps))
    for _ in range(kills):
        process = start(task, tmp_path / "killed", steps)
        assert process.stdout is not None and process.stdout.readline() == "training\n"
        time.sleep(draw.uniform(0, longest))
        assert process.poll() is None, "The run was over before it could be killed"
        process.kill()
        process.wait()
    killed = result(start(task, tmp_path / "killed", steps))
    assert {"policy", "observations", "torch", "evaluations", "0.monitor.csv"} <= set(expected)
    assert {name for name in expected if killed.get(name) != expected[name]} == set()


# The other one that MuJoCo simulates is for every night
@pytest.mark.parametrize("task", [task for task in resumable.TASKS if task != "HalfCheetah"])
def test_a_killed_run_equals_the_uninterrupted_one(task: str, tmp_path: Path) -> None:
    survives(task, kills=1, steps=300, longest=1.0, tmp_path=tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("task", resumable.TASKS)
def test_a_run_that_is_killed_ten_times_equals_the_uninterrupted_one(task: str, tmp_path: Path) -> None:
    survives(task, kills=10, steps=3000, longest=3.0, tmp_path=tmp_path)
