"""
Several goals at the same distance in a maze of Gymnasium-Robotics: a point that is pushed, or a robot with four legs.

    pip install ".[robotics]"
    python examples/mazes.py --algorithms MFPO SAC --seeds 0 1 2
    python examples/mazes.py --maze ant --steps 100000 --every 10000

A crossing with a goal at the end of each of its four arms. All goals count alike: a step pays what the nearest one would pay
in the task's own reward, exp(-distance) ("dense") or 1 within 0.45 of it ("sparse"), until the time is up. At every evaluation
40 episodes of single samples and 40 of deterministic actions tell the return, and the share of episodes that end at each goal.
Runs that the table has are not repeated, unless they are shorter.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import pandas as pd
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.envs import register_robotics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# 1 is a wall, g a goal, r where episodes begin
CROSS: list[list[Any]] = [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, "g", 1, 1, 1],
    [1, 1, 1, 0, 1, 1, 1],
    [1, "g", 0, "r", 0, "g", 1],
    [1, 1, 1, 0, 1, 1, 1],
    [1, 1, 1, "g", 1, 1, 1],
    [1, 1, 1, 1, 1, 1, 1],
]
# Name of the task, how often an action is repeated, how many of the task's steps an episode has, layers
MAZES: dict[str, tuple[str, int, int, list[int]]] = {
    "point": ("PointMaze_UMaze{}-v3", 5, 200, [64, 64]),
    "ant": ("AntMaze_UMaze{}-v5", 1, 500, [256, 256]),
}
ALGORITHMS: dict[str, Any] = {"MFPO": MFPO, "SOM": SOM, "SAC": SAC}
# Deterministic actions or not
WAYS = {"chosen": True, "sample": False}
EPISODES = 40
RANDOM_STEPS = 2000
RADIUS = 0.45


class NearestGoal(gym.Wrapper):
    """
    The nearest goal of the map is the one that counts. Observed is what the task observes but for a goal, and the place.

    :param env: A maze
    :param repeat: How many steps an action is repeated for
    """

    def __init__(self, env: Any, repeat: int):
        super().__init__(env)
        self.repeat = repeat
        self.task = env.unwrapped
        self.goals = np.array(self.task.maze.unique_goal_locations)
        size = self.task.observation_space["observation"].shape[0]
        self.observation_space = spaces.Box(-np.inf, np.inf, (size + 2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._flat(observation), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        for _ in range(self.repeat):
            observation, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                break
        place = observation["achieved_goal"]
        distances = np.linalg.norm(self.goals - place, axis=1)
        nearest = int(distances.argmin())
        reward = self.task.compute_reward(place, self.goals[nearest], info)
        goal = nearest if distances[nearest] <= RADIUS else None
        return self._flat(observation), float(reward), terminated, truncated, info | {"goal": goal}

    def _flat(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([observation["observation"], observation["achieved_goal"]]).astype(np.float32)


def make_env(maze: str, reward: str, seed: int | None = None) -> VecEnv:
    task, repeat, limit, _ = MAZES[maze]

    def make() -> gym.Env:
        env = gym.make(task.format({"dense": "Dense", "sparse": ""}[reward]), maze_map=CROSS, max_episode_steps=limit)
        return NearestGoal(env, repeat)

    return make_vec_env(make, seed=seed)


def make_model(algorithm: str, maze: str, reward: str, seed: int, entropy: float) -> Any:
    return ALGORITHMS[algorithm](
        "MlpPolicy",
        make_env(maze, reward, seed),
        learning_rate=1e-3 if maze == "point" else 3e-4,
        learning_starts=RANDOM_STEPS,
        buffer_size=200_000,
        tau=0.005,
        policy_kwargs=dict(net_arch=MAZES[maze][3]),
        seed=seed,
        device="cpu",
        **({} if algorithm == "SOM" else dict(target_entropy=entropy)),
    )


def evaluate(model: Any, env: VecEnv, deterministic: bool) -> tuple[float, np.ndarray]:
    """Mean return, and the share of episodes that end at each goal; the same starts at every call."""
    env.seed(1000)
    ended = np.zeros(len(env.get_attr("goals")[0]))

    def note(names: dict[str, Any], _: dict[str, Any]) -> None:
        if names["done"] and (goal := names["info"]["goal"]) is not None:
            ended[goal] += 1

    mean, _ = evaluate_policy(model, env, EPISODES, deterministic, callback=note)
    return float(mean), ended / EPISODES  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maze", default="point", choices=MAZES)
    parser.add_argument("--rewards", nargs="+", default=["dense", "sparse"], choices=["dense", "sparse"])
    parser.add_argument("--algorithms", nargs="+", default=["MFPO"], choices=ALGORITHMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run per seed (default 0)")
    parser.add_argument("--entropy", type=float, default=0.0, help="target entropy in nats (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10_000, help="environment steps of a run (default %(default)s)")
    parser.add_argument("--every", type=int, default=1000, help="steps between evaluations (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("mazes"), help="of picture and table, without suffix")
    options = parser.parse_args(arguments)
    register_robotics()

    file = options.output.with_suffix(".csv")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(file).to_dict("records") if file.exists() else []
    for reward in options.rewards:
        env = make_env(options.maze, reward)
        for seed in options.seeds:
            for algorithm in options.algorithms:
                key = dict(maze=options.maze, reward=reward, algorithm=algorithm, entropy=options.entropy, seed=seed)
                same = [row for row in rows if key.items() <= row.items()]
                if any(row["step"] + options.every > options.steps for row in same):
                    continue
                model, seconds = make_model(algorithm, options.maze, reward, seed, options.entropy), 0.0
                run = []
                for step in range(options.every, options.steps + 1, options.every):
                    before = time.process_time()
                    model.learn(options.every, reset_num_timesteps=False)
                    seconds += time.process_time() - before
                    for way, chosen in WAYS.items():
                        returned, shares = evaluate(model, env, chosen)
                        ended = {f"goal {k}": share for k, share in enumerate(shares)}
                        run.append(key | dict(step=step, seconds=round(seconds, 1), way=way, reward_sum=returned) | ended)
                        print(*key.values(), step, way, round(returned, 2), shares, flush=True)
                rows = [row for row in rows if row not in same] + run
                pd.DataFrame(rows).to_csv(file, index=False)
    table = pd.read_csv(file)
    draw(table[table["maze"] == options.maze], options.output.with_suffix(".png"))
    return table


def draw(table: pd.DataFrame, output: Path) -> None:
    """Single samples: returns by steps and by time, and the goals at which a tenth of the episodes or more end."""
    samples = table[table["way"] == "sample"]
    samples = samples.assign(goals=(samples.filter(regex="^goal ") >= 0.1).sum(axis=1), minutes=samples["seconds"] / 60)
    labels = dict(step="environment steps", minutes="minutes of a core", reward_sum="return", goals="goals in use")
    rewards = list(samples["reward"].unique())
    figure, axes = plt.subplots(len(rewards), 3, figsize=(9, 2.6 * len(rewards)), layout="constrained", squeeze=False)
    for line, reward in zip(axes, rewards, strict=True):
        for axis, (x, y) in zip(line, [("step", "reward_sum"), ("minutes", "reward_sum"), ("step", "goals")], strict=True):
            for name, runs in samples[samples["reward"] == reward].groupby("algorithm", sort=False):
                means, by_step = runs.groupby("step", as_index=False).mean(numeric_only=True), runs.groupby("step")[y]
                axis.plot(means[x], means[y], label=name)
                axis.fill_between(means[x], by_step.min(), by_step.max(), alpha=0.2)
            axis.set(xlabel=labels[x], ylabel=labels[y], title=f"{reward} reward")
    axes[0, 0].legend()
    figure.savefig(output, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
