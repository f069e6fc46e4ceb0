"""
Which proposals estimate E[a_0 | a_t] of a Boltzmann policy best at twelve values per state: bias and error against quadrature.

The target pi*(a) is a product over coordinates, so that quadrature of each coordinate is exact. Points a_t are made as in
training, from an action of a policy that need not be the target yet. A network learns the mean of the estimates at a point
over all actions that may have led there; so each repetition draws that action anew, given a_t.

    python benchmarks/proposals.py --points 64 --repetitions 64 --seed 0
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path

import matplotlib
import pandas as pd
import torch as th
from report import IMAGES
from run import RESULTS

from sb3_mfpo.maths import boltzmann, paths
from sb3_mfpo.maths.paths import linear_path
from sb3_mfpo.mfpo.mfpo import LOCAL_STD

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TIMES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
DIMENSIONS = (1, 2, 6)
# Counts of proposals: policy, Gaussian, local. The policy's include the action that a_t was made from, as in training
ESTIMATORS = {
    "mixed": (4, 8, 0),  # an estimate from each, combined by effective sample size (the paper)
    "pooled": (4, 8, 0),  # one estimate, each action weighed by the proposal it comes from
    "balance": (4, 8, 0),  # one estimate, each action weighed by both proposals together
    "gaussian": (0, 12, 0),
    "stratified": (0, 12, 0),
    "local": (0, 6, 6),  # stratified, one around each of several actions, weighed by all proposals together (the defaults)
}
# Middles of the cells that [-1, 1] is cut into
CELLS = 2000
GRID = (th.arange(CELLS, dtype=th.float64) + 0.5) * 2 / CELLS - 1
BLUR = 0.3
# Told apart by colour-blind readers, the defaults' in black
COLORS = ["#0173b2", "#de8f05", "#029e73", "#949494", "#cc78bc", "black"]
MARKERS = ["o-", "X-", "s-", "P-", "D-", "*-"]


def modes(*centres: float, std: float) -> Callable[[th.Tensor], th.Tensor]:
    """
    :param centres: Means of equally likely normal distributions
    :param std: Their standard deviation
    :return: Unnormalised log-density
    """
    return lambda a: (-0.5 * ((a.unsqueeze(-1) - th.tensor(centres, dtype=a.dtype)) / std).square()).logsumexp(-1)


TARGETS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "narrow": modes(0.3, std=0.05),
    "modes": modes(-0.6, 0, 0.6, std=0.05),
    "wide": modes(0, std=0.5),
    "one-sided": lambda a: 8 * a,
    "bounded": th.zeros_like,
}


def normalise(log_density: th.Tensor) -> th.Tensor:
    """
    :param log_density: Unnormalised, in each cell, shape (CELLS,)
    :return: Normalised over [-1, 1], shape (CELLS,)
    """
    return log_density.log_softmax(0) - th.tensor(2 / CELLS).log()


def policies(target: str) -> dict[str, th.Tensor]:
    """
    :param target: One of ``TARGETS``
    :return: Log-density of a coordinate in each cell, shape (CELLS,), by policy: the target itself ("right"), the target with
        normal noise on it, cut off at the bounds ("blurred"), and for "modes" its last mode alone ("collapsed")
    """
    right = normalise(TARGETS[target](GRID))
    noise = -0.5 * ((GRID.unsqueeze(1) - GRID) / BLUR).square()
    found = {"right": right, "blurred": normalise((noise + right).logsumexp(1))}
    if target == "modes":
        found["collapsed"] = normalise(modes(0.6, std=0.05)(GRID))
    return found


def log_prob(table: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """
    :param table: Log-density of a coordinate in each cell, shape (CELLS,)
    :param actions: In [-1, 1], shape (..., d)
    :return: Their log-density, shape (...)
    """
    return table[((actions + 1) / 2 * CELLS).long().clamp_max(CELLS - 1)].sum(-1)


def posterior(table: th.Tensor, noisy: th.Tensor, t: float) -> th.Tensor:
    """
    :param table: Log-density of a coordinate of a_0 in each cell, shape (CELLS,)
    :param noisy: a_t, shape (P, d)
    :param t: Time in (0, 1)
    :return: Probability of each cell given a_t, shape (P, d, CELLS)
    """
    mu, sigma = linear_path(th.tensor(t, dtype=th.float64))
    return (table - 0.5 * ((noisy.unsqueeze(-1) - mu * GRID) / sigma).square()).softmax(-1)


def sample(probabilities: th.Tensor, uniform: th.Tensor) -> th.Tensor:
    """
    :param probabilities: Of the cells, shape (..., CELLS)
    :param uniform: Draws from [0, 1), shape (..., n)
    :return: Actions, uniform within a cell, shape (..., n)
    """
    ends = probabilities.cumsum(-1)
    mass = uniform * ends[..., -1:]
    cell = th.searchsorted(ends, mass, right=True).clamp_max(CELLS - 1)
    within = 1 - (ends.gather(-1, cell) - mass) / probabilities.gather(-1, cell)
    return ((cell + within) * 2 / CELLS - 1).clamp(-1, 1)


def uniforms(repetitions: int, points: int, n: int, d: int, stratified: bool, generator: th.Generator) -> th.Tensor:
    """
    :return: Draws from [0, 1), stratified over n or independent, shape (repetitions * points, n, d)
    """
    uniform = th.rand(repetitions, points, n, d, dtype=th.float64, generator=generator)
    if stratified:
        orders = th.rand(repetitions, n, d, generator=generator).argsort(1)
        uniform = th.stack([boltzmann.latin_hypercube(u, order) for u, order in zip(uniform, orders, strict=True)])
    return uniform.flatten(0, 1)


def estimate(
    name: str, target: th.Tensor, policy: th.Tensor, own: th.Tensor, noisy: th.Tensor, t: float, rng: th.Generator
) -> th.Tensor:
    """
    :param name: One of ``ESTIMATORS``
    :param target: Log-density of a coordinate in each cell, Q / alpha, shape (CELLS,)
    :param policy: The same of the policy, shape (CELLS,)
    :param own: The policy's actions that may have led to a_t, shape (R, P, d)
    :param noisy: a_t, shape (P, d)
    :param t: Time in (0, 1)
    :param rng: Generator of the proposals
    :return: R estimates of E[a_0 | a_t], shape (R, P, d)
    """
    (r, p, d), stratified = own.shape, name in ("stratified", "local")
    n_policy, n_gaussian, n_local = ESTIMATORS[name]
    first, time = own.reshape(r * p, d), own.new_full((r * p, 1), t)
    gaussian = (noisy.repeat(r, 1), *linear_path(time))
    # Actions of each proposal
    n = n_policy + n_local
    fresh = sample(policy.softmax(0), uniforms(r, p, n, d, False, rng).flatten()).view(r * p, n, d)
    of_policy = th.cat([first.unsqueeze(1), fresh[:, 1:]], dim=1) if n else fresh
    of_gaussian = boltzmann.gaussian_proposal(*gaussian, uniforms(r, p, n_gaussian, d, stratified, rng))
    local = (of_policy[:, n_policy:], own.new_ones(1, 1), own.new_full((1, 1), LOCAL_STD))
    of_local = boltzmann.gaussian_proposal(*local, uniforms(r, p, n_local, d, stratified, rng).unsqueeze(2)).squeeze(2)
    actions = th.cat([of_policy[:, :n_policy], of_gaussian, of_local], dim=1)
    q = log_prob(target, actions)
    if name == "mixed":
        log_weights = boltzmann.policy_log_weights(
            q[:, :n_policy], log_prob(policy, of_policy), of_policy, gaussian[0], time, 1
        )
        parts = [boltzmann.snis_mean(log_weights.softmax(1), of_policy)]
        parts += [boltzmann.snis_mean(q[:, n_policy:].softmax(1), of_gaussian)]
        return boltzmann.combine_by_sample_size(*zip(*parts, strict=True))[0].view(r, p, d)
    density = boltzmann.gaussian_log_prob(actions, *gaussian)
    if name == "pooled":
        q[:, :n_policy] += density[:, :n_policy] - log_prob(policy, of_policy)
    elif name == "balance":
        log_probs = [density.unsqueeze(1), log_prob(policy, actions).unsqueeze(1)]
        q = q + boltzmann.mixture_log_weights(log_probs, [n_gaussian, n_policy])
    elif name == "local":
        log_probs = [density.unsqueeze(1), boltzmann.gaussian_log_prob(actions.unsqueeze(1), *local)]
        q = q + boltzmann.mixture_log_weights(log_probs, [n_gaussian, 1])
    return boltzmann.snis_mean(q.softmax(1), actions)[0].view(r, p, d)


def errors(
    target: th.Tensor, policy: th.Tensor, d: int, t: float, points: int, repetitions: int, rng: th.Generator
) -> dict[str, th.Tensor]:
    """
    :return: Errors of the estimates of E[a_0 | a_t], shape (repetitions, points, d), by estimator; arguments as above
    """
    actions = sample(policy.softmax(0), uniforms(1, points, 1, d, False, rng).flatten()).view(points, d)
    noise = th.randn(points, d, dtype=th.float64, generator=rng)
    noisy = paths.interpolate(actions, noise, *linear_path(th.tensor(t, dtype=th.float64)))
    own = sample(posterior(policy, noisy, t), uniforms(1, points, d, repetitions, False, rng)).permute(2, 0, 1)
    truth = posterior(target, noisy, t) @ GRID
    return {name: estimate(name, target, policy, own, noisy, t, rng) - truth for name in ESTIMATORS}


def measure(points: int, repetitions: int, seed: int) -> pd.DataFrame:
    """
    :param points: Points a_t per case
    :param repetitions: Estimates per point
    :param seed: Of all draws
    :return: By case and estimator, per coordinate: the mean error ("bias"), the root mean square over the points of their mean
        errors, less what the repetitions leave of noise ("bias_rms"), and the root mean square error ("rms")
    """
    rng, rows = th.Generator().manual_seed(seed), []
    tables = {target: policies(target) for target in TARGETS}
    cases = [(target, policy) for target, by_policy in tables.items() for policy in by_policy]
    for (target, policy), d, t in product(cases, DIMENSIONS, TIMES):
        case = tables[target]["right"], tables[target][policy], d, t
        for name, error in errors(*case, points, repetitions, rng).items():
            squared_bias = error.mean(0).square() - error.var(0) / repetitions
            row = dict(estimator=name, target=target, policy=policy, d=d, t=t, bias=error.mean().item())
            row |= dict(bias_rms=squared_bias.mean().clamp_min(0).sqrt().item(), rms=error.square().mean().sqrt().item())
            rows.append(row)
    return pd.DataFrame(rows)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """
    :param rows: From ``measure``
    :param path: Of the picture
    """
    columns = {target: rows[(rows["target"] == target) & (rows["policy"] != "collapsed")] for target in TARGETS}
    columns["modes, policy collapsed"] = rows[rows["policy"] == "collapsed"]
    figure, axes = plt.subplots(
        len(DIMENSIONS), len(columns), figsize=(15, 7.5), sharex=True, sharey=True, layout="constrained"
    )
    for (i, d), (j, (title, shown)) in product(enumerate(DIMENSIONS), enumerate(columns.items())):
        lines = shown[shown["d"] == d].pivot_table("rms", "t", "estimator")[list(ESTIMATORS)]
        lines.plot(ax=axes[i, j], color=COLORS, style=MARKERS, markersize=5, logy=True, legend=False, grid=True)
        axes[i, j].set(xlabel="t (1 is noise)", ylabel=f"rms error, d = {d}", title=title if i == 0 else "")
    figure.legend(axes[0, 0].get_lines(), list(ESTIMATORS), loc="outside lower center", ncols=len(ESTIMATORS))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=64, help="estimates per point, at least 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "proposals.csv")
    parser.add_argument("--image", type=Path, default=IMAGES / "proposals.png")
    options = parser.parse_args(arguments)
    rows = measure(options.points, options.repetitions, options.seed)
    rows.round(5).to_csv(options.output, index=False)
    draw(rows, options.image)
    collapsed = rows[(rows["policy"] == "collapsed") & (rows["t"] >= 0.8)]
    for title, table in {
        "rms error, mean over targets, policies and times": rows.pivot_table("rms", "estimator", "d"),
        "the same by policy": rows.pivot_table("rms", "estimator", ["policy", "d"]),
        "bias at a point (bias_rms) by policy": rows.pivot_table("bias_rms", "estimator", ["policy", "d"]),
        "bias, policy collapsed, t at least 0.8": collapsed.pivot_table("bias", "estimator", ["d", "t"]),
    }.items():
        print(f"{title}\n{table.loc[list(ESTIMATORS)].round(3).to_string()}\n")
    return rows


if __name__ == "__main__":
    main()
