"""
Suites: which algorithms are trained on which tasks, with which seeds, for how many steps; and one run of a suite.

A suite is a YAML file:

    steps: 20000          # of every run
    evaluations: 10       # evenly spaced
    episodes: 5           # of an evaluation, for each way of acting
    seeds: [0, 1, 2]
    params: {}            # hyperparameters for all, over those of the zoo's files; `callback` is a list
    equal_time: SAC       # the algorithm whose run's time is the report's "equal time" (default: the quickest of a task)
    tasks:                # a Gymnasium id each
      Reacher-v5:
        score: [-43, -4]  # returns that count as 0 and 1 where tasks are averaged
        steps: 10000      # `steps`, `episodes` and `params` of a task override the suite's
        published: null   # the task's name in results/published.csv: curves of others to be drawn beside the suite's
    algorithms:           # a name in the results each; `algo` is a name in the zoo, or of a peer (benchmarks/peers)
      MFPO: {algo: mfpo}
      MFPO, one step:
        algo: mfpo
        params: {policy_kwargs: {sampling_steps: 1}}
        tasks: {Reacher-v5: {gamma: 0.9}}      # hyperparameters on this task alone

Later hyperparameters override earlier ones, in this order: the zoo's file for the task, the suite, the task, the algorithm,
the algorithm on the task. ``policy_kwargs`` are merged, everything else is replaced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch as th
import yaml
from machine import processor, versions
from peers import PEERS, RESUMABLE

from sb3_mfpo.runs.checkpoint import checkpoints
from sb3_mfpo.zoo.registration import ALGORITHMS, hyperparameter_file

# Seconds between two looks at a run's process
INTERVAL = 0.2
KEYS = ["algorithm", "task", "seed"]
FIELDS = {"steps", "evaluations", "episodes", "seeds", "tasks", "algorithms"}
OPTIONAL_FIELDS = {"params", "equal_time"}


@dataclass(frozen=True)
class Run:
    """One training of a suite."""

    algorithm: str
    task: str
    seed: int
    algo: str
    steps: int
    every: int
    episodes: int
    params: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.algorithm, self.task, self.seed


def read_suite(
    path: Path, tasks: Sequence[str] = (), algorithms: Sequence[str] = (), seeds: Sequence[int] = ()
) -> dict[str, Any]:
    """
    :param path: A suite's YAML file
    :param tasks: Those to keep; empty keeps all
    :param algorithms: Those to keep; empty keeps all
    :param seeds: Those to keep; empty keeps all
    :return: Its content, tasks and algorithms as dictionaries
    :raises ValueError: If something is missing or unknown
    """
    suite = yaml.safe_load(path.read_text())
    if not isinstance(suite, dict) or suite.keys() - FIELDS - OPTIONAL_FIELDS or FIELDS - suite.keys():
        found = sorted(suite) if isinstance(suite, dict) else suite
        raise ValueError(f"{path}: a suite has {sorted(FIELDS)}, and may have {sorted(OPTIONAL_FIELDS)}, not {found}.")
    if suite.get("equal_time") not in (None, *suite["algorithms"]):
        raise ValueError(f"{path}: `equal_time` is one of {list(suite['algorithms'])}, not {suite['equal_time']!r}.")
    for name, kept in (("tasks", tasks), ("algorithms", algorithms)):
        if unknown := set(kept) - suite[name].keys():
            raise ValueError(f"{path} has the {name} {list(suite[name])}, not {sorted(unknown)}.")
        suite[name] = {key: value or {} for key, value in suite[name].items() if not kept or key in kept}
    if unknown := set(seeds) - set(suite["seeds"]):
        raise ValueError(f"{path} has the seeds {suite['seeds']}, not {sorted(unknown)}.")
    suite["seeds"] = list(seeds) or suite["seeds"]
    for name, algorithm in suite["algorithms"].items():
        if "algo" not in algorithm or algorithm.keys() - {"algo", "params", "tasks"}:
            raise ValueError(f"{path}: the algorithm {name!r} needs `algo`, and may have `params` and `tasks`: {algorithm}.")
    return suite


def add_suite_arguments(parser: ArgumentParser) -> None:
    """
    :param parser: Gets the arguments of ``read_suite``
    """
    parser.add_argument("suite", type=Path, help="YAML file, see benchmarks/suite.py")
    parser.add_argument("--tasks", nargs="+", default=[], help="a part of the suite's (default: all)")
    parser.add_argument("--algorithms", nargs="+", default=[], help="a part of the suite's (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="a part of the suite's (default: all)")


def runs_of(suite: dict[str, Any]) -> list[Run]:
    """
    :param suite: From ``read_suite``
    :return: Its runs, all of a seed before the next one: an estimate of the time left soon knows every kind
    """
    return [
        Run(
            algorithm=name,
            task=task,
            seed=seed,
            algo=algorithm["algo"],
            steps=(steps := int(settings.get("steps", suite["steps"]))),
            every=max(steps // suite["evaluations"], 1),
            episodes=settings.get("episodes", suite["episodes"]),
            params=merge(
                zoo_params(algorithm["algo"], task),
                suite.get("params", {}),
                settings.get("params", {}),
                algorithm.get("params", {}),
                algorithm.get("tasks", {}).get(task, {}),
            ),
        )
        for seed in suite["seeds"]
        for task, settings in suite["tasks"].items()
        for name, algorithm in suite["algorithms"].items()
    ]


def zoo_params(algo: str, task: str) -> dict[str, Any]:
    """
    :param algo: Name in the zoo
    :param task: Gymnasium id
    :return: The zoo's ``policy_kwargs`` for the task, for a suite's to be merged with; of our algorithms, as rl_zoo3's files
        are its own
    """
    if algo not in ALGORITHMS:
        return {}
    content = yaml.safe_load(hyperparameter_file(algo).read_text())
    text = content.get(task, content["default"]).get("policy_kwargs")
    return {} if text is None else {"policy_kwargs": eval(text, {"dict": dict})}


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """
    :param layers: Hyperparameters; later ones override earlier ones
    :return: All, with merged ``policy_kwargs``
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        policy_kwargs = {**merged.get("policy_kwargs", {}), **layer.get("policy_kwargs", {})}
        merged = {**merged, **layer} | ({"policy_kwargs": policy_kwargs} if policy_kwargs else {})
    return merged


def folder_of(run: Run, folder: Path) -> Path:
    """
    :param run: A run
    :param folder: Of the suite's runs
    :return: The run's own folder
    """
    names = (run.algorithm, run.task, f"seed_{run.seed}")
    return folder.joinpath(*("".join(c if c.isalnum() or c in "._-" else "_" for c in name) for name in names))


def command_of(run: Run, folder: Path, device: str) -> list[str]:
    """
    :param run: A run
    :param folder: Its own folder
    :param device: Of the training
    :return: The zoo's command that begins it, or resumes it from its newest checkpoint; of a peer, with the peers added
    """
    evaluation = {"task": run.task, "every": run.every, "episodes": run.episodes, "seed": run.seed}
    callbacks: list[dict[str, Any]] = [*run.params.get("callback", [])]
    callbacks.append({"evaluation.Evaluation": evaluation | {"path": str(folder / "evaluations.csv")}})
    module = "peers" if run.algo in (*PEERS, *RESUMABLE) else "sb3_mfpo.zoo"
    command = [sys.executable, "-m", module, "train"]
    command += ["--algo", run.algo, "--env", run.task, "--seed", str(run.seed)]
    command += ["-n", str(run.steps), "--eval-freq", "-1", "-f", str(folder), "--num-threads", "1", "--verbose", "0"]
    command += ["--device", device]
    if run.algo in PEERS:
        command += ["--conf-file", "peers.frame"]
    if run.algo in (*ALGORITHMS, *PEERS, *RESUMABLE):
        saving = {"save_freq": run.every, "save_path": str(folder)}
        callbacks.append({"sb3_mfpo.RunCheckpointCallback": saving})
        for checkpoint in checkpoints(folder, "run")[:1]:
            command += ["-i", str(checkpoint)]
    return [*command, "-params", *(f"{name}:{value!r}" for name, value in {**run.params, "callback": callbacks}.items())]


def train(run: Run, folder: Path, device: str = "cpu", stop: threading.Event | None = None) -> pd.DataFrame:
    """
    Do a run to its end, in a process of its own. One that was begun with other hyperparameters begins anew.

    :param run: The run
    :param folder: Of the suite's runs; the run's folder in it keeps the model and, until the end, checkpoints
    :param device: Of the training
    :param stop: Ends the run early, once it has written a checkpoint
    :return: One row per evaluation and way of acting
    :raises RuntimeError: If the command fails or is ended; its output is in ``log.txt`` in the run's folder
    """
    folder = folder_of(run, folder.absolute())
    folder.mkdir(parents=True, exist_ok=True)
    # Checkpoints hold the hyperparameters that they were begun with
    given, params = folder / "params.json", json.dumps(run.params, sort_keys=True)
    if given.exists() and given.read_text() != params:
        for checkpoint in checkpoints(folder, "run"):
            checkpoint.unlink()
    given.write_text(params)
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    log = folder / "log.txt"
    with log.open("a") as output:
        process = subprocess.Popen(
            command_of(run, folder, device),
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None and not (stop is not None and stop.is_set()):
                time.sleep(INTERVAL)
        finally:
            # It writes a checkpoint before it ends
            process.terminate()
            code = process.wait()
    if code != 0:
        raise RuntimeError(f"{run.algorithm} on {run.task}, seed {run.seed}, ended with code {code}; see {log}:\n{tail(log)}")
    for checkpoint in checkpoints(folder, "run"):
        checkpoint.unlink()
    rows = pd.read_csv(folder / "evaluations.csv")
    rows = pd.DataFrame({**dict(zip(KEYS, run.key, strict=True)), **rows})
    gpu = th.cuda.get_device_name() if device != "cpu" and th.cuda.is_available() else None
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    return rows.assign(versions=packages, hardware=gpu or f"1 thread of {processor()}")


def tail(path: Path, lines: int = 5) -> str:
    """
    :param path: A text file
    :param lines: How many of its lines
    :return: The last ones
    """
    return "\n".join(path.read_text().splitlines()[-lines:])
