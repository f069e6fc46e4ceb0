"""
Where each of the paper's proposals is good: effective sample sizes and spread of the velocity estimates against time, on a
trained policy (Fig. 1 of MFPO's paper).

At states that the policy visits, and points a_t on the way to its actions, the velocity is estimated again and again from
fresh proposals. "With itself" has the action that a_t was made from among the policy's proposals, as in training. Errors are
against an estimate from many more proposals of both kinds.

    python benchmarks/estimators.py runs/cpu/MFPO/HalfCheetah-v5/seed_0/mfpo/HalfCheetah-v5_1/HalfCheetah-v5.zip HalfCheetah-v5
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
import torch as th
from report import IMAGES
from run import RESULTS
from stable_baselines3.common.env_util import make_vec_env

from sb3_mfpo import MFPO
from sb3_mfpo.envs import register_dm_control
from sb3_mfpo.maths import boltzmann, paths
from sb3_mfpo.maths.categorical import reduce_values
from sb3_mfpo.maths.paths import linear_path, linear_velocity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TIMES = np.linspace(0.05, 0.95, 19).round(2)
ESTIMATORS = ("policy", "policy, with itself", "Gaussian", "combined")


def visited_states(model: MFPO, task: str, n_states: int) -> th.Tensor:
    """
    :param model: A trained model
    :param task: Gymnasium id
    :param n_states: How many, two steps apart
    :return: Observations, shape (n_states, S)
    """
    env = make_vec_env(task, seed=0)
    observations, found = env.reset(), []
    for step in range(2 * n_states):
        if step % 2 == 0:
            found.append(np.array(observations, dtype=np.float32))
        observations, *_ = env.step(model.predict(observations, deterministic=False)[0])  # type: ignore[arg-type]
    env.close()
    return th.as_tensor(np.concatenate(found), device=model.device)


def estimate(
    model: MFPO,
    features: tuple[th.Tensor, th.Tensor],
    own: tuple[th.Tensor, th.Tensor],
    noisy: th.Tensor,
    t: th.Tensor,
    factor: int,
) -> dict[str, tuple[th.Tensor, th.Tensor]]:
    """
    Velocities at given points from fresh proposals.

    :param model: A trained model
    :param features: The target actor's and the critic's features of the states, shapes (B, S)
    :param own: The actions that the points were made from, shape (B, 1, d), and their log-probabilities, shape (B, 1)
    :param noisy: The points a_t, shape (B, d)
    :param t: Time in (0, 1), shape (B, 1)
    :param factor: How many times the proposals of a gradient step
    :return: Velocity, shape (B, d), and effective sample size, shape (B, 1), by estimator
    """
    actor_features, critic_features = features
    temperature = float(model._temperature())
    n_policy, n_gaussian = factor * model.n_policy_samples, factor * model.n_gaussian_samples

    def values(actions: th.Tensor) -> th.Tensor:
        return reduce_values(model.critic.q_values(critic_features.unsqueeze(1), actions), model.policy.critic_reduction)

    def velocity(log_weights: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean_action, size = boltzmann.snis_mean(log_weights.softmax(1), actions)
        return linear_velocity(noisy, mean_action, t), size

    def from_policy(actions: th.Tensor, log_prob: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        log_weights = boltzmann.policy_log_weights(values(actions), log_prob, actions, noisy, t, temperature)
        return velocity(log_weights, actions)

    noise = th.randn(len(noisy), n_policy, noisy.shape[1], device=model.device)
    actions, log_prob = model.policy.sample(actor_features.unsqueeze(1), noise)
    with_itself = from_policy(th.cat([own[0], actions[:, 1:]], dim=1), th.cat([own[1], log_prob[:, 1:]], dim=1))
    uniform = th.rand(len(noisy), n_gaussian, noisy.shape[1], device=model.device)
    proposed = boltzmann.gaussian_proposal(noisy, *linear_path(t), uniform)
    estimates = {
        "policy": from_policy(actions, log_prob),
        "policy, with itself": with_itself,
        "Gaussian": velocity(values(proposed) / temperature, proposed),
    }
    pair = [estimates["policy, with itself"], estimates["Gaussian"]]
    combined, _ = boltzmann.combine_by_sample_size([one[0] for one in pair], [one[1] for one in pair])
    return estimates | {"combined": (combined, pair[0][1] + pair[1][1])}


@th.no_grad()
def measure(model: MFPO, observations: th.Tensor, repetitions: int) -> pd.DataFrame:
    """
    :param model: A trained model
    :param observations: States, shape (B, S)
    :param repetitions: Estimates per point
    :return: By time and estimator: effective sample size, standard deviation of an estimate's coordinates over the
        repetitions, root mean square of their error; medians over the points
    """
    features = model.actor_target.encode(observations), model.critic.encode(observations)
    d = model.action_space.shape[0]  # type: ignore[index]
    rows = []
    for time in TIMES:
        t = th.full((len(observations), 1), float(time), device=model.device)
        actions, log_prob = model.policy.sample(features[0].unsqueeze(1), th.randn(len(t), 1, d, device=model.device))
        noisy = paths.interpolate(actions[:, 0], th.randn(len(t), d, device=model.device), *linear_path(t))
        reference = estimate(model, features, (actions, log_prob), noisy, t, factor=64)
        # Without the action itself, which no derivation asks for
        truth, _ = boltzmann.combine_by_sample_size(*zip(reference["policy"], reference["Gaussian"], strict=True))
        repeated = [estimate(model, features, (actions, log_prob), noisy, t, factor=1) for _ in range(repetitions)]
        for name in ESTIMATORS:
            velocities = th.stack([one[name][0] for one in repeated])
            rows.append(
                {
                    "t": time,
                    "estimator": name,
                    "effective sample size": th.stack([one[name][1] for one in repeated]).mean(0).median().item(),
                    "standard deviation": velocities.var(0).mean(1).sqrt().median().item(),
                    "error": (velocities - truth).square().mean((0, 2)).sqrt().median().item(),
                }
            )
    return pd.DataFrame(rows)


def draw(rows: pd.DataFrame, title: str, path: Path) -> None:
    """
    :param rows: From ``measure``
    :param title: Of the picture
    :param path: Of the picture
    """
    columns = ("effective sample size", "standard deviation", "error")
    figure, axes = plt.subplots(1, len(columns), figsize=(13, 3.8), layout="constrained")
    for axis, column in zip(axes, columns, strict=True):
        # The combination has no sample size of its own
        shown = rows[(rows["estimator"] != "combined") | (column != columns[0])]
        seaborn.lineplot(
            shown,
            x="t",
            y=column,
            hue="estimator",
            hue_order=ESTIMATORS,
            palette="colorblind",
            marker="o",
            ax=axis,
            legend=axis is axes[1],
        )
        axis.set_xlabel("t (1 is noise)")
    for axis in axes[1:]:
        axis.set_yscale("log")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model of MFPO")
    parser.add_argument("env", help="its task")
    parser.add_argument(
        "--proposals", type=int, nargs=2, default=[8, 8], help="of the policy, and Gaussian (default: %(default)s)"
    )
    parser.add_argument("--states", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS / "estimators.csv")
    parser.add_argument("--picture", type=Path, default=IMAGES / "estimators.png")
    options = parser.parse_args(arguments)
    register_dm_control()
    th.manual_seed(0)
    model: Any = MFPO.load(options.model, device="cpu", buffer_size=1)
    model.n_policy_samples, model.n_gaussian_samples = options.proposals
    rows = measure(model, visited_states(model, options.env, options.states), options.repetitions)
    rows.round(4).to_csv(options.output, index=False)
    n = f"{model.n_policy_samples} : {model.n_gaussian_samples} proposals"
    draw(rows, f"{options.env}, temperature {float(model._temperature()):.3g}, {n}", options.picture)
    print(rows.pivot(index="t", columns="estimator").round(3).to_string())
    return rows


if __name__ == "__main__":
    main()
