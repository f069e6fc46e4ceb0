"""
Policies with many modes: MFPO and SOM side by side (the toy of MFPO's paper, its App. E.1, and two moons).

The critic is known: Q(a) is the log-density of six Gaussians on a circle, or of two moons. At temperature 1 the best policy is
that density. The actors learn it, and MFPO's divergence network learns its log-probabilities. The picture shows the samples of
one, two and more steps, with their distance from the truth. The learning rate decays over the last 60 % of training: with a
constant one the last iterate wanders.

    python examples/multimodal.py --updates 5000 --output multimodal.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mfpo import MFPO, SOM

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Mixture(NamedTuple):
    """Gaussians of one width and equal weights: means (n, 2), standard deviation, the mode that each belongs to (n,)."""

    means: th.Tensor
    std: float
    mode: th.Tensor

    def log_density(self, actions: th.Tensor) -> th.Tensor:
        """In nats: actions (..., 2) to (...)."""
        squared = ((actions.unsqueeze(-2) - self.means) / self.std).square().sum(-1)
        return th.logsumexp(-0.5 * squared, dim=-1) - math.log(len(self.means) * 2 * math.pi * self.std**2)

    def sample(self, n: int, generator: th.Generator) -> th.Tensor:
        """Shape (n, 2)."""
        chosen = self.means[th.randint(len(self.means), (n,), generator=generator)]
        return chosen + self.std * th.randn(n, 2, generator=generator)


def six_modes() -> Mixture:
    angles = th.arange(6) * math.pi / 3
    return Mixture(0.7 * th.stack([angles.cos(), angles.sin()], dim=1), 0.1, th.arange(6))


def two_moons() -> Mixture:
    """Two half circles that reach into each other, each a row of 20 Gaussians."""
    angles = th.linspace(0, math.pi, 20)
    upper = th.stack([angles.cos() - 0.5, angles.sin() - 0.25], dim=1)
    return Mixture(0.55 * th.cat([upper, -upper]), 0.08, th.arange(2).repeat_interleave(20))


TARGETS = {"six modes": six_modes(), "two moons": two_moons()}
# This is about the flow: the papers' networks, an update of the policy at every step, and four times the default's proposals
FLOW: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[256, 256, 256]), policy_delay=1, actor_rate=1.0, actor_tau=0.01)
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MFPO": (MFPO, dict(FLOW, ent_coef=1.0, n_gaussian_samples=36, n_local_samples=12)),
    "SOM": (SOM, dict(FLOW, inverse_temperature=1.0, normalize_q=False)),
}


# Numbers of steps that are shown
STEPS = {"MFPO": (1, 2, 20), "SOM": (1, 2)}


class OneStep(gym.Env):
    """Every episode is one action, rewarded by the log-density."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, target: Mixture):
        self.target = target

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(1, np.float32), self.target.log_density(th.as_tensor(action)).item(), True, False, {}


def train(
    algorithm: str,
    target: Mixture,
    updates: int,
    seed: int,
    learning_rate: float = 3e-4,
    progress: bool = False,
    **kwargs: Any,
) -> Any:
    """Train for a number of gradient steps, one per step of the environment, against the known critic."""

    def decaying(progress_remaining: float) -> float:
        # Constant for 40 % of training, then half a cosine down to zero
        return learning_rate * 0.5 * (1 - math.cos(math.pi * min(progress_remaining / 0.6, 1)))

    kind, settings = ALGORITHMS[algorithm]
    model = kind(
        "MlpPolicy",
        OneStep(target),
        learning_rate=decaying,
        learning_starts=1,
        buffer_size=1000,
        seed=seed,
        **{**settings, **kwargs},
    )
    for critic in (model.critic, model.critic_target):
        # In place of the critic's networks: (..., 2) to (1, ...)
        critic.q_values = lambda features, actions: target.log_density(actions).unsqueeze(0)
    # The critic is known: nothing for it to learn
    model._td_loss = lambda *args, **kwargs: (th.zeros((), requires_grad=True), {})
    return model.learn(updates + 1, progress_bar=progress)


@th.no_grad()
def sample_policy(model: Any, n: int, steps: int) -> tuple[th.Tensor, th.Tensor | None]:
    """Actions of the policy in a number of steps, and their log-probabilities by MFPO's divergence network."""
    model.policy.set_training_mode(False)
    model.policy.sampling_steps = steps
    observations = th.zeros(n, 1, device=model.device)
    if isinstance(model, MFPO):
        actions, log_prob = model.policy.action_log_prob(observations)
        return actions.cpu(), log_prob.cpu()
    return model.policy.act(observations, th.randn(n, 2, device=model.device)).cpu(), None


@th.no_grad()
def solve_ode(model: MFPO, n: int, steps: int) -> tuple[th.Tensor, th.Tensor]:
    """Actions by a fine Euler solve of the instantaneous velocity, and their log-probabilities by its exact divergence."""
    noise = th.randn(n, 2, device=model.device)
    actions, log_prob = model.policy.solve(th.zeros(1, 1, device=model.device), noise, steps)
    return actions.cpu(), log_prob.cpu()


def evaluate(target: Mixture, actions: th.Tensor, log_prob: th.Tensor | None, seed: int = 0) -> dict[str, float]:
    """
    Compare samples with the density.

    modes: modes that hold at least a quarter of their share of the samples within 3 standard deviations;
    sliced_wasserstein: mean over 128 random directions of the one-dimensional Wasserstein-1 distance;
    strays: share of samples farther than 3 standard deviations from every Gaussian;
    log_prob_error: mean absolute difference between the given log-probability and the log-density, in nats.
    """
    generator = th.Generator().manual_seed(seed)
    distance, nearest = th.cdist(actions, target.means).min(dim=1)
    near = distance <= 3 * target.std
    n_modes = int(target.mode.max()) + 1
    share = th.bincount(target.mode[nearest[near]], minlength=n_modes) / len(actions)
    directions = th.nn.functional.normalize(th.randn(2, 128, generator=generator), dim=0)
    truth = target.sample(len(actions), generator)
    difference = (actions @ directions).sort(dim=0).values - (truth @ directions).sort(dim=0).values
    results = {
        "modes": int((share >= 0.25 / n_modes).sum()),
        "sliced_wasserstein": difference.abs().mean().item(),
        "strays": 1 - near.float().mean().item(),
    }
    if log_prob is not None:
        error = (log_prob - target.log_density(actions)).abs()
        results |= {"log_prob_error": error.mean().item(), "log_prob_error_median": error.median().item()}
    return results


Panel = tuple[th.Tensor, th.Tensor | None, dict[str, float]]


def draw(rows: dict[str, dict[str, Panel]], path: Path) -> None:
    """A row per density: itself, then a panel of samples per sampler, coloured by log-probability where it is known."""
    line = th.linspace(-1.05, 1.05, 200)
    grid = th.stack(th.meshgrid(line, line, indexing="xy"), dim=-1)
    n_columns = max(len(panels) for panels in rows.values())
    figure, axes = plt.subplots(
        len(rows), n_columns, figsize=(3.1 * n_columns + 0.8, 3.7 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, (name, panels) in zip(axes, rows.items(), strict=True):
        for axis, (title, (actions, log_prob, numbers)) in zip(row, panels.items(), strict=True):
            colours: dict[str, Any] = dict(vmin=-6, vmax=1, cmap="viridis", rasterized=True)
            if title == "truth":
                density = axis.pcolormesh(line, line, TARGETS[name].log_density(grid), **colours)
            elif log_prob is None:
                axis.scatter(*actions[:3000].T, color="0.35", s=3, rasterized=True)
            else:
                axis.scatter(*actions[:3000].T, c=log_prob[:3000], s=3, **colours)
            text = f"{numbers['modes']} modes, SW {numbers['sliced_wasserstein']:.3f}, strays {numbers['strays']:.0%}"
            if "log_prob_error" in numbers:
                text += f"\nlog-prob. error {numbers['log_prob_error']:.2f} nats"
            axis.set(title=title, xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", xlabel=text)
            axis.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        row[0].set_ylabel(name)
    figure.colorbar(density, ax=axes, label="log-probability [nats]", shrink=0.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--updates", type=int, default=5000, help="gradient steps (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10_000, help="samples per panel (default 10000)")
    parser.add_argument("--output", type=Path, default=Path("multimodal.png"), help="the picture (default multimodal.png)")
    options = parser.parse_args(arguments)

    rows: dict[str, dict[str, Panel]] = {}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, target in TARGETS.items():
        truth = target.sample(options.samples, th.Generator().manual_seed(options.seed + 1))
        samples: dict[str, tuple[th.Tensor, th.Tensor | None]] = {"truth": (truth, target.log_density(truth))}
        for algorithm in options.algorithms:
            model = train(algorithm, target, options.updates, options.seed, progress=True)
            for steps in STEPS[algorithm]:
                title = f"{algorithm}, {steps} step{'s' * (steps > 1)}"
                samples[title] = sample_policy(model, options.samples, steps)
            if algorithm == "MFPO":
                exact = solve_ode(model, options.samples, steps=200)
        rows[name] = {title: (*sample, evaluate(target, *sample)) for title, sample in samples.items()}
        results[name] = {title: numbers for title, (*_, numbers) in rows[name].items()}
        if "MFPO" in options.algorithms:
            results[name]["MFPO, 200 Euler steps, exact density"] = evaluate(target, *exact)
        for title, numbers in results[name].items():
            print(f"{name}, {title}: " + ", ".join(f"{key} {value:.3g}" for key, value in numbers.items()))
    draw(rows, options.output)
    print(f"Picture: {options.output}")
    return results


if __name__ == "__main__":
    main()
