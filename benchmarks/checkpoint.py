"""
Two measurements of checkpoints. A training process is killed at random moments, many of them while it writes a checkpoint of a
200 MB replay buffer, and must resume from a complete one every time. And the time and memory of saving and loading a buffer of
a million HalfCheetah transitions.

    python benchmarks/checkpoint.py --output benchmarks/results/checkpoint.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from machine import versions
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mfpo import MFPO, RunCheckpointCallback
from sb3_mfpo.runs.checkpoint import checkpoints, read_newest_run, write_run
from sb3_mfpo.runs.state import run_state

# Sizes of observation and action, as HalfCheetah's
SIZES = (17, 6)


class RandomTask(gym.Env):
    """Random numbers of HalfCheetah's sizes, in its buffer's type."""

    observation_space = spaces.Box(-1, 1, SIZES[:1], np.float32)
    action_space = spaces.Box(-1, 1, SIZES[1:], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.observation_space.sample(), 0.0, False, False, {}

    def state_dict(self) -> dict[str, Any]:
        # The random numbers of the spaces are saved with any environment
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def make_model(buffer_size: int, **kwargs: Any) -> MFPO:
    """A model with a buffer full of random numbers."""
    model = MFPO("MlpPolicy", RandomTask(), buffer_size=buffer_size, learning_starts=0, device="cpu", **kwargs)
    buffer: Any = model.replay_buffer
    generator = np.random.default_rng(0)
    for name in ("observations", "next_observations", "actions", "rewards"):
        generator.standard_normal(dtype=np.float32, out=getattr(buffer, name))
    buffer.full = True
    return model


class Announce(BaseCallback):
    """Says that training begins; by then, what the last kill had left half-written is gone."""

    def _on_training_start(self) -> None:
        print("training", flush=True)

    def _on_step(self) -> bool:
        return True


def train(folder: Path, buffer_size: int) -> None:
    """The process that is killed: it begins or resumes, saves every 20 steps, and never ends by itself."""
    th.set_num_threads(1)
    if checkpoints(folder, "run"):
        model = MFPO.resume(folder, RandomTask(), device="cpu")
    else:
        small = dict(net_arch=[32], time_fourier_dim=8, time_embedding_dim=8, n_atoms=11)
        model = make_model(buffer_size, batch_size=16, n_gaussian_samples=4, n_local_samples=4, policy_kwargs=small)
    model.learn(10**9, callback=[RunCheckpointCallback(20, folder), Announce()])


def kill(folder: Path, kills: int, buffer_size: int, seed: int = 0) -> dict[str, Any]:
    """Kill a training again and again; after every time the newest checkpoint must be whole and no older than before."""
    draw, steps, writing, survived = random.Random(seed), 0, 0, 0
    command = [sys.executable, __file__, "--train", str(folder), "--buffer-size", str(buffer_size)]
    for number in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.stdout is not None and process.stdout.readline() == "training\n"
        if number == 0:
            # There must be a checkpoint to resume from
            while not checkpoints(folder, "run"):
                time.sleep(0.05)
        if number % 2 == 0:
            time.sleep(draw.uniform(0, 2))
        else:
            # In the middle of a checkpoint: some share of it has been written
            share = draw.uniform(0, 0.9) * max(path.stat().st_size for path in checkpoints(folder, "run"))
            while written(folder) < share:
                time.sleep(0.001)
        writing += bool(list(folder.glob("*.tmp")))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with warnings.catch_warnings():
            # The newest one: no falling back
            warnings.simplefilter("error")
            path, state = read_newest_run(folder, "run")
        assert state["replay_buffer"].observations.shape[0] == buffer_size
        now = int(path.stem.split("_")[1])
        assert now >= steps, f"{now} steps after {steps}"
        survived, steps = survived + 1, now
        print(f"kill {number + 1}: on from step {steps}", flush=True)
    (size,) = {path.stat().st_size for path in checkpoints(folder, "run")[:1]}
    return {"kills": kills, "survived": survived, "while writing": writing, "steps": steps, "checkpoint in MB": 1e-6 * size}


def written(folder: Path) -> float:
    """Bytes of the checkpoint that is being written, 0 if there is none."""
    with suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in folder.glob("*.tmp"))
    return 0


def resident(what: str) -> float:
    """Megabytes, from the system's account of this process (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024e-6 * int(line.split()[1])


def save(folder: Path, transitions: int, rounds: int) -> dict[str, Any]:
    """Time and memory of saving and loading a full buffer, beside a plain write of as many bytes in the same minute."""
    model = make_model(transitions)
    callback = RunCheckpointCallback(10**9, folder, on_signals=False)
    model.learn(1, callback=callback)
    path = checkpoints(folder, "run")[0]
    data, seconds, plain = np.random.default_rng(0).bytes(path.stat().st_size), [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with (folder / "plain").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        plain.append(time.perf_counter() - start)
        start = time.perf_counter()
        write_run(model, run_state(model, callback), path)
        seconds.append(time.perf_counter() - start)
    del data
    # Resets the peak to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    write_run(model, run_state(model, callback), path)
    peak = resident("VmHWM") - before
    start = time.perf_counter()
    MFPO.resume(path, RandomTask(), device="cpu")
    return {
        "transitions": transitions,
        "checkpoint in MB": 1e-6 * path.stat().st_size,
        "seconds to save": sorted(seconds),
        "seconds of a plain write with fsync": sorted(plain),
        "ratio, median": float(np.median(np.array(seconds) / np.array(plain))),
        "peak memory of saving in MB": peak,
        "seconds to resume": time.perf_counter() - start,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--buffer-size", type=int, default=1_200_000, help="transitions in the training that is killed")
    parser.add_argument("--transitions", type=int, default=1_000_000, help="in the buffer whose saving is measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train:
        train(options.train, options.buffer_size)
        return {}
    with tempfile.TemporaryDirectory() as kill_folder, tempfile.TemporaryDirectory() as save_folder:
        results = {
            "command": " ".join(["python", "benchmarks/checkpoint.py", *(sys.argv[1:] if arguments is None else arguments)]),
            "versions": versions(),
            "save": save(Path(save_folder), options.transitions, options.rounds),
            "kill": kill(Path(kill_folder), options.kills, options.buffer_size),
        }
    print(json.dumps(results, indent=2))
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
