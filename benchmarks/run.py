"""
Do the runs of a suite that are not in its results yet, by the zoo's ``train``, and append them as they end.

The same command continues an interrupted suite: finished runs are in the CSV file, the others resume from their last
checkpoint. With ``--minutes`` it stops when they are over. With ``--ray-address`` the runs are tasks of a Ray cluster.

    python benchmarks/run.py benchmarks/suites/defaults.yml --workers 2
    python benchmarks/run.py benchmarks/suites/gpu.yml --ray-address auto --device cuda --gpus-per-run 0.1
"""

from __future__ import annotations

import argparse
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import suite as suites
from filelock import FileLock
from suite import KEYS, Run, folder_of, read_suite, runs_of
from tqdm import tqdm

from sb3_mfpo.runs.files import replacing

RESULTS = Path(__file__).parent / "results"
# Seconds between two looks at the progress
INTERVAL = 2.0


def commit() -> str:
    """
    :return: The repository's commit, with a mark if the package or the benchmarks have been changed since
    """
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            # No git
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "sb3_mfpo", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def read_rows(path: Path) -> pd.DataFrame:
    """
    :param path: CSV file of results
    :return: Its rows; a commit is a text, also one such as 0902e35, which could be a number
    """
    return pd.read_csv(path, dtype={"commit": str})


def append(rows: pd.DataFrame, path: Path) -> None:
    """
    :param rows: A run's
    :param path: The CSV file, written anew: it is whole at any time. Other processes may append to it, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        table = pd.concat([read_rows(path), rows]) if path.exists() else rows
        with replacing(path) as file:
            table.to_csv(file, index=False)


def finished(path: Path) -> set[tuple[str, str, int]]:
    """
    :param path: The CSV file
    :return: Keys of the runs in it
    """
    return set(pd.read_csv(path)[KEYS].itertuples(index=False, name=None)) if path.exists() else set()


def steps_so_far(run: Run, folder: Path) -> int:
    """
    :param run: A run that has begun or not
    :param folder: Of the suite's runs
    :return: Steps at its last evaluation, as far as its files can be seen from here
    """
    path = folder_of(run, folder) / "evaluations.csv"
    return int(pd.read_csv(path)["step"].iloc[-1]) if path.exists() else 0


def is_over(until: float) -> bool:
    """
    :param until: By ``time.monotonic``
    :return: Whether no run may go on
    """
    return time.monotonic() >= until


@contextmanager
def local_workers(options: argparse.Namespace) -> Iterator[Any]:
    """Submit runs to threads, each with a process at a time."""
    pool, stop = ThreadPoolExecutor(options.workers), threading.Event()
    try:
        yield lambda run: pool.submit(suites.train, run, options.folder, options.device, stop)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def ray_workers(options: argparse.Namespace) -> Iterator[Any]:
    """Submit runs to a cluster; what waits there is cancelled at the end."""
    import ray

    # The nodes need the package and what it needs; the benchmarks travel
    files = {"working_dir": str(Path(__file__).parent), "excludes": ["results", "suites"]}
    ray.init(address=options.ray_address, runtime_env=files, log_to_driver=False)
    task = ray.remote(num_cpus=1, num_gpus=options.gpus_per_run)(suites.train)
    references = []

    def submit(run: Run) -> Future:
        references.append(task.remote(run, options.folder.absolute(), options.device))
        return references[-1].future()

    try:
        yield submit
    finally:
        for reference in references:
            ray.cancel(reference)
        ray.shutdown()


def run_suite(options: argparse.Namespace) -> int:
    """
    :param options: Of the command line
    :return: How many runs have failed
    """
    output = options.output or RESULTS / f"{options.suite.stem}.csv"
    options.folder = options.folder or Path("runs") / options.suite.stem
    runs = runs_of(read_suite(options.suite, options.tasks, options.algorithms, options.seeds))
    done, now = finished(output), commit()
    left = [run for run in runs if run.key not in done]
    bar = tqdm(total=sum(run.steps for run in runs), initial=sum(run.steps for run in runs if run.key in done), unit="step")
    # The mean speed since the start: runs differ too much for the latest one's
    bar.smoothing = 0
    failed = 0
    until = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    pending: dict[Any, Run] = {}
    try:
        with (ray_workers if options.ray_address else local_workers)(options) as submit:
            pending.update({submit(run): run for run in left})
            while pending and not is_over(until):
                ended, _ = wait(pending, timeout=INTERVAL)
                for future in ended:
                    pending.pop(future)
                    try:
                        append(future.result().assign(commit=now), output)
                    except RuntimeError as error:
                        failed += 1
                        tqdm.write(str(error), file=sys.stderr)
                begun = sum(steps_so_far(run, options.folder) for run in pending.values())
                bar.n = bar.total - sum(run.steps for run in pending.values()) + begun
                bar.set_postfix_str(f"{len(runs) - len(pending) - failed} of {len(runs)} runs")
    finally:
        # A run may have come to its end while it was to be stopped: its checkpoints are gone
        for future in pending:
            if future.done() and not future.cancelled() and future.exception() is None:
                append(future.result().assign(commit=now), output)
    bar.close()
    if pending:
        print(f"The {options.minutes:g} minutes are over: the same command does what is missing.")
    print(f"{len(finished(output))} runs in {output}" + (f", {failed} have failed" if failed else ""))
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites.add_suite_arguments(parser)
    parser.add_argument("--output", type=Path, help="CSV file (default: benchmarks/results/<suite>.csv)")
    parser.add_argument("--folder", type=Path, help="for logs, checkpoints and models (default: runs/<suite>)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time on this machine (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of every run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop then; runs write checkpoints, which takes longer (default: never)")
    parser.add_argument("--ray-address", help="of a Ray cluster that does the runs instead, such as `auto`")
    parser.add_argument("--gpus-per-run", type=float, default=0, help="share of a GPU, with Ray (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"`--minutes` must be above 0, not {options.minutes:g}; without it there is no limit")
    # As Ctrl-C: the runs write checkpoints
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return min(run_suite(options), 1)
    except KeyboardInterrupt:
        print("Interrupted: the same command does what is missing.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
