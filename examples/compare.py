"""
MFPO, SOM, SAC and TD3 on one task: the same seeds, steps and evaluations, one picture of their learning curves.

Every run is a ``train`` of the zoo with its hyperparameters for the task; runs of as many steps that are already in the
folder are not repeated, whatever their ``--params``. Bands are 95 % bootstrap intervals of the mean over the seeds.

    python examples/compare.py --env InvertedDoublePendulum-v5 --steps 10000 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def every(options: argparse.Namespace) -> int:
    """Steps between two evaluations."""
    return max(options.steps // 20, 1)


def result(algorithm: str, seed: int, options: argparse.Namespace) -> Path | None:
    """The evaluations of a run of that many steps, if there is one that has come to its end."""
    runs = options.output / f"seed_{seed}" / algorithm
    for path in sorted(runs.glob(f"{options.env.replace('/', '-')}_*/evaluations.npz")):
        if options.steps - 2 * every(options) < np.load(path)["timesteps"][-1] <= options.steps:
            return path
    return None


def train(algorithm: str, seed: int, options: argparse.Namespace) -> None:
    """One run, in a process and a folder of its own."""
    folder = options.output / f"seed_{seed}"
    if result(algorithm, seed, options) is not None:
        print(f"{algorithm}, seed {seed}: done before")
        return
    command = [sys.executable, "-m", "sb3_mfpo.zoo", "train", "--algo", algorithm, "--env", options.env, "--seed", str(seed)]
    command += ["-n", str(options.steps), "--eval-freq", str(every(options)), "--eval-episodes", "5"]
    command += ["-f", str(folder), "--num-threads", "1", "--verbose", "0"]
    if options.params:
        command += ["-params", *options.params]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
    print(f"{algorithm}, seed {seed}: trained")


def evaluations(options: argparse.Namespace) -> Iterator[pd.DataFrame]:
    """Mean return of every evaluation of every run."""
    for algorithm in options.algos:
        for seed in options.seeds:
            path = result(algorithm, seed, options)
            assert path is not None
            data = np.load(path)
            yield pd.DataFrame(
                {
                    "algorithm": algorithm.upper(),
                    "seed": seed,
                    "environment steps": data["timesteps"],
                    "return of an episode": data["results"].mean(axis=1),
                }
            )


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="InvertedDoublePendulum-v5", help="Gymnasium id (default: %(default)s)")
    parser.add_argument("--algos", nargs="+", default=["mfpo", "som", "sac", "td3"], help="algorithms that the zoo knows")
    parser.add_argument("--steps", type=int, default=10_000, help="environment steps of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--params", nargs="+", help="hyperparameters for all, as `name:value`")
    parser.add_argument("--output", type=Path, default=Path("compare"), help="folder for runs and picture (default: compare)")
    options = parser.parse_args(arguments)

    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [pool.submit(train, algorithm, seed, options) for seed in options.seeds for algorithm in options.algos]
    for job in jobs:
        job.result()

    table = pd.concat(evaluations(options))
    table.to_csv(options.output / "evaluations.csv", index=False)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    seaborn.lineplot(
        table, x="environment steps", y="return of an episode", hue="algorithm", errorbar=("ci", 95), ax=axis, seed=0
    )
    axis.set_title(f"{options.env}, {len(options.seeds)} seeds")
    figure.savefig(options.output / "comparison.png", dpi=120)
    plt.close(figure)
    last = table[table["environment steps"] == table["environment steps"].max()]
    print(last.groupby("algorithm")["return of an episode"].agg(["mean", "std"]).round(1))
    print(f"Saved {options.output / 'comparison.png'} and {options.output / 'evaluations.csv'}")
    return table


if __name__ == "__main__":
    main()
