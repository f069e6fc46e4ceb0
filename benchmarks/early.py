"""
How a robot learns in its first 25 000 steps, with the defaults and with the paper's settings, at twelve proposals a state.

Rewards are divided by the running standard deviation of the return, so that no setting depends on the task. A row per
evaluation: mean return of four episodes by the best of ten and by single samples, temperature and entropy.

    python benchmarks/early.py --variants defaults paper --seeds 0 1 2 --output early.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import pandas as pd
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mfpo import MFPO

SHARED: dict[str, Any] = dict(learning_starts=5000, policy_delay=2)
# In units of the return's standard deviation
VALUES: dict[str, Any] = dict(v_min=-20, v_max=20, value_init="narrow")
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": dict(n_gaussian_samples=6, n_local_samples=6),
    "slower temperature": dict(n_gaussian_samples=6, n_local_samples=6, ent_coef_rate=1.0),
    "paper": dict(MFPO.PAPER, n_policy_samples=4, n_gaussian_samples=8),
}
COLUMNS = ("ent_coef", "entropy", "ess_gaussian", "q_value")


class Evaluate(BaseCallback):
    """
    Append a row to a table at regular times. Training goes on as if nothing had happened.

    :param task: ID of the environment
    :param row: What the rows begin with
    :param every: Steps between evaluations
    :param path: The table
    """

    def __init__(self, task: str, row: dict[str, Any], every: int, path: Path):
        super().__init__()
        self.env = Monitor(gym.make(task))
        self.row, self.every, self.path = row, every, path

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            row = dict(self.row, steps=self.num_timesteps)
            with th.random.fork_rng():
                self.env.reset(seed=1000)
                for name, deterministic in (("best_of_ten", True), ("sample", False)):
                    row[name] = evaluate_policy(self.model, self.env, 4, deterministic)[0]
            row |= {name: self.logger.name_to_value.get(f"train/{name}") for name in COLUMNS}
            pd.DataFrame([row]).round(5).to_csv(self.path, mode="a", index=False, header=not self.path.exists())
        return True


def train(task: str, variant: str, seed: int, steps: int, every: int, path: Path) -> MFPO:
    """Train a variant, with a row of the table per evaluation."""
    env = VecNormalize(DummyVecEnv([lambda: Monitor(gym.make(task))]), norm_obs=False, clip_reward=1e9)
    settings = dict(VARIANTS[variant])
    policy_kwargs = VALUES | settings.pop("policy_kwargs", {})
    model = MFPO("MlpPolicy", env, seed=seed, policy_kwargs=policy_kwargs, **SHARED, **settings)
    return model.learn(steps, callback=Evaluate(task, dict(task=task, variant=variant, seed=seed), every, path))


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=25_000, help="environment steps of a run (default 25000)")
    parser.add_argument("--every", type=int, default=2500, help="steps between evaluations (default 2500)")
    parser.add_argument("--output", type=Path, default=Path("early.csv"), help="the table (default early.csv)")
    options = parser.parse_args(arguments)

    for seed in options.seeds:
        for variant in options.variants:
            train(options.task, variant, seed, options.steps, options.every, options.output)
    table = pd.read_csv(options.output)
    print(table.pivot_table(["best_of_ten", "sample"], ["task", "variant", "seed"], "steps").round(0).to_string())
    return table


if __name__ == "__main__":
    main()
