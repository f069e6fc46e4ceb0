"""
Train MFPO on a MuJoCo task in minutes, and compare it with random actions.

    python examples/quickstart.py

The task is the inverted double pendulum: two poles on a cart, kept upright. An episode ends when they fall, or after 1000
steps with a return of about 9360. Everything is written to ``demo/``: the model and a picture of the learning curve.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_mfpo import MFPO

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Smaller and faster to learn than what a million steps of large robots need
SETTINGS: dict[str, Any] = dict(
    learning_rate=1e-3,
    learning_starts=500,
    batch_size=128,
    gamma=0.97,
    tau=0.02,
    policy_kwargs=dict(net_arch=[64, 64]),
)


class RandomActions:
    """Uniformly random actions, in the form that ``evaluate_policy`` takes."""

    def __init__(self, env: VecEnv):
        self.env = env

    def predict(self, observation: np.ndarray, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        return np.stack([self.env.action_space.sample() for _ in range(self.env.num_envs)]), None


def evaluate(policy: Any, env: VecEnv, n_eval_episodes: int) -> tuple[float, float]:
    """Mean and standard deviation of the return."""
    returns, _ = evaluate_policy(policy, env, n_eval_episodes=n_eval_episodes, return_episode_rewards=True)
    return float(np.mean(returns)), float(np.std(returns))


def draw_learning_curve(evaluations: Path, random_return: float, env_id: str, path: Path) -> None:
    """Mean and standard deviation of the evaluations that ``EvalCallback`` stored."""
    data = np.load(evaluations)
    mean, std = data["results"].mean(axis=1), data["results"].std(axis=1)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axis.plot(data["timesteps"], mean, marker="o", markersize=3, label="MFPO")
    axis.fill_between(data["timesteps"], mean - std, mean + std, alpha=0.2, label="± standard deviation over episodes")
    axis.axhline(random_return, color="grey", linestyle="--", label="random actions")
    axis.set(xlabel="environment steps", ylabel="return of an episode", title=env_id)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="InvertedDoublePendulum-v5", help="Gymnasium id (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10_000, help="environment steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for model and picture (default: demo)")
    options = parser.parse_args(arguments)

    # Networks this small do not gain from more threads
    th.set_num_threads(1)
    eval_env = make_vec_env(options.env, seed=options.seed + 1000)
    random_return, _ = evaluate(RandomActions(eval_env), eval_env, n_eval_episodes=20)

    model = MFPO("MlpPolicy", options.env, seed=options.seed, **SETTINGS)
    evaluation = EvalCallback(
        eval_env, n_eval_episodes=3, eval_freq=max(options.steps // 16, 1), log_path=str(options.output), verbose=0
    )
    start = time.perf_counter()
    model.learn(options.steps, callback=evaluation, progress_bar=True)
    seconds = time.perf_counter() - start

    final_return, final_std = evaluate(model, eval_env, n_eval_episodes=10)
    model.save(options.output / "mfpo")
    curve = options.output / "learning_curve.png"
    draw_learning_curve(options.output / "evaluations.npz", random_return, options.env, curve)
    print(f"{options.env}, {options.steps} steps in {seconds:.0f} s with evaluations")
    print(f"Random actions: return {random_return:.0f} per episode")
    print(f"MFPO:           return {final_return:.0f} +- {final_std:.0f} (10 episodes)")
    print(f"Saved {options.output / 'mfpo.zip'} and {curve}")
    return final_return


if __name__ == "__main__":
    main()
