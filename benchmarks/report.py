"""
What a suite's results say: learning curves by steps and by time, aggregates with rliable, a table in Markdown.

Writes ``<suite>_curves.png``, ``<suite>_overview.png`` and ``<suite>_by_task.md``; once all runs are done
``<suite>_aggregate.png``, ``<suite>.md`` and ``<suite>_differences.md``, too. Scores are returns on the suite's scale for the
task (0 and 1 are its ``score``); intervals are 95 % bootstrap intervals, stratified by task.

    python benchmarks/report.py benchmarks/suites/defaults.yml
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from evaluation import MODES
from rliable import library as rly
from rliable import metrics, plot_utils
from run import RESULTS
from suite import KEYS, add_suite_arguments, read_suite

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parent.parent / "docs" / "images"
REPETITIONS = 2000
PALETTE = "colorblind"


def read_results(path: Path, suite: dict[str, Any]) -> pd.DataFrame:
    """
    :param path: CSV file of ``run.py``
    :param suite: From ``read_suite``
    :return: The rows of the suite's algorithms, tasks and seeds with their ``score``
    :raises ValueError: If there are none
    """
    rows = pd.read_csv(path)
    for column in KEYS:
        rows = rows[rows[column].isin(suite[f"{column}s"])]
    if rows.empty:
        raise ValueError(f"{path} holds no run of the suite: `python benchmarks/run.py` does them.")
    low, high = (rows["task"].map({task: settings["score"][i] for task, settings in suite["tasks"].items()}) for i in (0, 1))
    return rows.assign(score=(rows["return"] - low) / (high - low))


def usual_seconds(rows: pd.DataFrame) -> pd.Series:
    """
    :param rows: From ``read_results``
    :return: Their seconds, without those on other hardware than most rows'
    """
    return rows["seconds"].where(rows["hardware"] == rows["hardware"].mode()[0])


def in_minutes(seconds: float) -> str:
    """
    :param seconds: Time, NaN if unknown
    :return: Minutes for a table
    """
    return "" if math.isnan(seconds) else f"{seconds / 60:.1f}"


def n_missing(rows: pd.DataFrame, suite: dict[str, Any]) -> int:
    """
    :param rows: From ``read_results``
    :param suite: The suite
    :return: How many of the suite's runs are not done
    """
    return len(suite["algorithms"]) * len(suite["tasks"]) * len(suite["seeds"]) - len(rows[KEYS].drop_duplicates())


def scores(rows: pd.DataFrame, suite: dict[str, Any], mode: str, at_end: bool) -> dict[str, np.ndarray]:
    """
    :param rows: From ``read_results``
    :param suite: The suite
    :param mode: "deterministic" or "sample"
    :param at_end: The last evaluation's score, or the mean over all evaluations (the area under the learning curve)
    :return: By algorithm, shape (seeds, tasks)
    """
    chosen = rows[rows["mode"] == mode].sort_values("step").groupby(KEYS)["score"]
    per_run = chosen.last() if at_end else chosen.mean()
    return {name: per_run[name].unstack("task")[list(suite["tasks"])].to_numpy() for name in suite["algorithms"]}


def interquartile_means(by_algorithm: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    :param by_algorithm: From ``scores``
    :return: The mean of the middle half of all runs, shape (1,), and its interval, shape (2, 1), by algorithm
    """
    return rly.get_interval_estimates(
        by_algorithm,
        lambda values: np.array([metrics.aggregate_iqm(values)]),
        reps=REPETITIONS,
    )


def against_first(
    by_algorithm: dict[str, np.ndarray], statistic: Callable[[np.ndarray, np.ndarray], Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    :param by_algorithm: From ``scores``
    :param statistic: Of the scores of the first algorithm and of another
    :return: It and its interval, by "first|other"
    """
    first, *others = by_algorithm
    return rly.get_interval_estimates(
        {f"{first}|{other}": (by_algorithm[first], by_algorithm[other]) for other in others},
        statistic,
        reps=REPETITIONS,
    )


def improvements(by_algorithm: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    :param by_algorithm: From ``scores``
    :return: Probability that a run of the first algorithm is better than one of another, and its interval, by "first|other"
    """
    return against_first(by_algorithm, metrics.probability_of_improvement)


def draw_curves(rows: pd.DataFrame, suite: dict[str, Any], path: Path) -> None:
    """
    Returns against steps in both ways of acting, and against time.

    :param rows: From ``read_results``
    :param suite: The suite
    :param path: The picture's
    """
    # Seeds take different times: a curve by time is over the mean time at a step
    times = rows.assign(seconds=usual_seconds(rows)).groupby(["algorithm", "task", "step"])["seconds"].transform("mean")
    rows = rows.assign(minutes=times / 60)
    panels = [("step", "deterministic"), ("step", "sample"), ("minutes", "deterministic")]
    tasks, colors = tasks_of(rows, suite), colors_of(rows, suite)
    published: dict[str, plt.Line2D] = {}
    size = (3.6 * len(panels), 2.5 * len(tasks) + 0.3 * -(-len(colors) // 4) + 0.6)
    figure, axes = plt.subplots(len(tasks), len(panels), figsize=size, squeeze=False, layout="constrained")
    for i, task in enumerate(tasks):
        for j, (x, mode) in enumerate(panels):
            axis = axes[i, j]
            draw_panel(rows[(rows["task"] == task) & (rows["mode"] == mode)], x, colors, axis)
            axis.set(
                xlabel={"step": "environment steps", "minutes": "minutes of training"}[x] if i == len(tasks) - 1 else "",
                ylabel=f"{task.removeprefix('dm_control/')}\nreturn" if j == 0 else "",
                title=f"{mode}, by {'steps' if x == 'step' else 'time'}" if i == 0 else "",
            )
            if j == 0 and (name := suite["tasks"][task].get("published")):
                published |= draw_published(name, axis)
    draw_legend(figure, colors, published)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_overview(rows: pd.DataFrame, suite: dict[str, Any], path: Path) -> None:
    """
    Returns of deterministic actions against steps, all tasks in two rows.

    :param rows: From ``read_results``
    :param suite: The suite
    :param path: The picture's
    """
    tasks, colors = tasks_of(rows, suite), colors_of(rows, suite)
    columns = -(-len(tasks) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(2.6 * columns, 5), squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for i, (task, axis) in enumerate(zip(tasks, axes.flat, strict=False)):
        draw_panel(rows[(rows["task"] == task) & (rows["mode"] == "deterministic")], "step", colors, axis)
        axis.set(
            xlabel="environment steps" if i + columns >= len(tasks) else "",
            ylabel="return" if i % columns == 0 else "",
            title=task.removeprefix("dm_control/"),
        )
    draw_legend(figure, colors)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def tasks_of(rows: pd.DataFrame, suite: dict[str, Any]) -> list[str]:
    return [task for task in suite["tasks"] if (rows["task"] == task).any()]


def colors_of(rows: pd.DataFrame, suite: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in suite["algorithms"] if (rows["algorithm"] == name).any()]
    return dict(zip(names, seaborn.color_palette(PALETTE, n_colors=len(names)), strict=True))


def draw_panel(rows: pd.DataFrame, x: str, colors: dict[str, Any], axis: plt.Axes) -> None:
    """
    :param rows: Of one task and way of acting
    :param x: Column to draw the returns against
    :param colors: Of the algorithms, by name
    :param axis: Where to
    """
    seaborn.lineplot(
        rows, x=x, y="return", hue="algorithm", palette=colors, errorbar=("ci", 95), seed=0, ax=axis, legend=False
    )


def draw_published(task: str, axis: plt.Axes) -> dict[str, plt.Line2D]:
    """
    Others' learning curves, as far as the axis goes; those of which it shows fewer than two points are left out.

    :param task: Its name in ``results/published.csv``
    :param axis: Of returns against steps
    :return: The curves by the name of the algorithm, which has the same marker on every task
    """
    curves = pd.read_csv(RESULTS / "published.csv")
    markers = dict(zip(sorted(curves["algorithm"].unique()), "ovsx", strict=True))
    curves = curves[(curves["task"] == task) & (curves["step"] <= axis.dataLim.x1)]
    return {
        name: axis.plot(curve["step"], curve["mean"], f"{markers[name]}--", color="grey", markersize=3, linewidth=0.8)[0]
        for name, curve in curves.groupby("algorithm")
        if len(curve) > 1
    }


def draw_legend(figure: plt.Figure, colors: dict[str, Any], published: dict[str, plt.Line2D] | None = None) -> None:
    """
    :param figure: With constrained layout
    :param colors: Of the algorithms, by name
    :param published: Curves of others, by the name of the algorithm
    """
    lines = {name: plt.Line2D([], [], color=color) for name, color in colors.items()}
    lines |= {f"{name}, published": line for name, line in sorted((published or {}).items())}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)


def draw_aggregate(rows: pd.DataFrame, suite: dict[str, Any], path: Path) -> None:
    """
    Interquartile mean against steps, performance profiles, probability of improvement.

    :param rows: From ``read_results``
    :param suite: The suite
    :param path: The picture's
    """
    colors = colors_of(rows, suite)
    names = list(colors)
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    small: dict[str, Any] = dict(labelsize="medium", ticklabelsize="medium")
    for line, mode in zip(axes, MODES, strict=True):
        chosen = rows[rows["mode"] == mode].copy()
        # Tasks may have different lengths: evaluations are counted
        chosen["evaluation"] = chosen.groupby(KEYS)["step"].rank().astype(int)
        n = int(chosen["evaluation"].max())
        curves = {
            name: np.stack(
                [
                    chosen[(chosen["algorithm"] == name) & (chosen["evaluation"] == k + 1)]
                    .pivot(index="seed", columns="task", values="score")
                    .to_numpy()
                    for k in range(n)
                ],
                axis=-1,
            )
            for name in names
        }
        estimates, intervals = rly.get_interval_estimates(
            curves,
            lambda values: np.array([metrics.aggregate_iqm(values[..., k]) for k in range(values.shape[-1])]),
            reps=REPETITIONS // 4,
        )
        plot_utils.plot_sample_efficiency_curve(
            np.arange(1, n + 1) / n,
            estimates,
            intervals,
            algorithms=names,
            ax=line[0],
            xlabel="share of the steps",
            ylabel=f"IQM of the score, {mode}",
            **small,
        )
        last = scores(rows, suite, mode, at_end=True)
        values = np.concatenate([values.ravel() for values in last.values()])
        tau = np.linspace(values.min(), values.max(), 101)
        profiles, bands = rly.create_performance_profile(last, tau, reps=REPETITIONS // 4)
        plot_utils.plot_performance_profiles(profiles, tau, bands, ax=line[1], xlabel="score", **small)
        line[1].set_ylabel("share of runs above it")
        if len(names) > 1:
            plot_utils.plot_probability_of_improvement(
                *improvements(last),
                pair_separator="|",
                colors=list(colors.values())[1:],
                ax=line[2],
                xlabel="P(X better than Y)",
                **small,
            )
            line[2].set_xlim(0, 1)
    draw_legend(figure, colors)
    # The titles of the last column stand out of their axes
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)


def markdown(lines: list[list[str]]) -> str:
    """
    :param lines: Cells of the heads, the rule and the rows
    :return: The table
    """
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(rows: pd.DataFrame, suite: dict[str, Any]) -> str:
    """
    :param rows: From ``read_results``
    :param suite: The suite
    :return: Markdown: aggregates and the return on each task at the end, "deterministic / sample"; of a single seed without
        what needs several
    """
    several = len(suite["seeds"]) > 1
    modes = list(MODES)
    aggregates = {
        (mode, at_end): interquartile_means(scores(rows, suite, mode, at_end)) for mode in modes for at_end in (True, False)
    }
    better, _ = improvements(scores(rows, suite, modes[0], at_end=True))
    first = next(iter(suite["algorithms"]))
    last = rows.assign(seconds=usual_seconds(rows)).sort_values("step").groupby([*KEYS, "mode"]).last()
    returns = last.groupby(["algorithm", "task", "mode"])["return"].agg(["mean", "std"])
    seconds = last.groupby("algorithm")["seconds"].median()
    heads = ["", "IQM at the end", "same, sample", "IQM over training", f"P({first} better)", "minutes", *suite["tasks"]]
    lines = [heads, ["---"] * len(heads)]
    for name in suite["algorithms"]:
        cells = [name]
        for key in ((modes[0], True), (modes[1], True), (modes[0], False)):
            estimate, interval = (values[name] for values in aggregates[key])
            cells.append(f"{estimate[0]:.2f}" + (f" [{interval[0, 0]:.2f}, {interval[1, 0]:.2f}]" if several else ""))
        cells += [f"{better[f'{first}|{name}'].item():.2f}" if name != first and several else "", in_minutes(seconds[name])]
        for task in suite["tasks"]:
            values = [returns.loc[name, task, mode] for mode in modes]
            digits = 1 if abs(values[0]["mean"]) < 100 else 0
            spread = [f" ± {value['std']:.{digits}f}" if several else "" for value in values]
            cells.append(" / ".join(f"{value['mean']:.{digits}f}{more}" for value, more in zip(values, spread, strict=True)))
        lines.append(cells)
    return markdown(lines)


def over_training(rows: pd.DataFrame, suite: dict[str, Any], column: str = "return") -> pd.DataFrame:
    """
    Mean over training of deterministic actions, by equal steps and by equal time: that of a run of the suite's ``equal_time``
    on the same hardware, or of the quickest algorithm on a task that it has not done there. Between two evaluations returns
    are on a line, before the first they are as there.

    :param rows: From ``read_results``
    :param suite: The suite
    :param column: "return" or "score"
    :return: By algorithm, task and seed: ``steps`` and ``time``
    """
    rows = rows[rows["mode"] == "deterministic"].sort_values("step")
    place = ["task", "hardware"]
    seconds = rows.groupby([*place, "algorithm", "seed"])["seconds"].last().groupby([*place, "algorithm"]).mean()
    ends = {where: runs.droplevel(place).get(suite.get("equal_time"), runs.min()) for where, runs in seconds.groupby(place)}

    def means(run: pd.DataFrame) -> pd.Series:
        moments = np.linspace(0, ends[run["task"].iloc[0], run["hardware"].iloc[0]], 1000)
        by_time = np.interp(moments, run["seconds"], run[column]).mean()
        return pd.Series({"steps": run[column].mean(), "time": by_time})

    return rows.groupby(KEYS)[[*KEYS, "hardware", "seconds", column]].apply(means)


def differences(rows: pd.DataFrame, suite: dict[str, Any]) -> str:
    """
    :param rows: From ``read_results``, of all runs of the suite
    :param suite: The suite
    :return: Markdown: the first algorithm's IQM of the score over training minus that of every other, with its interval
    """
    over = over_training(rows, suite, "score")
    first, *others = suite["algorithms"]
    heads = [f"{first} minus", "IQM over training, equal steps", "equal time"]
    lines = [heads, ["---"] * len(heads), *([name] for name in others)]
    for by in ("steps", "time"):
        estimates, intervals = against_first(
            {name: over.loc[name, by].unstack("task").to_numpy() for name in suite["algorithms"]},
            lambda ours, theirs: np.array([metrics.aggregate_iqm(ours) - metrics.aggregate_iqm(theirs)]),
        )
        for line, pair in zip(lines[2:], estimates, strict=True):
            low, high = intervals[pair][:, 0]
            line.append(f"{estimates[pair][0]:+.2f} [{low:+.2f}, {high:+.2f}]")
    return markdown(lines)


def table_by_task(rows: pd.DataFrame, suite: dict[str, Any]) -> str:
    """
    :param rows: From ``read_results``
    :param suite: The suite
    :return: Markdown: a line for each task and algorithm with the mean over training by equal steps and by equal time, the
        returns at the end, all with the range of the seeds, and the time of a run, where it was done on the hardware of most
        rows
    """
    over = over_training(rows, suite)
    last = rows.assign(seconds=usual_seconds(rows)).sort_values("step").groupby([*KEYS, "mode"]).last()
    heads = ["task", "algorithm", "seeds", "over training, equal steps", "equal time", "at the end", "same, sample", "minutes"]
    lines = [heads, ["---"] * len(heads)]
    for task in suite["tasks"]:
        names = [name for name in suite["algorithms"] if (name, task) in over.index.droplevel("seed")]
        for name in names:
            ends = last.loc[name, task]
            columns = [
                over.loc[name, task]["steps"],
                over.loc[name, task]["time"],
                *(ends.xs(mode, level="mode")["return"] for mode in MODES),
            ]
            cells = [task if name == names[0] else "", name, str(len(columns[0]))]
            cells += [with_range(values) for values in columns]
            lines.append([*cells, f"{in_minutes(ends['seconds'].mean())}"])
    return markdown(lines)


def with_range(values: pd.Series) -> str:
    """
    :param values: Of the seeds
    :return: "mean (lowest to highest)", the mean alone of a single seed
    """
    digits = 1 if abs(values.mean()) < 100 else 0
    spread = f" ({values.min():.{digits}f} to {values.max():.{digits}f})" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    parser.add_argument("--input", type=Path, help="CSV file of run.py (default: benchmarks/results/<suite>.csv)")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the pictures (default: docs/images)")
    parser.add_argument("--table", type=Path, help="Markdown file (default: benchmarks/results/<suite>.md)")
    options = parser.parse_args(arguments)
    name, suite = options.suite.stem, read_suite(options.suite, options.tasks, options.algorithms, options.seeds)
    rows = read_results(options.input or RESULTS / f"{name}.csv", suite)
    options.images.mkdir(parents=True, exist_ok=True)
    # rliable draws from NumPy's global generator
    np.random.seed(0)
    draw_curves(rows, suite, options.images / f"{name}_curves.png")
    draw_overview(rows, suite, options.images / f"{name}_overview.png")
    path = options.table or RESULTS / f"{name}.md"
    by_task = path.with_stem(f"{path.stem}_by_task")
    by_task.write_text(table_by_task(rows, suite) + "\n")
    print(by_task.read_text())
    if missing := n_missing(rows, suite):
        print(f"No aggregates: {missing} runs are missing. `--tasks`, `--algorithms` and `--seeds` select a part.")
        return
    draw_aggregate(rows, suite, options.images / f"{name}_aggregate.png")
    path.write_text(table(rows, suite) + "\n")
    print(path.read_text())
    if len(suite["algorithms"]) > 1 and len(suite["seeds"]) > 1:
        against = path.with_stem(f"{path.stem}_differences")
        against.write_text(differences(rows, suite) + "\n")
        print(against.read_text())


if __name__ == "__main__":
    main()
