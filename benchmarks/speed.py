"""
Cost of MFPO and SOM against SB3's SAC and TD3 and sb3-contrib's TQC, all with two layers of 256: gradient step, action,
whole training loop; where MFPO's gradient step spends its time, how many operators it has and how much memory it takes.

All take turns within one process, so that other load on the machine meets them alike; a ratio is the median over the rounds of
the ratio within a round, with the quartiles as its spread. On a GPU, gradient steps are timed by CUDA events.

    python benchmarks/speed.py --output benchmarks/results/speed.json
    python benchmarks/speed.py --device cuda --output benchmarks/results/speed_cuda.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from machine import processor, versions
from plain import PlainMFPO
from sb3_contrib import TQC
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.nets import layers
from sb3_mfpo.training.actor_critic import ActorCriticAlgorithm

# Sizes of observation and action
TASKS = {"HalfCheetah": (17, 6), "Humanoid": (348, 17), "dog": (223, 38)}
BATCH_SIZE = 256
# Gradient steps that are timed, profiled and counted together
STEPS = 8
# Methods between which a gradient step's time is divided; a method's share leaves out those within it
PARTS = {
    "replay buffer": ("replay_buffer", "sample"),
    "random numbers": ("", "_draw"),
    "critics: target and loss": ("", "_td_loss"),
    "samples of the policy": ("policy", "sample"),
    "centres of proposals, entropy": ("", "_centres"),
    "values of the proposals": ("critic", "q_values"),
    "Gaussian proposals, weights": ("", "_boltzmann_velocity"),
    "mean-flow regressions": ("", "_regression_errors"),
    "backward and optimizers": ("", "_descend"),
    "targets": ("", "_update_target"),
}
Kind = tuple[type[OffPolicyAlgorithm], dict[str, Any]]
KINDS: dict[str, Kind] = {
    "SAC": (SAC, {}),
    "TD3": (TD3, {}),
    "TQC": (TQC, {}),
    "MFPO": (MFPO, {}),
    "MFPO, paper": (MFPO, MFPO.PAPER),
    "MFPO, plain": (PlainMFPO, MFPO.PAPER),
    "SOM": (SOM, {}),
}
COMPILED: dict[str, Kind] = {"MFPO, compiled": (MFPO, dict(compile_step=True))}
# Batches of observations to act on, and how often one is repeated
BATCHES = {1: 20, 16: 5, 256: 1}
Rows = dict[str, dict[str, float]]


class RandomTask(gym.Env):
    """Random numbers of a task's sizes: observations cost nothing, so that only the algorithms are timed."""

    def __init__(self, observation_dim: int, action_dim: int):
        self.observation_space = spaces.Box(-1, 1, (observation_dim,), np.float32)
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.observation_space.sample(), 0.0, False, False, {}


def make_models(env: Callable[[], gym.Env], width: int, device: str, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """A model of each kind, its buffer filled with 300 random steps."""
    common = dict(learning_starts=300, buffer_size=10_000, batch_size=BATCH_SIZE, device=device)
    models = {
        name: algorithm(
            "MlpPolicy",
            env(),
            **{**common, **kwargs, "policy_kwargs": {**kwargs.get("policy_kwargs", {}), "net_arch": [width] * 2}},
        )
        for name, (algorithm, kwargs) in kinds.items()
    }
    for model in models.values():
        model.learn(300)
    return models


def seconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Of one call, the mean over the repeats; by CUDA events on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats
    first, last = (th.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        function()
    last.record()
    th.cuda.synchronize()
    return 1e-3 * first.elapsed_time(last) / repeats


def compare(
    functions: Mapping[str, Callable[[], Any]], rounds: int, references: tuple[str, ...], device: str, repeats: int = 1
) -> Rows:
    """
    Median milliseconds per call, and the ratios to the references within a round: median and quartiles. Warm-up is dropped.
    Calls are repeated where the first one, which finds the caches empty, is not the usual one.
    """
    timings = defaultdict(list)
    order = random.Random(0)
    for _ in range(rounds + 5):
        # In a new order each time: what runs after a large computation finds the caches empty
        for name in order.sample(list(functions), len(functions)):
            timings[name].append(seconds(functions[name], device, repeats))
    results: Rows = {}
    for name, values in timings.items():
        results[name] = {"milliseconds": 1e3 * float(np.median(values[5:]))}
        for reference in references:
            low, median, high = np.percentile(np.array(values[5:]) / np.array(timings[reference][5:]), [25, 50, 75])
            key = f"ratio to {reference}"
            results[name] |= {key: float(median), f"{key}, 25 %": float(low), f"{key}, 75 %": float(high)}
    return results


def gradient_steps(
    models: dict[str, Any], rounds: int, device: str, references: tuple[str, ...], batch_size: int = BATCH_SIZE
) -> Rows:
    """``STEPS`` at a time: MFPO and SOM update their policies once or twice, TD3 at every second step."""
    functions = {name: partial(model.train, gradient_steps=STEPS, batch_size=batch_size) for name, model in models.items()}
    return compare(functions, rounds, references, device)


def exported(model: Any) -> Callable[[np.ndarray], Any]:
    """Deterministic actions of an ONNX file in onnxruntime, on the CPU with as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = th.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        model.policy.export(Path(folder) / "policy.onnx")
        session = onnxruntime.InferenceSession(Path(folder) / "policy.onnx", options)
    return lambda observation: session.run(["action"], {"observation": np.atleast_2d(observation)})


def actions(
    models: dict[str, Any],
    rounds: int,
    names: tuple[str, ...] = ("SAC", "TD3", "TQC", "MFPO", "SOM"),
    from_files: tuple[str, ...] = ("MFPO", "SOM"),
    batches: Mapping[int, int] = BATCHES,
) -> dict[str, Rows]:
    """
    ``predict``, and of some models the same from a file, for a single observation and for batches, wall time: the action
    comes back to the CPU in any case.
    """
    space, results = models["SAC"].observation_space, {}
    files = {name: exported(models[name]) for name in from_files}
    for batch, repeats in batches.items():
        observation = space.sample() if batch == 1 else np.stack([space.sample() for _ in range(batch)])
        functions = {
            f"{name}, {kind}": partial(models[name].predict, observation, deterministic=kind == "deterministic")
            for name in names
            for kind in ("stochastic", "deterministic")
        }
        functions |= {f"{name}, exported": partial(act, observation) for name, act in files.items()}
        results[f"action, batch of {batch}"] = compare(functions, 2 * rounds, ("SAC, stochastic",), "cpu", repeats)
    return results


def whole_loop(env_id: str, width: int, steps: int, rounds: int, device: str, kinds: Mapping[str, Kind]) -> Rows:
    """Environment steps with one gradient step each, per second of ``learn``."""
    models = make_models(lambda: gym.make(env_id), width, device, kinds)
    functions = {name: partial(model.learn, steps, reset_num_timesteps=False) for name, model in models.items()}
    rows = compare(functions, rounds, ("SAC",), device)
    return {name: row | {"steps per second": 1e3 * steps / row["milliseconds"]} for name, row in rows.items()}


def profile(model: MFPO, rounds: int) -> dict[str, float]:
    """Share of a gradient step's time by part. On a GPU every part waits for the device."""
    spent: dict[str, float] = defaultdict(float)
    running: list[str] = []

    def clock() -> float:
        if model.device.type == "cuda":
            th.cuda.synchronize()
        return time.perf_counter()

    def timed(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = clock()
        running.append(name)
        result = function(*args, **kwargs)
        running.pop()
        duration = clock() - start
        spent[name] += duration
        if running:
            spent[running[-1]] -= duration
        return result

    for name, (owner_name, method) in PARTS.items():
        owner = getattr(model, owner_name) if owner_name else model
        object.__setattr__(owner, method, partial(timed, name, getattr(owner, method)))
    for _ in range(rounds):
        timed("rest", model.train, gradient_steps=STEPS, batch_size=BATCH_SIZE)
    return {name: value / sum(spent.values()) for name, value in spent.items()}


class CountOperators(TorchDispatchMode):
    """Names of the operators that do work: views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not (func.is_view or name.startswith("profiler.") or name.split(".")[1] in ("detach", "_unsafe_view")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def path_of_a_gpu() -> Iterator[None]:
    """On a CPU, take the path that a GPU takes: no chunks, losses looked at only at the end."""
    with (
        mock.patch.object(layers, "CACHED_ROWS", sys.maxsize),
        mock.patch.object(layers, "MANY_NUMBERS", sys.maxsize),
        mock.patch.object(ActorCriticAlgorithm, "_looks_at_losses_late", lambda self, optimizer: True),
    ):
        yield


def operators(models: dict[str, OffPolicyAlgorithm]) -> dict[str, int]:
    """Operators of ``STEPS`` gradient steps, MFPO's and SOM's as on a GPU."""
    counts = {}
    for name in ("SAC", "TD3", "TQC", "MFPO", "SOM", "MFPO, paper", "MFPO, plain"):
        with path_of_a_gpu(), CountOperators() as counter:
            models[name].train(gradient_steps=STEPS, batch_size=BATCH_SIZE)
        counts[name] = len(counter.names)
    return counts


def peak_memory(task: str, width: int, device: str, threads: int) -> float | None:
    """
    Megabytes that the first ``STEPS`` gradient steps take at their peak above what the process, or on a GPU PyTorch, held
    before. They also create the optimizers' states, twice the size of the networks. None where the system does not tell.
    """
    th.set_num_threads(threads)
    model = MFPO(
        "MlpPolicy", RandomTask(*TASKS[task]), device=device, policy_kwargs=dict(net_arch=[width] * 2), buffer_size=1000
    )
    model.learn(100)
    if device == "cuda":
        before = th.cuda.memory_allocated()
        th.cuda.reset_peak_memory_stats()
        model.train(STEPS, BATCH_SIZE)
        return 1e-6 * (th.cuda.max_memory_allocated() - before)
    if not Path("/proc/self/clear_refs").exists():
        return None

    def resident(what: str) -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
        return 1024e-6 * int(line.split()[1])

    # Resets the peak to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    resident_before = resident("VmRSS")
    model.train(STEPS, BATCH_SIZE)
    return resident("VmHWM") - resident_before


def hardware() -> dict[str, Any]:
    gpu = th.cuda.get_device_name() if th.cuda.is_available() else None
    return {"processor": processor(), "cores": os.cpu_count(), "gpu": gpu}


def ratio_to(reference: str, row: Mapping[Any, Any]) -> str:
    """
    :param reference: Name of an algorithm
    :param row: Of ``compare``
    :return: The ratio to it: median and quartiles
    """
    key = f"ratio to {reference}"
    return f"{row[key]:.2f} ({row[f'{key}, 25 %']:.2f} to {row[f'{key}, 75 %']:.2f})"


def print_rows(title: str, rows: Rows) -> None:
    print(f"\n{title}")
    ratios = [key for key in next(iter(rows.values())) if key.startswith("ratio") and "%" not in key]
    print(f"{'':24} {'ms':>9}" + "".join(f"  {key:>28}" for key in ratios))
    for name, row in rows.items():
        cells = [ratio_to(key.removeprefix("ratio to "), row) for key in ratios]
        print(f"{name:24} {row['milliseconds']:9.2f}" + "".join(f"  {cell:>28}" for cell in cells))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="sizes to measure")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=25, help="measured gradient steps per algorithm (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="small networks, one task, one round, nothing compiled: shows that it works"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    tasks, rounds, width, loop_steps = options.tasks, options.rounds, 256, 20
    # Compiling takes minutes
    kinds = KINDS if options.quick else KINDS | COMPILED
    if options.quick:
        tasks, rounds, width, loop_steps = tasks[:1], 1, 16, 5
    # The paper's range does not fit the random tasks
    warnings.filterwarnings("ignore", message=".*of the value targets' mass lies outside")

    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/speed.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "versions": versions() | {"onnxruntime": version("onnxruntime")},
        "hardware": hardware(),
        "threads": options.threads,
        "rounds": rounds,
        "tasks": {},
    }
    print(json.dumps({key: results[key] for key in ("command", "versions", "hardware")}, indent=2))
    for task in tasks:
        models = make_models(partial(RandomTask, *TASKS[task]), width, options.device, kinds)
        references = ("SAC", "MFPO", "MFPO, plain")
        part: dict[str, Any] = {f"{STEPS} gradient steps": gradient_steps(models, rounds, options.device, references)}
        part |= actions(models, rounds)
        for title, rows in part.items():
            print_rows(f"{task}: {title}", rows)
        part["operators"] = operators(models)
        part["profile"] = profile(models["MFPO"], rounds)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            part["peak memory in MB"] = pool.apply(peak_memory, (task, width, options.device, options.threads))
        print(f"\n{task}: operators {part['operators']}; peak memory of the first {STEPS} {part['peak memory in MB']} MB")
        for name, share in sorted(part["profile"].items(), key=lambda item: -item[1]):
            print(f"{name:32} {share:6.1%}")
        results["tasks"][task] = part
    results["whole loop, HalfCheetah-v5"] = whole_loop(
        "HalfCheetah-v5", width, loop_steps, max(1, rounds // 5), options.device, kinds
    )
    print_rows("whole loop, HalfCheetah-v5", results["whole loop, HalfCheetah-v5"])
    for name, row in results["whole loop, HalfCheetah-v5"].items():
        print(f"{name:24} {row['steps per second']:7.1f} steps per second")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
