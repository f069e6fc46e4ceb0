"""
Four goals at the same distance, all equally good: a policy that keeps them all, and what that is good for.

    python examples/multigoal.py --seeds 0 1 2 --entropies 0.5 -0.5
    python examples/multigoal.py --seeds 0 1 2 --algorithms SAC --steps 20000  # as long as MFPO takes

A point begins near the middle of a plane and moves by at most 1 in each coordinate; an episode ends at a goal. MFPO, SOM, SAC
and TD3 take 3 000 random steps, in which every goal is met, and learn for 8 000 more; MFPO and SAC at each target entropy.
Then

- where single samples go: the share of episodes at each goal, and the return;
- a goal is closed: the one that is visited most pays nothing any more. Steps of further training until the return is back;
- a goal is found late: the one that is visited least pays three times as much. Steps until most episodes end there.

Both begin with an empty replay buffer. Runs that the table has are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import pandas as pd
from gymnasium import spaces
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.noise import NormalActionNoise

from sb3_mfpo import MFPO, SOM

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GOALS = 5.0 * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
RADIUS = 1.0
TIME_LIMIT = 30
RANDOM_STEPS = 3000
# Of the further trainings, at most
FURTHER_STEPS = 1000
# Of TD3's actions, in training and in evaluations
NOISE = 0.1

SHARED: dict[str, Any] = dict(learning_rate=1e-3, learning_starts=RANDOM_STEPS, buffer_size=20_000, tau=0.005, device="cpu")
NETWORKS: dict[str, Any] = dict(net_arch=[64, 64])
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    # A temperature that begins high keeps all goals until their values are known
    "MFPO": (MFPO, dict(ent_coef="auto_1", actor_rate=1.0, policy_kwargs=NETWORKS)),
    "SOM": (SOM, dict(policy_kwargs=NETWORKS)),
    "SAC": (SAC, dict(policy_kwargs=NETWORKS)),
    "TD3": (TD3, dict(action_noise=NormalActionNoise(np.zeros(2), np.full(2, NOISE)), policy_kwargs=NETWORKS)),
}
WITH_ENTROPY = ("MFPO", "SAC")
NONE = float("nan")


class FourGoals(gym.Env):
    """
    Observed is the position. A step costs a tenth of the distance to the nearest goal; a goal pays and ends the episode.

    :param pays: What each goal pays; one that pays nothing is no goal
    """

    observation_space = spaces.Box(-7, 7, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, pays: tuple[float, ...] = (10, 10, 10, 10)):
        self.pays = np.array(pays, dtype=float)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps, self.position = 0, 0.1 * self.np_random.standard_normal(2)
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        self.position = np.clip(self.position + action, -7, 7)
        (index,), (distance,) = nearest_goal(self.position[None], self.pays)
        arrived = distance <= RADIUS
        reward = self.pays[index] if arrived else -0.1 * distance
        return self.position.astype(np.float32), float(reward), bool(arrived), self.steps >= TIME_LIMIT, {}


def nearest_goal(positions: np.ndarray, pays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the goal nearest to each position (n, 2), and the distance to its centre (n,)."""
    distances = np.linalg.norm(positions[:, None] - GOALS, axis=2)
    distances[:, pays == 0] = np.inf
    return distances.argmin(axis=1), distances.min(axis=1)


def make(algorithm: str, seed: int, entropy: float) -> Any:
    kind, settings = ALGORITHMS[algorithm]
    kwargs = {} if np.isnan(entropy) else dict(target_entropy=entropy)
    # SAC adds to the policy's arguments
    return kind("MlpPolicy", FourGoals(), seed=seed, **SHARED, **copy.deepcopy(settings), **kwargs)


def evaluate(model: Any, pays: np.ndarray, n_episodes: int = 200) -> tuple[float, np.ndarray, np.ndarray]:
    """
    All episodes at once, by single samples (of TD3 with its noise).

    :return: Mean return, share of episodes that end at each goal, paths (TIME_LIMIT + 1, n_episodes, 2) that stay at a goal
    """
    rng = np.random.default_rng(0)
    position, total = 0.1 * rng.standard_normal((n_episodes, 2)), np.zeros(n_episodes)
    on_the_way, ended = np.full(n_episodes, True), np.zeros(len(GOALS))
    paths = [position]
    for _ in range(TIME_LIMIT):
        actions, _ = model.predict(position.astype(np.float32))
        if model.action_noise is not None:
            actions = np.clip(actions + rng.normal(0, NOISE, actions.shape), -1, 1)
        position = np.where(on_the_way[:, None], np.clip(position + actions, -7, 7), position)
        index, distance = nearest_goal(position, pays)
        arrived = on_the_way & (distance <= RADIUS)
        total += np.where(arrived, pays[index], np.where(on_the_way, -0.1 * distance, 0))
        ended += np.bincount(index[arrived], minlength=len(GOALS))
        on_the_way &= ~arrived
        paths.append(position)
    return float(total.mean()), ended / n_episodes, np.stack(paths)


def run(algorithm: str, seed: int, entropy: float, steps: int) -> tuple[dict[str, Any], np.ndarray]:
    """Train, then go on with a goal closed, and with one that pays more. What was seen, and the paths after the training."""
    before = time.process_time()
    model = make(algorithm, seed, entropy).learn(RANDOM_STEPS + steps)
    seconds = round(time.process_time() - before, 1)
    reward, shares, paths = evaluate(model, pays_of(model))
    row = dict(algorithm=algorithm, entropy=entropy, seed=seed, steps=steps, seconds=seconds)
    row |= dict(reward=reward, missed=1 - shares.sum())
    row |= {f"goal {k}": share for k, share in enumerate(shares)} | {"goals": int((shares >= 0.1).sum())}

    # What the past paid is no longer true
    model.replay_buffer.reset()
    closed, richer = copy.deepcopy(model), copy.deepcopy(model)
    pays_of(closed)[shares.argmax()] = 0
    row["steps until back"] = steps_until(closed, lambda returned, _: returned > reward - 1)
    late = int(shares.argmin())
    pays_of(richer)[late] *= 3
    row["steps until found"] = steps_until(richer, lambda _, shares: shares[late] > 0.5)
    return row, paths


def pays_of(model: Any) -> np.ndarray:
    return model.get_env().envs[0].unwrapped.pays


def steps_until(model: Any, reached: Callable[[float, np.ndarray], bool]) -> float:
    """Steps of further training, looked at every 100, until single samples have reached something; infinite if they do not."""
    for done in range(0, FURTHER_STEPS + 1, 100):
        if done:
            model.learn(100, reset_num_timesteps=False)
        returned, shares, _ = evaluate(model, pays_of(model))
        if reached(returned, shares):
            return done
    return np.inf


def draw(rows: pd.DataFrame, paths: dict[str, np.ndarray], output: Path) -> None:
    """Paths of each algorithm's first run; then the returns and the goals in use of all runs."""
    figure, axes = plt.subplots(1, len(paths) + 2, figsize=(2.9 * (len(paths) + 2), 3.6), layout="constrained")
    for axis, (name, lines) in zip(axes, paths.items(), strict=False):
        for goal in GOALS:
            axis.add_patch(plt.Circle(goal, RADIUS, color="tab:green", alpha=0.4))
        axis.plot(*lines.transpose(2, 0, 1), color="tab:blue", alpha=0.15, linewidth=0.8)
        axis.set(title=name, xlim=(-7, 7), ylim=(-7, 7), aspect="equal")
    for axis, column in zip(axes[-2:], ("reward", "goals"), strict=True):
        labels = []
        for place, (key, runs) in enumerate(rows.groupby(["algorithm", "entropy", "steps"], dropna=False, sort=False)):
            name, entropy, steps = key
            labels.append(f"{name}, {steps}" + ("" if np.isnan(entropy) else f", {entropy:+g}"))
            axis.plot(place + np.linspace(-0.2, 0.2, len(runs)), runs[column], "o", alpha=0.6)
        axis.set_xticks(range(len(labels)), labels, fontsize="x-small", rotation=90)
        axis.set_xlabel("algorithm, steps, target entropy", fontsize="x-small")
    axes[-2].set(title="return of single samples")
    axes[-1].set(title="goals in use", ylim=(-0.3, 4.3))
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument(
        "--steps", type=int, default=8000, help="environment steps that are learned from (default %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run per seed (default 0)")
    parser.add_argument("--entropies", type=float, nargs="+", default=[0.5], help="target entropies in nats (default 0.5)")
    parser.add_argument("--output", type=Path, default=Path("multigoal"), help="of picture and table, without suffix")
    options = parser.parse_args(arguments)

    files = {suffix: options.output.with_suffix(suffix) for suffix in (".csv", ".npz", ".png")}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(files[".csv"]).to_dict("records") if files[".csv"].exists() else []
    paths = dict(np.load(files[".npz"])) if files[".npz"].exists() else {}
    for seed in options.seeds:
        for algorithm in options.algorithms:
            for entropy in options.entropies if algorithm in WITH_ENTROPY else [NONE]:
                # As text, because NaN equals nothing
                key = (algorithm, seed, str(entropy), options.steps)
                if key in {(row["algorithm"], row["seed"], str(row["entropy"]), row["steps"]) for row in rows}:
                    continue
                row, lines = run(algorithm, seed, entropy, options.steps)
                rows.append(row)
                paths.setdefault(algorithm, lines)
                print({name: round(what, 2) if isinstance(what, float) else what for name, what in row.items()}, flush=True)
                pd.DataFrame(rows).to_csv(files[".csv"], index=False)
                np.savez(files[".npz"], **paths)
    table = pd.read_csv(files[".csv"])
    draw(table, paths, files[".png"])
    runs = table.drop(columns="seed").groupby(["algorithm", "entropy", "steps"], dropna=False, sort=False)
    print(runs.median().join(runs.size().rename("runs")).round(2).to_string())
    return table


if __name__ == "__main__":
    main()
