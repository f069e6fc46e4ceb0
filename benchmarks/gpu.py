"""
What is to be known on a CUDA device, in one command that can be stopped and called again: the tests that need the device, the
speed of gradient steps and actions, then learning curves, many runs side by side, as far as the time goes.

What is done is not repeated: tests that passed, measurements, finished runs. Other runs go on from their checkpoints. Every
part writes a table and a JSON file, `<part>.csv` and `<part>.json`, when it ends; measurements are written one by one.

    python benchmarks/gpu.py --minutes 8
    python benchmarks/gpu.py --minutes 8 --parts learning --gpus-per-run 0.1
    python benchmarks/gpu.py --device cpu --quick --suite benchmarks/suites/smoke.yml --tasks Pendulum-v1   # a dry run
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pandas as pd
import run
import speed
import torch as th
from captured_sac import CapturedSAC
from machine import versions
from suite import KEYS, folder_of, read_suite, runs_of

from sb3_mfpo.runs.files import replacing

ROOT = Path(__file__).parent.parent
SUITE = Path(__file__).parent / "suites" / "gpu.yml"
TASKS = ["HalfCheetah-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5", "dm_control/dog-run-v0", "dm_control/humanoid-run-v0"]
# What has tests that need a device; the other files need more packages
NEEDS_CUDA = re.compile(r"mark\.cuda|\bDEVICES\b")
KINDS: dict[str, speed.Kind] = {**speed.KINDS, "SAC, captured": (CapturedSAC, {})}
# Columns that tell measurements apart
KEY = ["what", "task", "mode", "batch", "algorithm"]
# Batches of observations to act on, and how often one is repeated
BATCHES = {1: 20, 64: 5, 1024: 1}
# Seconds that pytest has for its report when its time is over
GRACE = 20.0
# Environment steps over which the returns of training episodes are averaged
BLOCK = 5000


class Measurement(NamedTuple):
    """
    Gradient steps of some algorithms, SB3's SAC in eager mode always among them. In eager mode also samples of the replay
    buffer and, with the usual batch, actions.
    """

    task: str
    mode: str
    batch_size: int
    algorithms: tuple[str, ...]

    @property
    def keys(self) -> set[tuple[str, str, str, int, str]]:
        """What its rows of gradient steps have in the columns ``KEY``."""
        return {("gradient step", self.task, self.mode, self.batch_size, name) for name in self.algorithms}


def measurements(quick: bool) -> list[Measurement]:
    """
    :param quick: Whether to show only that it works
    :return: All, the most telling ones first: each compilation takes a minute
    """
    ours = ("MFPO", "SOM", "MFPO, paper")
    usual, large = speed.BATCH_SIZE, 2048
    first = Measurement("HalfCheetah", "eager", usual, ours)
    if quick:
        return [first]
    return [
        first,
        Measurement("HalfCheetah", "captured", usual, ("MFPO", "SAC, captured")),
        *(Measurement("HalfCheetah", "captured", usual, (name,)) for name in ours[1:]),
        Measurement("HalfCheetah", "eager", large, ours),
        *(Measurement(task, mode, usual, ours) for task in ("Humanoid", "dog") for mode in ("eager", "captured")),
        Measurement("HalfCheetah", "captured", large, ours),
        *(Measurement(task, "eager", large, ours) for task in ("Humanoid", "dog")),
        *(Measurement("HalfCheetah", "compiled", size, ours) for size in (usual, large)),
    ]


def measure(what: Measurement, device: str, quick: bool, path: Path) -> None:
    """
    :param what: What to measure
    :param device: Where
    :param quick: Whether small networks and one round will do
    :param path: JSON file for the rows. It is written again with what the profiler finds, which may fail by itself
    """
    th.set_num_threads(1)
    # The paper's range does not fit the random tasks
    warnings.filterwarnings("ignore", message=".*of the value targets' mass lies outside")
    width, rounds = (16, 1) if quick else (256, 25)
    kinds = {"SAC": speed.KINDS["SAC"]}
    for name in what.algorithms:
        algorithm, kwargs = KINDS[name]
        kinds[name] = (algorithm, {**kwargs, "compile_step": what.mode != "eager"})
    models = speed.make_models(partial(speed.RandomTask, *speed.TASKS[what.task]), width, device, kinds)
    if what.mode == "compiled":
        for name in what.algorithms:
            # Without the mode that captures
            models[name]._compiled = th.compile(models[name]._update, dynamic=False)

    def first_steps(model: Any) -> float:
        start = time.perf_counter()
        model.train(speed.STEPS, what.batch_size)
        return time.perf_counter() - start

    firsts = {name: first_steps(model) for name, model in models.items()}
    about = {"task": what.task, "mode": what.mode, "batch": what.batch_size}
    references = tuple(name for name in models if name.startswith("SAC"))
    found = speed.gradient_steps(models, rounds, device, references, what.batch_size)
    rows: list[dict[str, Any]] = []
    for name, row in found.items():
        row["milliseconds"] /= speed.STEPS
        rows.append({"what": "gradient step", "algorithm": name} | about | row | {"first steps, seconds": firsts[name]})
    if what.mode == "eager":
        sampling = speed.compare(replay_samples(models["SAC"], what.batch_size), rounds, ("from the host",), device, 10)
        rows += [{"what": "replay sample", "algorithm": name} | about | row for name, row in sampling.items()]
    if what.mode == "eager" and what.batch_size == speed.BATCH_SIZE:
        for title, acting in speed.actions(models, rounds, ("SAC", "MFPO", "SOM"), (), BATCHES).items():
            # "MFPO, stochastic": which actions
            for (name, how), row in ((key.split(", "), row) for key, row in acting.items()):
                batch = int(title.split()[-1])
                rows.append({"what": f"action, {how}", "algorithm": name} | about | {"batch": batch} | row)
    path.write_text(json.dumps(rows))
    if device != "cpu":
        for steps in rows[: len(models)]:
            steps |= launches(models[steps["algorithm"]], what.batch_size)
        path.write_text(json.dumps(rows))


def replay_samples(model: Any, batch_size: int) -> dict[str, Callable[[], Any]]:
    """
    :param model: An SB3 model with transitions
    :param batch_size: Minibatch size
    :return: Functions that sample its replay buffer: as SB3 does, and from a copy of the transitions on the model's device
    """
    buffer = model.replay_buffer
    size, names = buffer.size(), ("observations", "next_observations", "actions", "dones", "timeouts", "rewards")
    tensors = {name: th.as_tensor(getattr(buffer, name)[:size], device=model.device) for name in names}

    def on_device() -> tuple[th.Tensor, ...]:
        rows = th.randint(size, (batch_size,), device=model.device)
        environments = th.randint(buffer.n_envs, (batch_size,), device=model.device)
        batch = {name: values[rows, environments] for name, values in tensors.items()}
        dones = batch["dones"] * (1 - batch["timeouts"])
        return batch["observations"], batch["actions"], batch["next_observations"], dones, batch["rewards"]

    return {"from the host": partial(buffer.sample, batch_size), "from the device": on_device}


def launches(model: Any, batch_size: int) -> dict[str, float]:
    """
    :param model: A model on a CUDA device, its step compiled if it ever is
    :param batch_size: Minibatch size
    :return: Per gradient step: launches of kernels and of captured graphs, and how long the device is busy
    """
    activities = [th.profiler.ProfilerActivity.CPU, th.profiler.ProfilerActivity.CUDA]
    with th.profiler.profile(activities=activities) as profile:
        model.train(speed.STEPS, batch_size)
        th.cuda.synchronize()
    events = profile.key_averages()
    kernels = [event for event in events if event.device_type == th.autograd.DeviceType.CUDA]
    # Spans with a name hold kernels, which would count twice
    busy = sum(event.self_device_time_total for event in kernels if not getattr(event, "is_user_annotation", False))
    return {
        "kernel launches": sum(event.count for event in events if "LaunchKernel" in event.key) / speed.STEPS,
        "graph launches": sum(event.count for event in events if "GraphLaunch" in event.key) / speed.STEPS,
        "device milliseconds": 1e-3 * busy / speed.STEPS,
    }


def attempt(what: Measurement, device: str, quick: bool, path: Path) -> None:
    """As ``measure``; an error is written beside the rows."""
    try:
        measure(what, device, quick, path)
    except Exception:
        path.with_suffix(".error").write_text(traceback.format_exc())
        raise


class Results:
    """
    The two files of a part.

    :param folder: Of all parts
    :param part: Name of the part
    """

    def __init__(self, folder: Path, part: str):
        self.part, self.csv, self.json = part, folder / f"{part}.csv", folder / f"{part}.json"

    @property
    def done(self) -> bool:
        """Whether nothing of the part is left to do."""
        return self.json.exists() and json.loads(self.json.read_text())["done"]

    def rows(self) -> pd.DataFrame:
        """
        :return: Those written before
        """
        return run.read_rows(self.csv) if self.csv.exists() and self.csv.stat().st_size > 1 else pd.DataFrame()

    def write(self, rows: pd.DataFrame, done: bool, **more: Any) -> None:
        """
        :param rows: All of the part
        :param done: Whether nothing is left to do
        :param more: What else the JSON file says
        """
        about = {"part": self.part, "done": done, **more, "command": " ".join(["python", *sys.argv]), "commit": run.commit()}
        about |= {"versions": versions() | {"cuda": th.version.cuda}, "hardware": speed.hardware()}
        self.csv.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((self.csv, rows.to_csv(index=False)), (self.json, json.dumps(about, indent=2) + "\n")):
            with replacing(path) as file:
                file.write(text.encode())


def results_of(part: str, options: argparse.Namespace) -> Results:
    """
    :param part: Name of a part
    :param options: Of the command line
    :return: Its files; those of a quick call are others, so that they are never taken for the real ones
    """
    return Results(options.output, f"{part}_quick" if options.quick else part)


def origin() -> dict[str, Any]:
    """
    :return: Columns that tell rows of several calls apart
    """
    return {"commit": run.commit(), "hardware": speed.hardware()["gpu"] or speed.hardware()["processor"]}


def run_tests(options: argparse.Namespace, until: float) -> int:
    """
    The tests with the marker `cuda`, without those that have passed before. Without a device they are skipped.

    :param options: Of the command line
    :param until: When to stop, by ``time.monotonic``
    :return: How many have failed
    """
    results = results_of("tests", options)
    rows = results.rows()
    passed = rows[rows["outcome"] == "passed"] if len(rows) else rows
    report, log = options.folder / "tests.xml", options.folder / "tests.log"
    report.unlink(missing_ok=True)
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if NEEDS_CUDA.search(path.read_text())]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # Most of their time a single core compiles
    command += ["-n", str(min((os.cpu_count() or 1) // 2, 8))]
    command += [f"--deselect={test}" for test in passed.get("test", [])]
    with log.open("a") as output:
        process = subprocess.Popen([*command, *map(str, files)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(None if until == math.inf else max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            # The report has the tests that have ended
            process.send_signal(signal.SIGINT)
            try:
                code = process.wait(GRACE)
            except subprocess.TimeoutExpired:
                code = -1
        finally:
            process.kill()
            process.wait()
    new = read_report(report) if report.exists() else pd.DataFrame()
    rows = pd.concat([passed, new.assign(**origin())], ignore_index=True)
    counts = rows["outcome"].value_counts().to_dict() if len(rows) else {}
    # 5: all have passed before
    results.write(rows, code in (0, 5) and "skipped" not in counts, outcomes=counts, exit_code=code)
    print(f"tests: {counts or 'none has ended'}; the output is in {log}")
    return counts.get("failed", 0) + (code not in (0, 1, 2, 5))


def read_report(path: Path) -> pd.DataFrame:
    """
    :param path: XML file of pytest
    :return: A row per test: its id, outcome, seconds and what it said
    """
    rows = []
    for case in ElementTree.parse(path).iter("testcase"):
        said = next(iter(case), None)
        outcome = "passed" if said is None else {"skipped": "skipped"}.get(said.tag, "failed")
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        message = "" if said is None else f"{said.get('message') or ''}"
        rows.append({"test": test, "outcome": outcome, "seconds": float(case.get("time", 0)), "message": message})
    return pd.DataFrame(rows)


def run_speed(options: argparse.Namespace, until: float) -> int:
    """
    The measurements that are not there yet, each in a process of its own: an error in one leaves the device to the next.

    :param options: Of the command line
    :param until: When to stop, by ``time.monotonic``
    :return: How many have failed
    """
    results = results_of("speed", options)
    rows = results.rows()
    errors: dict[str, str] = {}
    measured = set(rows[KEY].itertuples(index=False, name=None)) if len(rows) else set()
    left = [what for what in measurements(options.quick) if not what.keys <= measured]
    if not left:
        results.write(rows, True, errors=errors)
    for index, what in enumerate(left):
        if time.monotonic() >= until:
            break
        path = options.folder / f"speed_{index}.json"
        path.with_suffix(".error").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        process = multiprocessing.get_context("spawn").Process(
            target=attempt, args=(what, options.device, options.quick, path)
        )
        process.start()
        try:
            process.join(None if until == math.inf else max(until - time.monotonic(), 0))
        finally:
            process.kill()
            process.join()
        error, name = (
            path.with_suffix(".error"),
            ", ".join(map(str, (what.task, what.mode, what.batch_size, *what.algorithms))),
        )
        if error.exists():
            errors[name] = error.read_text()
        elif process.exitcode and time.monotonic() < until:
            errors[name] = f"The process ended with code {process.exitcode}."
        if path.exists():
            rows = pd.concat([rows, pd.DataFrame(json.loads(path.read_text())).assign(**origin())], ignore_index=True)
        done = index + 1 == len(left) and not errors and path.exists()
        results.write(rows, done, errors=errors)
        if len(rows):
            results.csv.with_suffix(".md").write_text(table(rows))
        print(f"speed: {name}: {'measured' if path.exists() else errors.get(name, 'not done in time')}", flush=True)
    return len(errors)


def table(rows: pd.DataFrame) -> str:
    """
    :param rows: Of the part "speed"
    :return: Gradient steps in Markdown: median time, and the ratio to SB3's SAC with its quartiles
    """
    steps = rows[rows["what"] == "gradient step"]
    # The reference takes its turns beside the others in every mode
    steps = steps[(steps["algorithm"] != "SAC") | (steps["mode"] == "eager")]
    steps = steps.set_index(["mode", "algorithm", "task", "batch"]).sort_index()
    places = [place for place in product(speed.TASKS, (speed.BATCH_SIZE, 2048)) if ("eager", "SAC", *place) in steps.index]
    lines = ["| | " + " | ".join(f"{task} sizes, batch of {batch}" for task, batch in places) + " |"]
    lines.append("|---" * (len(places) + 1) + "|")
    for mode, name in product(("eager", "captured", "compiled"), (*speed.KINDS, "SAC, captured")):
        cells = []
        for place in places:
            row = steps.loc[(mode, name, *place)] if (mode, name, *place) in steps.index else None
            ratio = "" if row is None or name == "SAC" else ", " + speed.ratio_to("SAC", row)
            cells.append("" if row is None else f"{row['milliseconds']:.1f} ms{ratio}")
        if any(cells):
            lines.append(f"| {name.removesuffix(', captured')}, {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_learning(options: argparse.Namespace, until: float) -> int:
    """
    The suite's runs, as far as the time goes, and the curves of all that have begun.

    :param options: Of the command line
    :param until: When to stop, by ``time.monotonic``
    :return: How many have failed
    """
    part = ["--tasks", *options.tasks, "--algorithms", *options.algorithms, "--seeds", *map(str, options.seeds)]
    finished, workers = options.folder / "finished.csv", max(int(1 / options.gpus_per_run + 1e-9), 1)
    command = [str(options.suite), *part, "--output", str(finished), "--folder", str(options.folder)]
    command += ["--device", options.device, "--workers", str(workers)]
    if until < math.inf:
        command += ["--minutes", str(max((until - time.monotonic()) / 60, 1e-3))]
    code = run.main(command)
    suite = read_suite(options.suite, options.tasks, options.algorithms, options.seeds)
    rows = curves(suite, options.folder, finished)
    runs = runs_of(suite)
    done = {one.key for one in runs} <= run.finished(finished)
    steps = rows.groupby(KEYS)["step"].max()
    so_far = {", ".join(map(str, one.key)): f"{int(steps.get(one.key, 0))} of {one.steps} steps" for one in runs}
    results_of("learning", options).write(rows, done, side_by_side=workers, runs=so_far)
    print(f"learning: {so_far}")
    if code == 130:
        raise KeyboardInterrupt
    return code


def curves(suite: dict[str, Any], folder: Path, finished: Path) -> pd.DataFrame:
    """
    :param suite: From ``read_suite``
    :param folder: Of its runs
    :param finished: CSV file of the finished ones
    :return: Per run: its evaluations, and the mean return of training episodes (mode "training") every so many steps; their
        seconds are those of the wall clock
    """
    ended = run.read_rows(finished).set_index(KEYS).sort_index() if finished.exists() else None
    tables = []
    for one in runs_of(suite):
        place, evaluations = folder_of(one, folder), folder_of(one, folder) / "evaluations.csv"
        # A run that goes on takes its episodes along into a new file
        monitors = sorted(place.rglob("*.monitor.csv"), key=lambda path: path.stat().st_mtime)
        found = [training_curve(path) for path in monitors[-1:]]
        if ended is not None and one.key in ended.index:
            found.append(ended.loc[[one.key]])
        elif evaluations.exists():
            found.append(pd.read_csv(evaluations))
        tables += [table.assign(**dict(zip(KEYS, one.key, strict=True))) for table in found]
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*KEYS, "step"])
    return rows[[*KEYS, *(name for name in rows if name not in KEYS)]]


def training_curve(path: Path) -> pd.DataFrame:
    """
    :param path: A monitor's CSV file
    :return: Mean returns of the episodes that end within blocks of steps
    """
    episodes = pd.read_csv(path, comment="#")
    episodes["step"] = episodes["l"].cumsum()
    blocks = episodes.groupby((episodes["step"] - 1) // BLOCK)
    table = blocks.agg(step=("step", "max"), seconds=("t", "max"), **{"return": ("r", "mean")})
    return table.reset_index(drop=True).assign(mode="training")


PARTS: dict[str, Callable[[argparse.Namespace, float], int]] = {
    "tests": run_tests,
    "speed": run_speed,
    "learning": run_learning,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="in this order (default: all)")
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop then; runs write checkpoints, which takes up to a minute more. Every part has at most an equal share of "
        "what is left (default: no limit)",
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, default=run.RESULTS / "gpu", help="folder of the tables (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="of the runs and logs (default: %(default)s)")
    parser.add_argument("--suite", type=Path, default=SUITE, help="of the learning curves (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="of the suite (default: %(default)s)")
    parser.add_argument("--algorithms", nargs="+", default=["MFPO", "SAC"], help="of the suite (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the suite (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-run",
        type=float,
        default=1 / 12,
        help="share of the device: 0.1 puts ten runs side by side (default: 1/12)",
    )
    parser.add_argument("--quick", action="store_true", help="speed of small networks, one round: shows that it works")
    options = parser.parse_args(arguments)
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"`--minutes` must be above 0, not {options.minutes:g}; without it there is no limit")
    if not 0 < options.gpus_per_run <= 1:
        parser.error(
            f"`--gpus-per-run` must be above 0 and at most 1, not {options.gpus_per_run:g}: 0.1 puts ten runs on a device"
        )
    if options.device == "cuda" and not th.cuda.is_available():
        parser.error(
            f"`--device cuda`: PyTorch {th.__version__} sees no CUDA device; for a dry run use `--device cpu --quick`"
        )
    # Before any work
    try:
        read_suite(options.suite, options.tasks, options.algorithms, options.seeds)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.folder.mkdir(parents=True, exist_ok=True)

    until = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    # As Ctrl-C: the runs write checkpoints
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts = [part for part in PARTS if part in options.parts]
    # Which runs are done the suite knows, and it may have been another one
    parts = [part for part in parts if part == "learning" or not results_of(part, options).done]
    print(f"To do: {', '.join(parts) or 'nothing'}. Tables in {options.output}.", flush=True)
    failed = 0
    try:
        for index, part in enumerate(parts):
            now = time.monotonic()
            failed += PARTS[part](options, now + (until - now) / (len(parts) - index))
    except KeyboardInterrupt:
        print("Interrupted: the same command does what is missing.", file=sys.stderr)
        return 130
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
