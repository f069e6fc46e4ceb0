"""
How SOM's settings were chosen, and how it compares with the recipe stated in its paper, MFPO and SAC, on tasks that two CPU
cores can train.

Every run uses one thread and is a trial of an Optuna study over a grid; a study that was interrupted goes on where it stopped.
``report`` writes what the runs evaluated as CSV, and draws the comparison.

    python benchmarks/som.py search --workers 2
    python benchmarks/som.py compare --workers 2
    python benchmarks/som.py report
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import time
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import optuna
import pandas as pd
import seaborn
import torch as th
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mfpo import MFPO, SOM

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "som.png"
N_EVALUATIONS = 10
CANDIDATES = (1, 4, 10, 32)
# What learning curves show: how each algorithm acts when asked for deterministic actions
CURVES = ("best of 10", "deterministic")

# What all algorithms share on a task: the zoo's settings for small tasks; the value range is the critics' of MFPO and SOM
TASKS: dict[str, dict[str, Any]] = {
    "InvertedDoublePendulum-v5": dict(steps=10_000, gamma=0.97, value_range=(-50, 350), ent_coef="auto_1.0", episodes=2),
    "Reacher-v5": dict(steps=6000, gamma=0.9, value_range=(-30, 10), ent_coef="auto_0.2", episodes=20),
}
SHARED = dict(learning_rate=1e-3, learning_starts=500, batch_size=128, tau=0.02)
NET_ARCH = [64, 64]
# The recipe of the paper, as far as it is stated; the length of the scores and the inverse temperature are not
STATED = dict(
    inverse_temperature=10.0,
    n_samples=100,
    score_estimator="gradient",
    score_norm=5.0,
    path="vp",
    adaptive_loss=True,
    equal_time_share=0.25,
    time_distribution="uniform",
)
ALGORITHMS = ("SAC", "SOM", "MFPO", "SOM, stated")
# Inverse temperature and K
SETTINGS = ("10, 32", "30, 32", "100, 32", "3, 32", "30, 8", "10, 8")
# Seconds of processor time that every algorithm of the comparison gets at least, whatever steps it takes in them
TIME = {"InvertedDoublePendulum-v5": 120.0, "Reacher-v5": 72.0}


def make_model(algorithm: str, task: str, seed: int, setting: str | None = None) -> Any:
    """A model with the task's settings; ``setting`` holds an inverse temperature and a number of samples."""
    settings = TASKS[task]
    common = dict(SHARED, gamma=settings["gamma"], seed=seed, device="cpu")
    if algorithm == "SAC":
        return SAC("MlpPolicy", task, **common, policy_kwargs=dict(net_arch=NET_ARCH))
    low, high = settings["value_range"]
    policy_kwargs = dict(net_arch=NET_ARCH, v_min=low, v_max=high)
    if algorithm == "MFPO":
        ours = dict(ent_coef=settings["ent_coef"], n_policy_samples=8, n_gaussian_samples=8)
        return MFPO("MlpPolicy", task, **common, **ours, policy_kwargs=policy_kwargs)
    recipe = STATED if algorithm == "SOM, stated" else {}
    if setting is not None:
        inverse_temperature, n_samples = setting.split(", ")
        recipe = dict(inverse_temperature=float(inverse_temperature), n_samples=int(n_samples))
    return SOM("MlpPolicy", task, **common, **recipe, policy_kwargs=policy_kwargs)  # type: ignore[arg-type]


class Evaluation(BaseCallback):
    """Evaluates now and then, on a clock that stands still meanwhile; ends the training once steps and time are used up."""

    def __init__(self, task: str, seed: int, seconds: float):
        super().__init__()
        self.env = Monitor(gym.make(task))
        self.env.reset(seed=1000 + seed)
        self.steps, self.episodes = TASKS[task]["steps"], TASKS[task]["episodes"]
        self.seconds = seconds
        self.rows: list[dict[str, float]] = []
        self.spent, self.start = 0.0, 0.0

    def _on_training_start(self) -> None:
        self.start = time.process_time()

    def _on_step(self) -> bool:
        if self.num_timesteps % (self.steps // N_EVALUATIONS) > 0:
            return True
        self.spent += time.process_time() - self.start
        ended = self.num_timesteps >= self.steps and self.spent >= self.seconds
        at_end = ended or self.num_timesteps == self.steps
        n_episodes = 3 * self.episodes if at_end else self.episodes
        policy: Any = self.model.policy
        if isinstance(self.model, SAC):
            self.evaluate("deterministic", True, n_episodes)
        else:
            for n in CANDIDATES if at_end else (10,):
                policy.n_action_candidates = n
                self.evaluate(f"best of {n}", True, n_episodes)
            policy.n_action_candidates = 10
        if at_end:
            self.evaluate("sample", False, n_episodes)
        self.start = time.process_time()
        return not ended

    def evaluate(self, mode: str, deterministic: bool, n_episodes: int) -> None:
        """One row: step, seconds, mode and mean return."""
        state = th.get_rng_state()
        mean, _ = evaluate_policy(self.model, self.env, n_episodes, deterministic)
        th.set_rng_state(state)
        self.rows.append({"step": self.num_timesteps, "seconds": round(self.spent, 1), "mode": mode, "return": mean})  # type: ignore[dict-item]


def objective(trial: optuna.Trial, grid: dict[str, list[Any]], seconds: dict[str, float]) -> float:
    """Train once; the mean over the evaluations of the best of ten."""
    settings = {name: trial.suggest_categorical(name, values) for name, values in grid.items()}
    model = make_model(**settings)
    callback = Evaluation(settings["task"], settings["seed"], seconds[settings["task"]])
    model.learn(50 * callback.steps, callback=callback)
    trial.set_user_attr("rows", callback.rows)
    return float(np.mean([row["return"] for row in callback.rows if row["mode"] in CURVES]))


def open_study(name: str, folder: Path, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    """The study of this name in the folder's journal."""
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True, direction="maximize")


def work(studies: dict[str, dict[str, list[Any]]], seconds: dict[str, float], folder: Path) -> None:
    """Take trials of every study until there is none left."""
    th.set_num_threads(1)
    for name, grid in studies.items():
        study = open_study(name, folder, optuna.samplers.GridSampler(grid, seed=0))
        study.optimize(partial(objective, grid=grid, seconds=seconds))


def table(names: Iterable[str], folder: Path) -> pd.DataFrame:
    """One row per evaluation of every finished run."""
    rows = [
        {**trial.params, **row}
        for name in names
        for trial in open_study(name, folder).get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        for row in trial.user_attrs["rows"]
    ]
    keys = [name for name in rows[0] if name not in ("seconds", "return")]
    return pd.DataFrame(rows).drop_duplicates(keys).sort_values(keys, ignore_index=True)


def by_time(run: pd.DataFrame, seconds: float) -> float:
    """Mean over the time that was given of the latest evaluation's return; before the first one, of that one's."""
    times, returns = run["seconds"].to_numpy(), run["return"].to_numpy()
    latest = np.searchsorted(times, np.linspace(0, seconds, 201), side="right") - 1
    return float(returns[latest.clip(min=0)].mean())


def summary(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """
    Per run: the mean over the evaluations on the way to the last step that all take and over the equal time (both are areas
    under learning curves), the return at that step in every mode, the return at the end of the time.
    """
    runs = []
    for key, run in rows.groupby([*keys, "seed"]):
        task = run["task"].iloc[0]
        curve, steps = run[run["mode"].isin(CURVES)], TASKS[task]["steps"]
        at_end = run[run["step"] == steps].set_index("mode")["return"]
        entry = dict(zip([*keys, "seed"], key, strict=True)) | {
            "mean by steps": curve[curve["step"] <= steps]["return"].mean()
        }
        entry |= {
            mode: at_end.get(mode, np.nan) for mode in (*(f"best of {n}" for n in CANDIDATES), "deterministic", "sample")
        }
        entry["seconds"] = run[run["step"] == steps]["seconds"].iloc[0]
        if "setting" not in keys:
            entry["mean by time"] = by_time(curve, TIME[task])
            entry["at the time's end"] = curve[curve["seconds"] <= TIME[task]]["return"].iloc[-1]
        runs.append(entry)
    return pd.DataFrame(runs)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Learning curves by steps and by time, one line per seed."""
    figure, axes = plt.subplots(2, len(TASKS), figsize=(5 * len(TASKS), 6.4), layout="constrained")
    for column, (task, settings) in zip(axes.T, TASKS.items(), strict=True):
        curves = rows[(rows["task"] == task) & rows["mode"].isin(CURVES)]
        for axis, x, limit in ((column[0], "step", settings["steps"]), (column[1], "seconds", TIME[task])):
            # The first evaluation that lies beyond shows where a curve goes
            seaborn.lineplot(
                curves[curves[x] <= 1.1 * limit],
                x=x,
                y="return",
                hue="algorithm",
                hue_order=ALGORITHMS,
                units="seed",
                estimator=None,
                lw=1.3,
                ax=axis,
                legend="auto" if axis is axes[0, 0] else False,
            )
            axis.set(xlim=(0, limit), xlabel={"step": "environment steps", "seconds": "seconds of one core"}[x])
        if task == "Reacher-v5":
            for axis in column:
                axis.set_ylim(-30, -3)
        column[0].set_title(f"{task}, 3 seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(folder: Path, picture: Path = PICTURE) -> None:
    """Write the evaluations as CSV, draw the comparison, print the tables."""
    pd.set_option("display.width", 250, "display.max_columns", 30, "display.max_rows", 100)
    versions = {name: version(name) for name in ("torch", "stable-baselines3", "sb3-mfpo", "gymnasium", "mujoco", "optuna")}
    print({"python": platform.python_version()} | versions)
    for name, studies, keys in (("search", ["search"], ["task", "setting"]), ("compare", ALGORITHMS, ["task", "algorithm"])):
        rows = table(studies, folder)
        rows.round({"return": 2}).to_csv(RESULTS / f"som_{name}.csv", index=False)
        runs = summary(rows, keys)
        print(f"\n{name}: means over the seeds, then every run")
        print(runs.drop(columns="seed").groupby(keys).mean().round(1).to_string())
        print(runs.round(1).to_string(index=False))
    draw(rows, picture)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["search", "compare", "report"])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS, help="to compare")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("som"), help="of the studies' journal (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.command == "report":
        report(options.folder)
        return
    tasks = list(TASKS)
    if options.command == "search":
        studies = {"search": dict(seed=[0, 1], task=tasks, setting=list(SETTINGS), algorithm=["SOM"])}
        seconds = dict.fromkeys(tasks, 0.0)
    else:
        studies = {name: dict(seed=[0, 1, 2], task=tasks, algorithm=[name]) for name in options.algorithms}
        seconds = TIME
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(studies, seconds, options.folder)) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
