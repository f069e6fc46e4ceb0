"""
A policy with six modes (the paper's toy, its App. E.1).

The critic is known: Q(a) is the log-density of a mixture of six Gaussians on a circle. At temperature 1 the best policy is
that mixture. MFPO's actor and divergence network learn it; the picture shows whether two steps reach all modes and whether
the divergence network knows the density. The learning rate decays over the last 60 % of training: with a constant one the
last iterate wanders.

    python examples/multimodal.py --updates 5000 --output multimodal.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mfpo import MFPO

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ANGLES = th.arange(6) * math.pi / 3
MEANS = 0.7 * th.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
STD = 0.1


def log_density(actions: th.Tensor) -> th.Tensor:
    """Log-density of the mixture in nats: actions (..., 2) to (...)."""
    squared = ((actions.unsqueeze(-2) - MEANS) / STD).square().sum(-1)
    return th.logsumexp(-0.5 * squared, dim=-1) - math.log(6 * 2 * math.pi * STD**2)


def sample_mixture(n: int, generator: th.Generator) -> th.Tensor:
    """Samples of the mixture, shape (n, 2)."""
    return MEANS[th.randint(6, (n,), generator=generator)] + STD * th.randn(n, 2, generator=generator)


class OneStep(gym.Env):
    """Every episode is one action, rewarded by the log-density."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(1, np.float32), log_density(th.as_tensor(action)).item(), True, False, {}


class PolicyImprovement(MFPO):
    """MFPO against a known critic, which is left as it is."""

    def _update_critic(self, *args: Any) -> dict[str, th.Tensor]:
        return {}


def known_q_values(features: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """In place of the critic's networks: (..., 2) to (1, ...)."""
    return log_density(actions).unsqueeze(0)


def train(updates: int, seed: int, learning_rate: float = 3e-4, progress_bar: bool = False, **kwargs: Any) -> MFPO:
    """Train for a number of gradient steps, one per step of the environment."""

    def decaying(progress_remaining: float) -> float:
        # Constant for 40 % of training, then half a cosine down to zero
        return learning_rate * 0.5 * (1 - math.cos(math.pi * min(progress_remaining / 0.6, 1)))

    model = PolicyImprovement(
        "MlpPolicy",
        OneStep(),
        learning_rate=decaying,
        learning_starts=1,
        buffer_size=1000,
        ent_coef=1.0,
        seed=seed,
        **kwargs,
    )
    for critic in (model.critic, model.critic_target):
        critic.q_values = known_q_values  # type: ignore[method-assign]
    return model.learn(updates + 1, progress_bar=progress_bar)


@th.no_grad()
def sample_policy(model: MFPO, n: int, steps: int) -> tuple[th.Tensor, th.Tensor]:
    """Actions of the policy in a number of steps, and their log-probabilities by the divergence network."""
    model.policy.set_training_mode(False)
    model.policy.sampling_steps = steps
    observations = th.zeros(n, 1, device=model.device)
    actions, log_prob = model.policy.action_log_prob(observations)
    return actions.cpu(), log_prob.cpu()


@th.no_grad()
def solve_ode(model: MFPO, n: int, steps: int) -> tuple[th.Tensor, th.Tensor]:
    """Actions by a fine Euler solve of the instantaneous velocity, and their log-probabilities by its exact divergence."""
    noise = th.randn(n, 2, device=model.device)
    actions, log_prob = model.policy.solve(th.zeros(1, 1, device=model.device), noise, steps)
    return actions.cpu(), log_prob.cpu()


def evaluate(actions: th.Tensor, log_prob: th.Tensor, seed: int = 0) -> dict[str, float]:
    """
    Compare samples with the mixture.

    modes: modes that hold at least a quarter of their share of the samples within 3 standard deviations;
    sliced_wasserstein: mean over 128 random directions of the one-dimensional Wasserstein-1 distance;
    strays: share of samples farther than 3 standard deviations from every mode;
    log_prob_error: mean absolute difference between the given log-probability and the mixture's log-density, in nats.
    """
    generator = th.Generator().manual_seed(seed)
    distance, nearest = th.cdist(actions, MEANS).min(dim=1)
    near = distance <= 3 * STD
    share = th.bincount(nearest[near], minlength=6) / len(actions)
    directions = th.nn.functional.normalize(th.randn(2, 128, generator=generator), dim=0)
    truth = sample_mixture(len(actions), generator)
    difference = (actions @ directions).sort(dim=0).values - (truth @ directions).sort(dim=0).values
    error = (log_prob - log_density(actions)).abs()
    return {
        "modes": int((share >= 0.25 / 6).sum()),
        "sliced_wasserstein": difference.abs().mean().item(),
        "strays": 1 - near.float().mean().item(),
        "log_prob_error": error.mean().item(),
        "log_prob_error_median": error.median().item(),
    }


def draw(panels: dict[str, tuple[th.Tensor, th.Tensor]], path: Path) -> None:
    """One panel of samples, coloured by log-probability, per entry."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels) + 1, 4.3), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (title, (actions, log_prob)) in zip(axes, panels.items(), strict=True):
        points = axis.scatter(*actions[:3000].T, c=log_prob[:3000], s=4, vmin=-6, vmax=1, cmap="viridis", rasterized=True)
        axis.set(title=title, xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", xlabel="action 1")
    axes[0].set_ylabel("action 2")
    figure.colorbar(points, ax=axes, label="log-probability [nats]", shrink=0.85)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=5000, help="gradient steps (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10_000, help="samples per panel (default 10000)")
    parser.add_argument("--output", type=Path, default=Path("multimodal.png"), help="the picture (default multimodal.png)")
    options = parser.parse_args(arguments)

    model = train(options.updates, options.seed, progress_bar=True)
    truth = sample_mixture(options.samples, th.Generator().manual_seed(options.seed + 1))
    panels = {
        "true samples, true density": (truth, log_density(truth)),
        "MFPO, 2 steps, density by the ADN": sample_policy(model, options.samples, steps=2),
        "MFPO, 20 steps, density by the ADN": sample_policy(model, options.samples, steps=20),
        "same field, 200 Euler steps, exact density": solve_ode(model, options.samples, steps=200),
    }
    draw(panels, options.output)
    results = {title: evaluate(actions, log_prob) for title, (actions, log_prob) in panels.items()}
    for title, numbers in results.items():
        print(f"{title}: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()))
    print(f"Picture: {options.output}")
    return results


if __name__ == "__main__":
    main()
