"""Benchmark runs: suites, runner (interrupted, and on a real Ray cluster), reports with known answers."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import estimators
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import proposals
import pytest
import report
import rl_zoo3
import run
import sharpness
import suite as suites
import torch as th
import variants
import yaml
from evaluation import Evaluation
from peers import PEERS, RESUMABLE
from ray.cluster_utils import Cluster
from scipy.stats import kstest, trim_mean, truncnorm

from sb3_mfpo import MFPO, RunCheckpointCallback
from sb3_mfpo.training.return_scale import ReturnScale
from sb3_mfpo.zoo.registration import ALGORITHMS, hyperparameter_file
from tests.helpers import TINY_SUITE, RandomEnv, make_model, write_suite

BENCHMARKS = Path(run.__file__).parent
SUITES = sorted((BENCHMARKS / "suites").glob("*.yml"))


def arguments(folder: Path, path: Path) -> list[str]:
    return [str(path), "--output", str(folder / "results.csv"), "--folder", str(folder / "runs")]


def test_a_suite_from_start_to_report(tmp_path: Path) -> None:
    smoke = BENCHMARKS / "suites" / "smoke.yml"
    assert run.main([*arguments(tmp_path, smoke), "--workers", "2"]) == 0
    rows = pd.read_csv(tmp_path / "results.csv")
    assert not rows.duplicated([*suites.KEYS, "step", "mode"]).any()
    assert (rows.groupby(suites.KEYS).size() == 4).all() and len(rows) == 4 * 4
    assert set(rows["step"]) == {150, 300} and np.isfinite(rows["return"]).all() and (rows["seconds"] > 0).all()
    assert rows["versions"].str.contains("torch").all() and rows["hardware"].notna().all() and rows["commit"].notna().all()

    before = (tmp_path / "results.csv").stat().st_mtime_ns
    start = time.monotonic()
    assert run.main(arguments(tmp_path, smoke)) == 0
    assert time.monotonic() - start < 2 and (tmp_path / "results.csv").stat().st_mtime_ns == before, "finished runs again"

    table = tmp_path / "smoke.md"
    report.main([str(smoke), "--input", str(tmp_path / "results.csv"), "--images", str(tmp_path), "--table", str(table)])
    assert len(table.read_text().splitlines()) == 2 + 4
    assert len((tmp_path / "smoke_by_task.md").read_text().splitlines()) == 2 + 4
    for name in ("curves", "aggregate"):
        assert (tmp_path / f"smoke_{name}.png").stat().st_size > 20_000


def test_rows_keep_a_commit_that_could_be_a_number(tmp_path: Path) -> None:
    for commit in ("0902e35", "0123456"):
        run.append(pd.DataFrame([dict(step=1, commit=commit)]), tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text() == "step,commit\n1,0902e35\n1,0123456\n"


def test_several_may_append_to_one_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda step: run.append(pd.DataFrame([dict(step=step, commit="a")]), tmp_path / "results.csv"), range(40))
        )
    assert sorted(pd.read_csv(tmp_path / "results.csv")["step"]) == list(range(40))


@pytest.mark.parametrize(("algo", "by"), [("mfpo", "a signal"), ("sac", "its minutes")])
def test_an_interrupted_suite_resumes_from_the_checkpoint(
    algo: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_suite(tmp_path, steps=1000, algorithms={"one": {"algo": algo}})
    folder = suites.folder_of(suites.runs_of(suites.read_suite(path))[0], tmp_path / "runs")
    if by == "a signal":
        command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments(tmp_path, path)]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        while not (folder / "evaluations.csv").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() != 0
    else:
        monkeypatch.setattr(run, "is_over", lambda until: until < np.inf and (folder / "evaluations.csv").exists())
        monkeypatch.setattr(run, "INTERVAL", 0.1)
        assert run.main([*arguments(tmp_path, path), "--minutes", "60"]) == 0
        assert "The 60 minutes are over: the same command does what is missing." in capsys.readouterr().out
    assert not (tmp_path / "results.csv").exists()
    newest = max(int(path.stem.split("_")[1]) for path in folder.glob("run_*_steps.zip"))
    assert 500 <= newest < 1000

    assert run.main(arguments(tmp_path, path)) == 0
    rows = pd.read_csv(tmp_path / "results.csv")
    assert list(rows["step"]) == [500, 500, 1000, 1000] and rows["seconds"].is_monotonic_increasing
    assert "Loading pretrained agent" in (folder / "log.txt").read_text()
    assert not list(folder.glob("run_*_steps.zip")), "checkpoints of a finished run"
    # The episodes before the interruption are there, too
    newest_monitor = max(folder.rglob("*.monitor.csv"), key=lambda path: path.stat().st_mtime)
    assert pd.read_csv(newest_monitor, comment="#")["l"].sum() == 1000


def test_an_evaluation_s_clock_counts_the_steps_since_the_last_one(tmp_path: Path) -> None:
    def learn(model: Any, steps: int) -> Evaluation:
        evaluation = Evaluation("Pendulum-v1", 100, 1, 0, str(tmp_path / "evaluations.csv"))
        model.learn(steps, callback=[evaluation, RunCheckpointCallback(80, tmp_path)])
        return evaluation

    sac = RESUMABLE["sac"]
    before = learn(sac("MlpPolicy", "Pendulum-v1", seed=0, learning_starts=0, device="cpu"), 80)
    assert before.rows == [] and before.seconds > 0.1
    after = learn(sac.resume(tmp_path, "Pendulum-v1", device="cpu"), 100)
    assert after.rows[0]["step"] == 100 and after.rows[0]["seconds"] >= round(before.seconds, 1)


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resumed_run_of_another_algorithm_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    def begin() -> Any:
        return RESUMABLE[name](
            "MlpPolicy", RandomEnv(), seed=0, learning_starts=10, buffer_size=100, batch_size=8, device="cpu"
        )

    whole = begin().learn(60)
    begin().learn(40, callback=RunCheckpointCallback(40, tmp_path))
    resumed = RESUMABLE[name].resume(tmp_path, RandomEnv(), device="cpu").learn(60)
    assert (resumed.num_timesteps, resumed._n_updates) == (60, whole._n_updates)
    for one, other in zip(resumed.policy.state_dict().values(), whole.policy.state_dict().values(), strict=True):
        assert th.equal(one, other)


def test_time_that_is_over_before_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main([*arguments(tmp_path, write_suite(tmp_path)), "--minutes", "0"])
    assert "`--minutes` must be above 0, not 0; without it there is no limit" in capsys.readouterr().err


def test_a_run_that_fails_is_reported_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    algorithms = {"SAC": {"algo": "sac"}, "broken": {"algo": "sac", "params": {"gamma": "'high'"}}}
    path = write_suite(tmp_path, algorithms=algorithms, steps=60)
    assert run.main(arguments(tmp_path, path)) == 1
    error = capsys.readouterr().err
    assert "broken on Pendulum-v1, seed 0, ended with code 1" in error and "log.txt" in error
    assert set(pd.read_csv(tmp_path / "results.csv")["algorithm"]) == {"SAC"}
    algorithms["broken"]["params"] = {"gamma": 0.9}
    assert run.main(arguments(tmp_path, write_suite(tmp_path, algorithms=algorithms, steps=60))) == 0
    assert set(pd.read_csv(tmp_path / "results.csv")["algorithm"]) == {"SAC", "broken"}


@pytest.mark.nightly
def test_two_nodes_of_a_ray_cluster_share_the_runs(tmp_path: Path) -> None:
    # A run needs a processor, of which each node has one, and half of a GPU
    path = write_suite(tmp_path, seeds=[0, 1], steps=400)
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=1, include_dashboard=False)
        assert run.main([*arguments(tmp_path, path), "--ray-address", cluster.address, "--gpus-per-run", "0.5"]) == 0
    finally:
        cluster.shutdown()
    rows = pd.read_csv(tmp_path / "results.csv")
    assert sorted(rows["seed"].unique()) == [0, 1] and len(rows) == 2 * 4
    starts, ends = [], []
    for folder in (tmp_path / "runs" / "MFPO" / "Pendulum-v1").iterdir():
        (monitor,) = folder.glob("mfpo/Pendulum-v1_1/0.monitor.csv")
        starts.append(json.loads(monitor.read_text().splitlines()[0].removeprefix("#"))["t_start"])
        ends.append((folder / "evaluations.csv").stat().st_mtime)
    assert max(starts) < min(ends), "one after the other"


def test_later_hyperparameters_override_earlier_ones(tmp_path: Path) -> None:
    path = write_suite(
        tmp_path,
        params={"gamma": 0.1, "tau": 0.1, "batch_size": 1, "policy_kwargs": {"net_arch": [8]}},
        tasks={"Pendulum-v1": {"params": {"gamma": 0.2, "tau": 0.2}, "steps": 30}, "Reacher-v5": None},
        algorithms={
            "A": {"algo": "mfpo", "params": {"gamma": 0.3, "policy_kwargs": {"n_atoms": 7}}},
            "B": {"algo": "sac", "params": {"gamma": 0.3}, "tasks": {"Pendulum-v1": {"gamma": 0.4}}},
        },
    )
    first, second, third, fourth = suites.runs_of(suites.read_suite(path))
    assert first.params == dict(gamma=0.3, tau=0.2, batch_size=1, policy_kwargs=dict(net_arch=[8], n_atoms=7))
    assert second.params == dict(gamma=0.4, tau=0.2, batch_size=1, policy_kwargs=dict(net_arch=[8]))
    assert (first.key, first.steps, first.every) == (("A", "Pendulum-v1", 0), 30, 15)
    assert third.params["tau"] == 0.1 and third.steps == 200 and fourth.params["gamma"] == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {}}, "a suite has .*'task'"),
        ({"algorithms": {"A": {"params": {}}}}, "'A' needs `algo`"),
        ({"algorithms": {"A": {"algo": "sac", "param": {}}}}, "'A' needs `algo`, and may have .*'param'"),
    ],
)
def test_mistakes_in_a_suite_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suites.read_suite(write_suite(tmp_path, **changes))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_shipped_suites_are_valid(path: Path) -> None:
    """Every run's command can be written, tasks exist, and every hyperparameter is an argument of its algorithm."""
    import gymnasium as gym
    from rl_zoo3.utils import ALGOS

    from sb3_mfpo.envs import register_dm_control
    from sb3_mfpo.zoo.registration import register

    register_dm_control()
    register()
    algorithms = {**ALGOS, **PEERS}
    suite = suites.read_suite(path)
    for task, settings in suite["tasks"].items():
        low, high = settings["score"]
        assert gym.spec(task) and low < high
    for one in suites.runs_of(suite):
        # A peer hands what it does not know to its bases
        bases = algorithms[one.algo].__mro__ if one.algo in PEERS else [algorithms[one.algo]]
        known = {name for base in bases for name in inspect.signature(base.__init__).parameters}
        assert one.params.keys() - {"callback"} <= known
        assert len(suites.command_of(one, Path("folder"), "cpu")) > 10


@pytest.mark.parametrize("task", suites.read_suite(BENCHMARKS / "suites" / "defaults.yml")["tasks"])
def test_the_suite_of_the_defaults_has_no_other_argument(task: str) -> None:
    """Whatever the zoo's files have for a task, a run has the algorithm's own defaults."""
    from rl_zoo3.utils import ALGOS

    from sb3_mfpo.zoo.registration import register

    register()
    for one in suites.runs_of(suites.read_suite(BENCHMARKS / "suites" / "defaults.yml", tasks=[task])):
        of_rl_zoo = Path(rl_zoo3.__file__).parent / "hyperparams" / f"{one.algo}.yml"
        content = yaml.safe_load((hyperparameter_file(one.algo) if one.algo in ALGORITHMS else of_rl_zoo).read_text())
        params = {**content.get(task, content["default"]), **one.params}
        # A buffer that is never full; the noise that the zoo gives TD3, as its paper does
        for name in ("n_timesteps", "policy", "buffer_size", "noise_type", "noise_std"):
            params.pop(name, None)
        model = ALGOS[one.algo]("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu")
        assert params.pop("policy_kwargs") == {"net_arch": model.policy.net_arch}
        defaults = inspect.signature(type(model).__init__).parameters
        assert params == {name: defaults[name].default for name in params}


def made_up(path: Path, returns: dict[str, list[list[float]]]) -> pd.DataFrame:
    """A results file with these returns by algorithm, seed and evaluation, in both modes, the sample's lower by 100."""
    rows = [
        dict(algorithm=name, task="Pendulum-v1", seed=seed, step=step + 1, seconds=60 * (step + 1), mode=mode)
        | {"return": value - 100 * (mode == "sample"), "hardware": "one"}
        for name, seeds in returns.items()
        for seed, values in enumerate(seeds)
        for step, value in enumerate(values)
        for mode in report.MODES
    ]
    table = pd.DataFrame(rows)
    table.to_csv(path, index=False)
    return table


def test_aggregates_match_their_definitions(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    returns = {"A": generator.uniform(0, 1000, (8, 3)).tolist(), "B": generator.uniform(500, 1500, (8, 3)).tolist()}
    made_up(tmp_path / "results.csv", returns)
    algorithms = {name: {"algo": "sac"} for name in returns}
    suite = TINY_SUITE | dict(algorithms=algorithms, seeds=list(range(8)), tasks={"Pendulum-v1": {"score": [0, 2000]}})
    rows = report.read_results(tmp_path / "results.csv", suite)
    last = report.scores(rows, suite, "deterministic", at_end=True)
    mean = report.scores(rows, suite, "sample", at_end=False)
    for name, values in returns.items():
        np.testing.assert_allclose(np.sort(last[name][:, 0]), np.sort(np.array(values)[:, -1]) / 2000, rtol=1e-6)
        np.testing.assert_allclose(np.sort(mean[name][:, 0]), np.sort(np.array(values).mean(1) - 100) / 2000, rtol=1e-6)
        estimates, intervals = report.interquartile_means(last)
        assert estimates[name][0] == pytest.approx(trim_mean(last[name], 0.25, axis=None))
        assert intervals[name][0, 0] < estimates[name][0] < intervals[name][1, 0]
    better, _ = report.improvements(last)
    pairs = np.array(returns["A"])[:, -1, None] > np.array(returns["B"])[None, :, -1]
    assert better["A|B"].item() == pytest.approx(pairs.mean())
    line = report.table(rows, suite).splitlines()[2]
    a = np.array(returns["A"])[:, -1]
    assert f"| {a.mean():.0f} ± {a.std(ddof=1):.0f} / {a.mean() - 100:.0f} ± {a.std(ddof=1):.0f} |" in line
    assert "| 3.0 |" in line
    # One seed has no spread
    one = suite | {"seeds": [0]}
    line = report.table(report.read_results(tmp_path / "results.csv", one), one).splitlines()[3]
    b, mean = returns["B"][0][-1], np.mean(returns["B"][0])
    assert line.endswith(f"| {b / 2000:.2f} | {b / 2000 - 0.05:.2f} | {mean / 2000:.2f} |  | 3.0 | {b:.0f} / {b - 100:.0f} |")


def test_the_same_results_make_the_same_tables(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    made_up(tmp_path / "results.csv", {name: generator.uniform(0, 1000, (5, 2)).tolist() for name in "AB"})
    path = write_suite(tmp_path, algorithms={name: {"algo": "sac"} for name in "AB"}, seeds=list(range(5)))
    texts = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        where = ["--images", str(folder), "--table", str(folder / "table.md")]
        report.main([str(path), "--input", str(tmp_path / "results.csv"), *where])
        texts.append([file.read_text() for file in sorted(folder.glob("*.md"))])
    assert len(texts[0]) == 3 and "[" in texts[0][0] and texts[0] == texts[1]


def test_means_over_training_by_steps_and_by_time(tmp_path: Path) -> None:
    """Straight lines: A rises from 0 to 200 in three minutes, B from 0 to 300 in six."""
    table = made_up(tmp_path / "results.csv", {"A": [[0.0, 100.0, 200.0]], "B": [[0.0, 150.0, 300.0]]})
    table.loc[table["algorithm"] == "B", "seconds"] *= 2
    suite = TINY_SUITE | dict(algorithms={name: {"algo": "sac"} for name in "AB"})
    means = report.over_training(table, suite)
    assert means["steps"].to_list() == [100, 150]
    # Within three minutes: A is at 0 for one and rises for two; B is at 0 for two and at 75 after three
    assert means["time"].to_list() == pytest.approx([2 / 3 * 100, 1 / 3 * 75 / 2], rel=1e-2)
    # Within B's six: A is at 200 for three more
    means = report.over_training(table, suite | {"equal_time": "B"})
    assert means["time"].to_list() == pytest.approx([400 / 3, 2 / 3 * 150], rel=1e-2)
    # Another seed of both on a machine that is half as fast
    slower = table.assign(seed=1, seconds=2 * table["seconds"], hardware="slower")
    both = report.over_training(pd.concat([table, slower]), suite | {"equal_time": "B"})
    assert both["time"].to_list() == pytest.approx([value for value in means["time"] for _ in range(2)])
    a, b = report.table_by_task(table, suite).splitlines()[2:]
    assert a == "| Pendulum-v1 | A | 1 | 100 | 66.7 | 200 | 100 | 3.0 |"
    assert b == "|  | B | 1 | 150 | 12.5 | 300 | 200 | 6.0 |"
    # The usual machine's minutes, where there are any
    third = slower[slower["algorithm"] == "A"].assign(seed=2, hardware="one")
    for more, minutes in ((slower, ["3.0", "6.0"]), (pd.concat([slower, third]), ["4.5", "6.0"])):
        lines = report.table_by_task(pd.concat([table, more]), suite).splitlines()[2:]
        assert [line.split(" | ")[-1] for line in lines] == [f"{value} |" for value in minutes]
    # None where it was on another one only
    rows = pd.concat([table[table["algorithm"] == "A"], third, slower[slower["algorithm"] == "B"]])
    lines = report.table_by_task(rows, suite).splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == ["4.5 |", " |"]
    # More seeds of one than of the other
    more = pd.concat([table, table[table["algorithm"] == "A"].assign(seed=1)])
    more.loc[more["seed"] == 1, "return"] *= 2
    assert (
        report.table_by_task(more, suite)
        .splitlines()[2]
        .startswith("| Pendulum-v1 | A | 2 | 150 (100 to 200) | 100 (67 to 133)")
    )


def test_differences_of_interquartile_means(tmp_path: Path) -> None:
    """A is above B by about 50 at any time; 1 000 is scored 1."""
    generator = np.random.default_rng(0)
    b = generator.normal(500, 20, 40)
    table = made_up(tmp_path / "results.csv", {"A": [[x + 50] for x in generator.permutation(b)], "B": [[x] for x in b]})
    suite = TINY_SUITE | dict(algorithms={name: {"algo": "sac"} for name in "AB"}, tasks={"Pendulum-v1": {"score": [0, 1000]}})
    rows = report.read_results(tmp_path / "results.csv", suite | {"seeds": list(range(40))})
    assert len(rows) == len(table)
    heads, _, line = report.differences(rows, suite).splitlines()
    assert heads.startswith("| A minus |")
    found = re.fullmatch(r"\| B \| (\S+) \[(\S+), (\S+)\] \| (\S+) \[(\S+), (\S+)\] \|", line)
    assert found is not None
    for estimate, low, high in (map(float, found.groups()[:3]), map(float, found.groups()[3:])):
        # Two means of twenty values: a standard deviation of 6
        assert estimate == 0.05 and 0.03 <= low < 0.05 < high <= 0.07


def test_curves_of_others_are_drawn_as_far_as_ours_go() -> None:
    figure, axis = plt.subplots()
    axis.plot([5_000, 50_000], [0, 1])
    lines = report.draw_published("HalfCheetah-v4", axis)
    drawn = {name: line.get_xydata() for name, line in lines.items()}
    # One of SAC's points and one of SimbaV2's, read in the file
    assert [16666.0, 547.0] in np.round(drawn["SAC"]).tolist()
    assert [50_000.0, 5_887.0] in np.round(drawn["SimbaV2, 2 updates per step"]).tolist()
    assert all(points[:, 0].max() <= 50_000 for points in drawn.values())
    # Not even two points before 10 000 steps
    shorter = figure.add_subplot()
    shorter.plot([0, 10_000], [0, 1])
    fewer = report.draw_published("HalfCheetah-v4", shorter)
    assert list(fewer) == ["CrossQ", "MR.Q"] and len(shorter.get_lines()) == 1 + len(fewer)
    assert fewer["MR.Q"].get_marker() == lines["MR.Q"].get_marker() != lines["SAC"].get_marker()
    report.draw_legend(figure, {"MFPO": "red"}, fewer)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MFPO", "CrossQ, published", "MR.Q, published"]
    plt.close(figure)


def test_a_part_of_a_suite(tmp_path: Path) -> None:
    algorithms = {"A": {"algo": "sac"}, "B": {"algo": "td3"}}
    path = write_suite(tmp_path, algorithms=algorithms)
    assert list(suites.read_suite(path, algorithms=["B"])["algorithms"]) == ["B"]
    assert len(suites.runs_of(suites.read_suite(path))) == 2
    with pytest.raises(ValueError, match=r"has the algorithms \['A', 'B'\], not \['C'\]"):
        suites.read_suite(path, algorithms=["A", "C"])
    assert suites.read_suite(write_suite(tmp_path, seeds=[0, 1, 2]), seeds=[2, 0])["seeds"] == [2, 0]
    with pytest.raises(ValueError, match=r"has the seeds \[0, 1, 2\], not \[3\]"):
        suites.read_suite(path, seeds=[0, 3])
    with pytest.raises(ValueError, match=r"has the tasks \['Pendulum-v1'\], not \['Hopper-v5'\]"):
        suites.read_suite(path, tasks=["Hopper-v5"])
    with pytest.raises(ValueError, match=r"`equal_time` is one of \['MFPO'\], not 'SAC'"):
        suites.read_suite(write_suite(tmp_path, equal_time="SAC"))


def test_a_report_on_a_part_of_the_runs_has_no_aggregates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up(tmp_path / "results.csv", {"MFPO": [[1.0, 2.0]]})
    suite = write_suite(tmp_path, seeds=[0, 1])
    report.main(
        [str(suite), "--input", str(tmp_path / "results.csv"), "--images", str(tmp_path), "--table", str(tmp_path / "a.md")]
    )
    assert "No aggregates: 1 runs are missing" in capsys.readouterr().out
    assert "| Pendulum-v1 | MFPO | 1 |" in (tmp_path / "a_by_task.md").read_text()
    assert (tmp_path / "tiny_curves.png").exists() and (tmp_path / "tiny_overview.png").exists()
    assert not (tmp_path / "a.md").exists()
    with pytest.raises(ValueError, match="holds no run of the suite"):
        report.read_results(tmp_path / "results.csv", TINY_SUITE | {"seeds": [7]})


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("ablations", "docs/mfpo.md"),
        ("value_range", "docs/defaults.md"),
    ],
)
def test_published_tables_match_the_result_files(name: str, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published = (report.RESULTS / f"{name}.md").read_text()
    assert published in (BENCHMARKS.parent / page).read_text()
    # The intervals need many repetitions, so they are not compared
    monkeypatch.setattr(report, "REPETITIONS", 2)
    suite = suites.read_suite(BENCHMARKS / "suites" / f"{name}.yml")
    table = report.table(report.read_results(report.RESULTS / f"{name}.csv", suite), suite)
    without_intervals = re.compile(r" \[.*?\]")
    assert without_intervals.sub("", table + "\n") == without_intervals.sub("", published)


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("defaults", "benchmarks"),
        *((name, "defaults") for name in ("choices", "tau", "actor_rate")),
        ("peers_returns", "peers"),
    ],
)
def test_published_tables_by_task_match_the_result_files(name: str, page: str) -> None:
    published = (report.RESULTS / f"{name}_by_task.md").read_text()
    assert published in (BENCHMARKS.parent / "docs" / f"{page}.md").read_text()
    suite = suites.read_suite(BENCHMARKS / "suites" / f"{name}.yml")
    assert report.table_by_task(report.read_results(report.RESULTS / f"{name}.csv", suite), suite) + "\n" == published


def test_refresh_rarely_holds_the_scale_for_250_steps() -> None:
    model = make_model(MFPO, seed=0, learning_starts=10_000)
    model.learn(250, callback=variants.RefreshRarely())
    held = model.return_scale.value
    model.learn(249, reset_num_timesteps=False)
    assert model.return_scale.value == held
    model.learn(1, reset_num_timesteps=False)
    assert model.return_scale.value == ReturnScale.value.fget(model.return_scale) != held


def test_estimators_on_a_model_with_known_sample_sizes(tmp_path: Path) -> None:
    model = make_model(MFPO, env="Pendulum-v1", policy_kwargs=dict(value_init="narrow"))
    model.save(tmp_path / "model.zip")
    arguments = [str(tmp_path / "model.zip"), "Pendulum-v1", "--proposals", "3", "4", "--states", "8", "--repetitions", "3"]
    rows = estimators.main([*arguments, "--output", str(tmp_path / "out.csv"), "--picture", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").stat().st_size > 20_000 and len(pd.read_csv(tmp_path / "out.csv")) == 19 * 4
    sizes = rows.groupby("estimator")["effective sample size"]
    # All values are 0 here: every action of the Gaussian proposal weighs the same
    assert sizes.min()["Gaussian"] == pytest.approx(4) == sizes.max()["Gaussian"]
    assert 1 <= sizes.min()["policy"] <= sizes.max()["policy"] <= 3
    # Near the action only the action itself fits, and it is not a fresh proposal
    near = rows[rows["t"] == rows["t"].min()].set_index("estimator")
    assert near.loc["Gaussian", "error"] < near.loc["policy", "error"]


@pytest.mark.parametrize("t", [0.05, 0.4, 0.95])
def test_the_study_of_proposals_knows_the_truth(t: float) -> None:
    noisy, ratio = np.array([-0.7, 0.1, 1.2]), t / (1 - t)
    # What is known of a_0 given a_t is normal, up to the bounds
    expected = {"bounded": (noisy / (1 - t), ratio), "one-sided": (noisy / (1 - t) + 8 * ratio**2, ratio)}
    precision = 1 / 0.05**2 + 1 / ratio**2
    expected["narrow"] = ((0.3 / 0.05**2 + noisy / (1 - t) / ratio**2) / precision, precision**-0.5)
    for target, (mean, std) in expected.items():
        truth = truncnorm((-1 - mean) / std, (1 - mean) / std, mean, std)
        probabilities = proposals.posterior(proposals.policies(target)["right"], th.as_tensor(noisy).unsqueeze(1), t)[:, 0]
        np.testing.assert_allclose(probabilities @ proposals.GRID, truth.mean(), atol=1e-4)
        uniform = th.rand(3, 2000, dtype=th.float64, generator=th.Generator().manual_seed(0))
        ranks = truth.cdf(proposals.sample(probabilities, uniform).T)
        assert min(kstest(column, "uniform").pvalue for column in ranks.T) > 1e-3


@pytest.mark.nightly
def test_the_study_of_proposals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, image = tmp_path / "out.csv", tmp_path / "out.png"
    monkeypatch.setattr(proposals, "TIMES", (0.4, 0.95))
    monkeypatch.setattr(proposals, "DIMENSIONS", (1, 2))
    rows = proposals.main(["--points", "4", "--repetitions", "16", "--output", str(output), "--image", str(image)])
    assert image.stat().st_size > 20_000 and len(pd.read_csv(output)) == len(rows) == 6 * 11 * 2 * 2
    rms = rows[rows["d"] == 1].pivot_table("rms", "target", "estimator")
    assert (rms["stratified"] < 0.7 * rms["gaussian"]).all()
    # Independent uniform actions, nearly: the mean of twelve
    noise = rows[(rows["target"] == "bounded") & (rows["t"] == 0.95)].set_index("estimator")["rms"]
    np.testing.assert_allclose(noise["gaussian"], (3 * 12) ** -0.5, rtol=0.3)

    def errors(factor: int) -> pd.Series:
        counts = {name: tuple(factor * n for n in numbers) for name, numbers in original.items()}
        monkeypatch.setattr(proposals, "ESTIMATORS", counts)
        tables, rng = proposals.policies("modes"), th.Generator().manual_seed(0)
        found = proposals.errors(tables["right"], tables["blurred"], 2, 0.4, 8, 8, rng)
        return pd.Series({name: error.square().mean().sqrt().item() for name, error in found.items()})

    original = proposals.ESTIMATORS
    assert (errors(256) < 0.25 * errors(1)).all()


def test_the_table_of_sharpness_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out.csv"
    options = ["--steps", "502", "--output", str(output), "--variants", "SAC", "SOM"]
    sharpness.main(options)
    seconds = pd.read_csv(output)["seconds"].tolist()
    table = sharpness.main([*options, "defaults"])
    assert table["variant"].tolist() == ["SAC", "SOM", "defaults"] and table["seconds"].tolist()[:2] == seconds
    assert table["success"].between(0, 1).all() and np.isfinite(table["log_prob_error"].iloc[2])


def test_sharpness_is_measured_on_a_known_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every state one Gaussian at each opening, the middle one three times as often as each other."""
    generator = th.Generator().manual_seed(0)

    def known(model: Any, observation: list[float], n: int = 50_000) -> th.Tensor:
        centres = th.tensor([-0.6, 0.0, 0.0, 0.0, 0.6])[th.randint(5, (n,), generator=generator)]
        return centres + 0.05 * th.randn(n, generator=generator)

    monkeypatch.setattr(sharpness, "samples_at", known)
    results = sharpness.examine(None)
    shares = np.array([0.2, 0.6, 0.2])
    entropy = 0.5 * np.log(2 * np.pi * np.e * 0.05**2) - (shares * np.log(shares)).sum()
    assert results["histogram_entropy"] == pytest.approx(entropy, abs=0.01)
    assert results["mode_ratio"] == pytest.approx(3, rel=0.05)
