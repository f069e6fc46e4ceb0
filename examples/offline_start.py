"""
Start from data: transitions of a mediocre policy, in the replay buffer before the first step.

SAC learns Pendulum for a short while and then collects 10 000 steps. MFPO learns from these data alone, and goes on with steps
of its own; beside it, MFPO that starts from nothing. MFPO is no offline RL algorithm: nothing keeps its values honest about
actions that the data lack. On a harder task, or with fewer data, what it learns from them alone may be worth little.

    python examples/offline_start.py --output offline_start.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mfpo import MFPO
from sb3_mfpo.data import load_transitions

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Data = dict[str, np.ndarray]


def collect(policy: Any, task: str, n: int) -> tuple[Data, float]:
    """n transitions of single samples of a policy, in order, and the mean return of their whole episodes."""
    env = gym.make(task)
    rows, returns, total = [], [], 0.0
    observation, _ = env.reset(seed=0)
    for _ in range(n):
        action, _ = policy.predict(observation)
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, after, terminated, truncated))
        observation, total = after, total + float(reward)
        if terminated or truncated:
            returns.append(total)
            (observation, _), total = env.reset(), 0.0
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}, float(
        np.mean(returns)
    )


def learn(data: Data | None, options: argparse.Namespace, seed: int) -> list[float]:
    """Mean return of the best-of-ten action before the first step, and after every so many of them."""
    model, envs = MFPO("MlpPolicy", options.task, seed=seed), make_vec_env(options.task, n_envs=10, seed=100)
    if data is not None:
        load_transitions(model, data)
        model.train(options.gradient_steps, model.batch_size)
    returns: list[float] = []
    for step in range(0, options.steps + 1, options.every):
        if step > 0:
            model.learn(options.every, reset_num_timesteps=False)
        returns.append(np.mean(evaluate_policy(model, envs, n_eval_episodes=10)[0]).item())
        print(f"{'from nothing' if data is None else 'from data'}, seed {seed}, step {step}: {returns[-1]:.0f}", flush=True)
    return returns


def main(arguments: list[str] | None = None) -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="Pendulum-v1", help="a Gymnasium id (default Pendulum-v1)")
    parser.add_argument("--mediocre", type=int, default=2500, help="steps that SAC learns before it collects (default 2500)")
    parser.add_argument("--transitions", type=int, default=10_000, help="transitions that it collects (default 10000)")
    parser.add_argument("--gradient-steps", type=int, default=3000, help="steps of learning from them alone (default 3000)")
    parser.add_argument("--steps", type=int, default=4000, help="own steps, with one gradient step each (default 4000)")
    parser.add_argument("--every", type=int, default=500, help="own steps between evaluations (default 500)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two runs per seed (default 0 1 2)")
    parser.add_argument("--output", type=Path, default=Path("offline_start.png"), help="the picture")
    options = parser.parse_args(arguments)

    mediocre = SAC("MlpPolicy", options.task, seed=0).learn(options.mediocre)
    data, mean_return = collect(mediocre, options.task, options.transitions)
    print(f"Data: {options.transitions} transitions, mean return {mean_return:.0f}", flush=True)

    curves, figure = {}, plt.figure(figsize=(6, 4), layout="constrained")
    axis, steps = figure.subplots(), np.arange(0, options.steps + 1, options.every)
    axis.axhline(mean_return, color="0.5", linestyle=":", label="the data")
    for label, start in (("from nothing", None), ("from the data", data)):
        runs = curves[label] = np.array([learn(start, options, seed) for seed in options.seeds])
        (line,) = axis.plot(steps, np.median(runs, axis=0), label=label)
        axis.fill_between(steps, runs.min(axis=0), runs.max(axis=0), color=line.get_color(), alpha=0.2)
    axis.set(title=f"{options.task}, {len(options.seeds)} seed(s)", xlabel="own steps", ylabel="return, median and range")
    axis.legend()
    figure.savefig(options.output, dpi=110)
    plt.close(figure)
    print(f"Picture: {options.output}")
    return curves


if __name__ == "__main__":
    main()
