"""
Three walls with three openings each: can a policy be random between good actions and precise within each of them?

An episode is three steps, one through each wall. The action, one number, must hit one of three openings; a miss ends the
episode. All 27 routes are equally good, and a policy with an entropy to keep should take them all. A Gaussian cannot: it is
precise on one route, or a blur over all of them. The picture shows where single samples of each policy go, and the share of
episodes that pass all walls against the number of routes, for several target entropies.

    python examples/gates.py --output gates.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import matplotlib
import numpy as np
from gymnasium import spaces
from stable_baselines3 import SAC

from sb3_mfpo import MFPO, SOM

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N_WALLS = 3
OPENINGS = np.array([-0.6, 0.0, 0.6], dtype=np.float32)
HALF_WIDTH = 0.1

SHARED: dict[str, Any] = dict(learning_rate=1e-3, learning_starts=500, batch_size=256, buffer_size=20_000, tau=0.005)
# Rewards are at most 1 a step: the range of the values is known, and their distributions start near 0
NETWORKS: dict[str, Any] = dict(net_arch=[64, 64], v_min=-5, v_max=5, value_init="narrow")
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    # Precision is what is asked for: four times the default's proposals and eight times its updates of the policy, which are
    # shorter
    "MFPO": (
        MFPO,
        dict(
            ent_coef="auto_0.1",
            target_entropy=-1.0,
            n_gaussian_samples=36,
            n_local_samples=12,
            policy_delay=1,
            ent_coef_rate=3.0,
            actor_rate=1.0,
            actor_tau=0.01,
            critic_reduction="min",
            policy_kwargs=NETWORKS,
        ),
    ),
    "SOM": (SOM, dict(policy_delay=1, actor_tau=0.01, policy_kwargs=NETWORKS)),
    "SAC": (SAC, dict(ent_coef="auto_0.1", target_entropy=-1.0, policy_kwargs=dict(net_arch=[64, 64]))),
}


def nearest_opening(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the opening nearest to each position (n,), and the distance to its centre (n,)."""
    distances = np.abs(positions[:, None] - OPENINGS)
    return distances.argmin(axis=1), distances.min(axis=1)


class Gates(gym.Env):
    """Observed are the number of walls behind, as a share, and where the last one was passed."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.walls = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        _, (distance,) = nearest_opening(action)
        missed = distance > HALF_WIDTH
        self.walls += 1
        observation = np.array([self.walls / N_WALLS, action[0]], np.float32)
        return observation, float(not missed) - float(distance), bool(missed or self.walls == N_WALLS), False, {}


class Result(NamedTuple):
    """
    What single samples do.

    success: share of episodes that pass all walls; routes: how many different ones they take; effective: the number of equally
    frequent routes of the same entropy; paths: positions at the walls (n, 3), not a number once a wall was missed.
    """

    success: float
    routes: int
    effective: float
    paths: np.ndarray


def train(algorithm: str, steps: int, seed: int, **kwargs: Any) -> Any:
    """Train on the gates; further arguments are those of the algorithm."""
    kind, settings = ALGORITHMS[algorithm]
    policy_kwargs = {**settings["policy_kwargs"], **kwargs.pop("policy_kwargs", {})}
    settings = {**SHARED, **settings, **kwargs, "policy_kwargs": policy_kwargs}
    return kind("MlpPolicy", Gates(), seed=seed, **settings).learn(steps)


def evaluate(model: Any, n_episodes: int = 500, deterministic: bool = False) -> Result:
    """All episodes at once, with one sample of the policy per step, or with the action that it takes for the best."""
    positions = np.zeros(n_episodes, np.float32)
    routes, paths = np.zeros(n_episodes, int), np.full((n_episodes, N_WALLS), np.nan)
    flying = np.full(n_episodes, True)
    for wall in range(N_WALLS):
        observations = np.stack([np.full(n_episodes, wall / N_WALLS, np.float32), positions], axis=1)
        positions = model.predict(observations, deterministic=deterministic)[0][:, 0]
        opening, distance = nearest_opening(positions)
        paths[flying, wall] = positions[flying]
        flying &= distance <= HALF_WIDTH
        routes = len(OPENINGS) * routes + opening
    counts = np.unique(routes[flying], return_counts=True)[1]
    shares = counts / counts.sum()
    return Result(flying.mean(), len(counts), np.exp(-(shares * np.log(shares)).sum()) if len(counts) else 0.0, paths)


def draw_paths(axis: Any, title: str, result: Result, n_paths: int = 200) -> None:
    """Walls from left to right, and a line per episode that ends where it hits one."""
    rng = np.random.default_rng(0)
    edges = np.concatenate([[-1.1], np.stack([OPENINGS - HALF_WIDTH, OPENINGS + HALF_WIDTH], axis=1).ravel(), [1.1]])
    for wall in range(1, N_WALLS + 1):
        for low, high in edges.reshape(-1, 2):
            axis.plot([wall, wall], [low, high], color="0.2", linewidth=4, solid_capstyle="butt")
    for path in result.paths[rng.permutation(len(result.paths))[:n_paths]]:
        path = np.concatenate([[0.0], path[~np.isnan(path)]])
        passed = len(path) > N_WALLS and nearest_opening(path[-1:])[1][0] <= HALF_WIDTH
        axis.plot(np.arange(len(path)), path, color="tab:green" if passed else "tab:red", alpha=0.25, linewidth=0.8)
    text = f"{result.success:.0%} pass, {result.effective:.0f} routes"
    axis.set(title=f"{title}\n{text}", xlim=(0, N_WALLS + 0.1), ylim=(-1.1, 1.1), xlabel="wall", xticks=range(1, N_WALLS + 1))


def draw(runs: dict[str, dict[Any, list[Result]]], path: Path) -> None:
    """A panel of paths per algorithm, of its first run, and one of success against routes, a point per run."""
    figure, axes = plt.subplots(1, len(runs) + 1, figsize=(3.4 * (len(runs) + 1), 3.8), layout="constrained")
    markers = iter("osD^v")
    for axis, (name, by_entropy) in zip(axes, runs.items(), strict=False):
        draw_paths(axis, name, next(iter(by_entropy.values()))[0])
        marker = next(markers)
        for colour, (entropy, results) in enumerate(by_entropy.items()):
            points = dict(marker=marker, color=f"C{colour}", alpha=0.8)
            label = name if entropy is None else f"{name}, target entropy {entropy:g}"
            axes[-1].scatter([one.effective for one in results], [one.success for one in results], label=label, **points)
    axes[0].set_ylabel("position")
    axes[-1].axvline(27, color="0.7", linewidth=0.8)
    axes[-1].set(title="single samples", xlabel="effective number of routes (of 27)", ylabel="episodes that pass")
    axes[-1].set(xlim=(0, 28), ylim=(-0.03, 1.03))
    axes[-1].legend(fontsize=7, loc="center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict[Any, list[Result]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--steps", type=int, default=4000, help="environment steps of a run (default 4000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run per seed (default 0)")
    parser.add_argument("--entropies", type=float, nargs="+", default=[-1.0, 0.0, -2.0], help="target entropies in nats")
    parser.add_argument("--output", type=Path, default=Path("gates.png"), help="the picture (default gates.png)")
    options = parser.parse_args(arguments)

    runs: dict[str, dict[Any, list[Result]]] = {}
    for algorithm in options.algorithms:
        # SOM has no target entropy
        for entropy in [None] if algorithm == "SOM" else options.entropies:
            results = runs.setdefault(algorithm, {}).setdefault(entropy, [])
            for seed in options.seeds:
                kwargs = {} if entropy is None else dict(target_entropy=entropy)
                results.append(evaluate(train(algorithm, options.steps, seed, **kwargs)))
                success, routes, effective, _ = results[-1]
                name = algorithm if entropy is None else f"{algorithm}, target entropy {entropy:g}"
                print(f"{name}, seed {seed}: success {success:.2f}, routes {routes}, effective {effective:.1f}", flush=True)
    draw(runs, options.output)
    print(f"Picture: {options.output}")
    return runs


if __name__ == "__main__":
    main()
