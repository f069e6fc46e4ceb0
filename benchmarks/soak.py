"""
A long training with measurements: memory, open files, threads and the divergence network's error over 200 000 steps of a cheap
task, with checkpoints, health checks and a log, at reduced sizes.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --output benchmarks/results/soak.csv
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch as th
from machine import versions
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import configure

from sb3_mfpo import MFPO, SOM, HealthCallback, RunCheckpointCallback

SIZES: dict[str, Any] = dict(
    buffer_size=20_000,
    learning_starts=500,
    batch_size=32,
    learning_rate=1e-3,
    gamma=0.95,
    tau=0.02,
    policy_kwargs=dict(net_arch=[32, 32], time_fourier_dim=16, time_embedding_dim=16, n_atoms=51, v_min=-350, v_max=50),
)
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MFPO": (MFPO, dict(ent_coef="auto_1.0", n_gaussian_samples=6, n_local_samples=2)),
    "SOM": (SOM, dict(n_samples=8)),
}


class Watch(BaseCallback):
    """A row of measurements now and then (Linux)."""

    def __init__(self, every: int):
        super().__init__()
        self.every = every
        self.rows: list[dict[str, float]] = []
        self.start = time.monotonic()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            episodes = [episode["r"] for episode in self.model.ep_info_buffer or []]
            row = {
                "step": self.num_timesteps,
                "seconds": round(time.monotonic() - self.start),
                "resident in MB": round(1024e-6 * int(status["VmRSS"].split()[0]), 2),
                "open files": len(os.listdir("/proc/self/fd")),
                "threads": int(status["Threads"]),
                "return of 100 episodes": round(float(np.mean(episodes)), 1) if episodes else np.nan,
            }
            health = {k.removeprefix("health/"): v for k, v in self.logger.name_to_value.items() if k.startswith("health/")}
            self.rows.append(row | {name: round(value, 4) for name, value in health.items()})
        return True


def soak(name: str, steps: int) -> pd.DataFrame:
    """Train and watch."""
    algorithm, kwargs = ALGORITHMS[name]
    every = steps // 100
    with tempfile.TemporaryDirectory() as folder:
        model = algorithm("MlpPolicy", "Pendulum-v1", **SIZES, **kwargs, seed=0, device="cpu")
        model.set_logger(configure(folder, ["csv"]))
        watch = Watch(every)
        # The watch reads what the health check has just logged
        health = HealthCallback(every, n_states=256)
        model.learn(steps, callback=CallbackList([health, RunCheckpointCallback(10 * every, folder), watch]))
    return pd.DataFrame(watch.rows).assign(algorithm=name)


def summary(rows: pd.DataFrame) -> dict[str, Any]:
    """After a warm-up of a fifth: growth of memory by a straight line, range of everything else."""
    steady = rows[rows["step"] > 0.2 * rows["step"].max()]
    slope = np.polyfit(steady["step"], steady["resident in MB"], 1)[0]
    result: dict[str, Any] = {"growth in KB per 1000 steps": round(1e6 * slope, 2)}
    for column in rows.dropna(axis="columns", how="all").columns.difference(["step", "seconds", "algorithm"]):
        result[column] = [float(steady[column].iloc[0]), float(steady[column].min()), float(steady[column].max())]
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--output", type=Path, help="CSV file to write")
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    # The figures are what is looked at here
    warnings.filterwarnings("ignore", message=".*divergence network's log-probabilities are off")
    tables: dict[str, pd.DataFrame] = {}
    for name in options.algorithms:
        tables[name] = soak(name, options.steps)
        if options.output:
            pd.concat(tables.values()).to_csv(options.output, index=False)
    results: dict[str, Any] = {"versions": versions()}
    results |= {f"{name}: first, lowest, highest after the warm-up": summary(rows) for name, rows in tables.items()}
    print(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
