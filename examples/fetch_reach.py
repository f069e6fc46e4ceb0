"""
Goals and hindsight: a robot's arm learns to bring its hand where it is told, from a reward that only says whether it is there.

    pip install ".[robotics]"
    python examples/fetch_reach.py --algorithms MFPO SAC --seeds 0 1 2

`FetchReach-v4` of Gymnasium-Robotics with SB3's `HerReplayBuffer` and `MultiInputPolicy`. Every 1 000 steps 20 episodes with
the best of ten candidates (of SAC, the mean) and 20 with single samples tell the share that ends at the goal.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.envs import register_robotics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TASK = "FetchReach-v4"
ALGORITHMS: dict[str, Any] = {"MFPO": MFPO, "SOM": SOM, "SAC": SAC}
# Deterministic actions or not
WAYS = {"chosen": True, "sample": False}
EPISODES = 20


def make(algorithm: str, seed: int) -> Any:
    return ALGORITHMS[algorithm](
        "MultiInputPolicy",
        make_vec_env(TASK, seed=seed),
        replay_buffer_class=HerReplayBuffer,
        learning_rate=1e-3,
        gamma=0.95,
        batch_size=256,
        buffer_size=50_000,
        learning_starts=1000,
        policy_kwargs=dict(net_arch=[64, 64]),
        seed=seed,
        device="cpu",
    )


def success(model: Any, env: VecEnv, deterministic: bool) -> float:
    """Share of episodes that end at their goal, the same starts and goals at every call."""
    env.seed(1000)
    ends: list[float] = []

    def note(names: dict[str, Any], _: dict[str, Any]) -> None:
        if names["done"]:
            ends.append(names["info"]["is_success"])

    evaluate_policy(model, env, EPISODES, deterministic, callback=note)
    return sum(ends) / len(ends)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["MFPO"], choices=ALGORITHMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run per seed (default 0)")
    parser.add_argument("--steps", type=int, default=10_000, help="environment steps of a run (default %(default)s)")
    parser.add_argument("--every", type=int, default=1000, help="steps between evaluations (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("fetch_reach"), help="of picture and table, without suffix")
    options = parser.parse_args(arguments)
    register_robotics()

    rows, env = [], make_vec_env(TASK)
    for algorithm in options.algorithms:
        for seed in options.seeds:
            model = make(algorithm, seed)
            for step in range(options.every, options.steps + 1, options.every):
                model.learn(options.every, reset_num_timesteps=False)
                rows += [(algorithm, seed, step, way, success(model, env, chosen)) for way, chosen in WAYS.items()]
                print(algorithm, seed, step, *(f"{way} {share:.2f}" for *_, way, share in rows[-2:]), flush=True)
    table = pd.DataFrame(rows, columns=["algorithm", "seed", "step", "way", "success"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output.with_suffix(".csv"), index=False)

    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", sharey=True)
    for axis, way in zip(axes, WAYS, strict=True):
        for name, runs in table[table["way"] == way].groupby("algorithm", sort=False):
            by_step = runs.groupby("step")["success"]
            axis.plot(by_step.mean(), label=name)
            axis.fill_between(by_step.min().index, by_step.min(), by_step.max(), alpha=0.2)
        axis.set(title=f"{TASK}, {way} actions", xlabel="environment steps", ylim=(-0.02, 1.02))
    axes[0].set_ylabel("episodes that end at the goal")
    axes[0].legend()
    figure.savefig(options.output.with_suffix(".png"), dpi=110)
    plt.close(figure)
    return table


if __name__ == "__main__":
    main()
