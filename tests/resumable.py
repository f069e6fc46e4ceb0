"""
A script that begins a training or resumes it, as a user writes it. Tests kill it and compare its runs.

    python tests/resumable.py TASK FOLDER STEPS
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics, RescaleAction, TimeLimit, TransformReward
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize

from sb3_mfpo import MFPO, RunCheckpointCallback
from sb3_mfpo.envs import make_dm_control
from sb3_mfpo.runs.checkpoint import checkpoints
from sb3_mfpo.runs.state import random_states

SMALL: dict[str, Any] = dict(
    learning_starts=20,
    batch_size=8,
    buffer_size=5000,
    n_gaussian_samples=2,
    n_local_samples=2,
    policy_kwargs=dict(
        net_arch=[8], time_fourier_dim=4, time_embedding_dim=4, action_fourier_dim=4, n_atoms=5, v_min=-300, v_max=300
    ),
)


def double(reward: float) -> float:
    return 2 * reward


def wrapped_pendulum() -> gym.Env:
    env = RescaleAction(gym.make("Pendulum-v1"), np.float32(-1), np.float32(1))
    return RecordEpisodeStatistics(FrameStackObservation(TransformReward(env, double), 3))


# What makes the environment, in episodes of about a hundred steps, and arguments
TASKS: dict[str, tuple[Callable[[], gym.Env], dict[str, Any]]] = {
    "HalfCheetah": (lambda: gym.make("HalfCheetah-v5", max_episode_steps=90), {}),
    "Pendulum": (wrapped_pendulum, dict(action_noise=OrnsteinUhlenbeckActionNoise(np.zeros(1), np.full(1, 0.1)))),
    "dm_control": (lambda: TimeLimit(make_dm_control("dm_control/cartpole-swingup-v0"), 90), dict(n_steps=3)),
    "two processes": (lambda: gym.make("Reacher-v5"), dict(gradient_steps=-1)),
}


def make_envs(task: str, folder: Path) -> tuple[VecEnv, VecEnv]:
    """To train and to evaluate in."""
    make_task, _ = TASKS[task]
    if task != "two processes":
        return (DummyVecEnv([lambda: Monitor(make_task(), str(folder / "0"))]), DummyVecEnv([lambda: Monitor(make_task())]))
    processes = [lambda rank=rank: Monitor(make_task(), str(folder / f"{rank}")) for rank in range(2)]
    return (
        VecNormalize(VecMonitor(SubprocVecEnv(processes), str(folder / "all"))),  # type: ignore[arg-type]
        VecNormalize(VecMonitor(DummyVecEnv([make_task])), training=False),
    )


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a log or monitor file, without times."""
    with path.open() as file:
        lines = [line for line in file if not line.startswith("#")]
    return [
        # The order of SB3's columns follows Python's hash seed
        {name: value for name, value in sorted(row.items()) if name != "t" and not name.startswith("time/")}
        for row in csv.DictReader(lines)
    ]


def digest(value: Any) -> str:
    """Of numbers, tensors and arrays in dictionaries and lists, bit for bit."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in value:
                add((key, value[key]))
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        elif isinstance(value, th.Tensor):
            found.update(value.detach().numpy().tobytes())
        else:
            found.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())

    add(value)
    return found.hexdigest()


def all_of(model: MFPO, folder: Path) -> dict[str, Any]:
    """Weights, optimizers, replay buffer, random states, statistics, log and monitor files."""
    parts: dict[str, Any] = dict(model.get_parameters())
    parts |= {name: value for name, value in vars(model.replay_buffer).items() if isinstance(value, np.ndarray)}
    parts |= random_states(model)
    parts["counters"] = [model.num_timesteps, model._n_updates, model._episode_num]
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        parts["normalizer"] = [vars(normalizer.obs_rms), vars(normalizer.ret_rms), normalizer.returns]
    for path in sorted(folder.glob("*.csv")):
        parts[path.name] = rows(path)
        assert parts[path.name]
    evaluations = np.load(folder / "evaluations.npz")
    parts["evaluations"] = [evaluations["timesteps"], evaluations["results"]]
    return parts


def main(task: str, folder: Path, steps: int) -> None:
    th.set_num_threads(1)
    env, evaluation_env = make_envs(task, folder)
    if checkpoints(folder, "run"):
        model = MFPO.resume(folder, env, device="cpu")
    else:
        model = MFPO("MlpPolicy", env, seed=0, device="cpu", **{**SMALL, **TASKS[task][1]})
        evaluation_env.seed(1)
    model.set_logger(configure(str(folder), ["csv"]))
    print("training", flush=True)
    evaluation = EvalCallback(evaluation_env, eval_freq=150, n_eval_episodes=1, log_path=str(folder), verbose=0)
    model.learn(steps, callback=[evaluation, RunCheckpointCallback(37, folder)], log_interval=1)
    print(json.dumps({name: digest(value) for name, value in all_of(model, folder).items()}), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
