"""
Cost of MFPO against SB3's SAC with the same layers: one gradient step, one action.

The algorithms take turns within one process, so that other load on the machine meets them alike; a ratio is the median over
the rounds, with the quartiles as its spread.

    python benchmarks/speed.py --output benchmarks/results/speed.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_mfpo import MFPO

Timings = dict[str, list[float]]


def measure(functions: Mapping[str, Callable[[], Any]], rounds: int) -> Timings:
    """Seconds per call, the functions taking turns; two rounds of warm-up are dropped."""
    timings: Timings = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            timings[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in timings.items()}


def compare(timings: Timings, reference: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the ratio to the reference in the same round: median and quartiles."""
    results = {}
    for name, values in timings.items():
        low, median, high = np.percentile(np.array(values) / np.array(timings[reference]), [25, 50, 75])
        results[name] = {
            "milliseconds": 1e3 * float(np.median(values)),
            "ratio": float(median),
            "ratio_low": float(low),
            "ratio_high": float(high),
        }
    return results


def make_models(env_id: str) -> dict[str, OffPolicyAlgorithm]:
    """Both algorithms with three layers of 256 and a filled buffer."""
    models: dict[str, OffPolicyAlgorithm] = {
        "SAC": SAC("MlpPolicy", env_id, learning_starts=1000, buffer_size=1000, policy_kwargs=dict(net_arch=[256] * 3)),
        "MFPO": MFPO("MlpPolicy", env_id, learning_starts=1000, buffer_size=1000),
    }
    for model in models.values():
        model.learn(500)
    return models


def benchmark(env_id: str, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Gradient step of a batch of 256, and ``predict`` for one observation."""
    models = make_models(env_id)
    observation = models["SAC"].observation_space.sample()
    steps = {name: partial(model.train, gradient_steps=1, batch_size=256) for name, model in models.items()}
    actions = {
        f"{name}, {kind}": partial(model.predict, observation, deterministic=kind == "deterministic")
        for name, model in models.items()
        for kind in ("stochastic", "deterministic")
    }
    return {
        "gradient step": compare(measure(steps, rounds), reference="SAC"),
        "action": compare(measure(actions, 20 * rounds), reference="SAC, stochastic"),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=["HalfCheetah-v5", "Humanoid-v5"], help="Gymnasium ids")
    parser.add_argument("--rounds", type=int, default=25, help="measured gradient steps per algorithm (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)

    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "stable-baselines3", "sb3-mfpo", "numpy")},
        "hardware": {"processor": platform.processor() or platform.machine(), "cuda": th.cuda.is_available()},
        "threads": options.threads,
        "rounds": options.rounds,
        "results": {env_id: benchmark(env_id, options.rounds) for env_id in options.envs},
    }
    print(f"{'task':16} {'what':14} {'algorithm':22} {'ms':>8} {'ratio':>7}  quartiles")
    for env_id, parts in results["results"].items():
        for part, rows in parts.items():
            for name, row in rows.items():
                spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
                print(f"{env_id:16} {part:14} {name:22} {row['milliseconds']:8.2f} {row['ratio']:7.2f}  {spread}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
