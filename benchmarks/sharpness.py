"""
What each difference from the paper is worth on the gates (examples/gates.py): all of them, all but one, one, and none.

A row per variant and seed is appended to a table: success and routes of single samples as trained, in two and in twenty steps,
and of the best of ten; the temperature; what the entropy is said to be and what it is by a histogram; by how much the
divergence network's log-probabilities are off, as trained and in twenty steps; how unequal a state's three modes are. Rows
that are there already are not run again.

    python benchmarks/sharpness.py --variants defaults paper --seeds 0 1 2 --output sharpness.csv
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch as th

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import gates

from sb3_mfpo import MFPO

# With the layers of the gates
PAPER: dict[str, Any] = {**MFPO.PAPER, "policy_kwargs": {**MFPO.PAPER["policy_kwargs"], "net_arch": [64, 64]}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("MFPO", {}),
    "paper": ("MFPO", PAPER),
    "features alone": ("MFPO", {**PAPER, "policy_kwargs": dict(sampling_power=1.0)}),
    "intervals alone": ("MFPO", {**PAPER, "intervals": "grid", "policy_kwargs": dict(action_fourier_dim=0)}),
    "times alone": ("MFPO", {**PAPER, "uniform_time_share": 0.5, "equal_time_share": 0.5}),
    "three remedies": (
        "MFPO",
        dict(n_policy_samples=16, n_gaussian_samples=32, n_local_samples=0, ent_coef_rate=None, actor_tau=1.0),
    ),
    "no features": ("MFPO", dict(policy_kwargs=dict(action_fourier_dim=0))),
    "any intervals": ("MFPO", dict(intervals="any")),
    "no uniform times": ("MFPO", dict(uniform_time_share=0.0)),
    "even grid": ("MFPO", dict(policy_kwargs=dict(sampling_power=1.0))),
    "paper's proposals": ("MFPO", dict(n_policy_samples=16, n_gaussian_samples=32, n_local_samples=0)),
    "no local proposals": ("MFPO", dict(n_gaussian_samples=48, n_local_samples=0)),
    "12 proposals": ("MFPO", dict(n_gaussian_samples=6, n_local_samples=6)),
    "12 proposals, policy_delay 4": (
        "MFPO",
        dict(n_gaussian_samples=6, n_local_samples=6, policy_delay=4, ent_coef_rate=6.0, actor_tau=0.02),
    ),
    "temperature by Adam": ("MFPO", dict(ent_coef_rate=None)),
    "no average": ("MFPO", dict(actor_tau=1.0)),
    "SOM": ("SOM", {}),
    "SOM, no average": ("SOM", dict(actor_tau=1.0)),
    "SOM, two steps": ("SOM", dict(policy_kwargs=dict(sampling_steps=2))),
    "SOM, no features": ("SOM", dict(policy_kwargs=dict(action_fourier_dim=0))),
    "SOM, grid": ("SOM", dict(intervals="grid", uniform_time_share=0.5)),
    "SAC": ("SAC", {}),
}
BIN = 0.01
# In front of the first wall, and behind the centres of the first two walls' openings
STATES = [[0.0, 0.0], *([wall / gates.N_WALLS, opening] for wall in (1, 2) for opening in gates.OPENINGS)]


@th.no_grad()
def samples_at(model: Any, observation: list[float], n: int = 50_000) -> th.Tensor:
    """Actions before they are clipped, shape (n,)."""
    actor = model.actor_target
    features = actor.encode(model.policy.obs_to_tensor(np.array([observation], np.float32))[0])
    return actor.flow(features.unsqueeze(1), th.randn(1, n, 1)).flatten()


def histogram(actions: th.Tensor) -> np.ndarray:
    """Density in bins of [-4, 4]."""
    counts, _ = np.histogram(actions.numpy(), bins=np.arange(-4, 4 + BIN / 2, BIN))
    return counts / counts.sum() / BIN


def examine(model: Any) -> dict[str, float]:
    """Means over ``STATES``."""
    entropies, ratios = [], []
    for state in STATES:
        actions = samples_at(model, state)
        density = histogram(actions)
        filled = density[density > 0]
        entropies.append(-(filled * np.log(filled)).sum() * BIN)
        counts = np.bincount(gates.nearest_opening(actions.numpy())[0], minlength=len(gates.OPENINGS))
        ratios.append(counts.max() / max(counts.min(), 1))
    return dict(histogram_entropy=np.mean(entropies), mode_ratio=np.median(ratios), worst_mode_ratio=np.max(ratios))


def log_prob_error(model: MFPO) -> float:
    """Mean distance in nats between log-probabilities and histogram, over samples within the bounds and ``STATES``."""
    errors = []
    for state in STATES:
        density = histogram(samples_at(model, state))
        observations = th.tensor(state, dtype=th.float32).expand(2000, -1)
        scaled, log_prob = (value.detach().numpy() for value in model.policy.action_log_prob(observations))
        within = np.abs(scaled[:, 0]) < 1
        bins = ((scaled[within, 0] + 4) / BIN).astype(int)
        errors.append(np.abs(log_prob[within] - np.log(np.maximum(density[bins], 1e-3))).mean())
    return float(np.mean(errors))


def run(variant: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and evaluate one variant."""
    algorithm, settings = VARIANTS[variant]
    start = time.process_time()
    model = gates.train(algorithm, steps, seed, **settings)
    row: dict[str, Any] = dict(variant=variant, seed=seed, steps=steps, seconds=time.process_time() - start)
    th.manual_seed(0)
    row |= dict(zip(("success", "routes", "effective"), gates.evaluate(model)[:3], strict=True))
    row["success_best_of_ten"] = gates.evaluate(model, deterministic=True).success
    for name in ("ent_coef", "entropy"):
        row[name] = model.logger.name_to_value.get(f"train/{name}")
    if algorithm != "SAC":
        row |= examine(model)
        if isinstance(model, MFPO):
            row["log_prob_error"] = log_prob_error(model)
        for n_steps in (2, 20):
            model.policy.sampling_steps = n_steps
            row[f"success_{n_steps}_steps"] = gates.evaluate(model).success
        if isinstance(model, MFPO):
            row["log_prob_error_20_steps"] = log_prob_error(model)
    return row


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=4000, help="environment steps of a run (default 4000)")
    parser.add_argument("--output", type=Path, default=Path("sharpness.csv"), help="the table (default sharpness.csv)")
    options = parser.parse_args(arguments)

    rows = pd.read_csv(options.output).to_dict("records") if options.output.exists() else []
    done = {(row["variant"], row["seed"], row["steps"]) for row in rows}
    for seed in options.seeds:
        for variant in options.variants:
            if (variant, seed, options.steps) not in done:
                rows.append(run(variant, seed, options.steps))
                pd.DataFrame(rows).round(4).to_csv(options.output, index=False)
    table = pd.DataFrame(rows)
    print(table.groupby("variant", sort=False).median(numeric_only=True).round(3).to_string())
    return table


if __name__ == "__main__":
    main()
