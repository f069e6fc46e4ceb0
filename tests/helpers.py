"""Small environments and models that several test files use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm

Algorithm = type[MeanFlowAlgorithm]
ALGORITHMS: list[Algorithm] = [MFPO, SOM]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

# Small networks and few samples: the shapes of everything stay different from each other.
SMALL_POLICY: dict[str, Any] = dict(
    net_arch=[16, 12],
    time_fourier_dim=8,
    time_embedding_dim=6,
    action_fourier_dim=10,
    n_atoms=11,
    # Values that differ from the start, in a range that holds them
    value_init="uniform",
    value_range=1000.0,
)
COMMON: dict[str, Any] = dict(learning_starts=10, buffer_size=500, batch_size=8, policy_delay=1, device="cpu")
SMALL: dict[Algorithm, dict[str, Any]] = {
    MFPO: dict(COMMON, n_policy_samples=3, n_gaussian_samples=4, n_local_samples=2),
    SOM: dict(COMMON, n_samples=5),
}


class RandomEnv(gym.Env):
    """Observations drawn from the space, reward from the action, episodes of a fixed length. It offers its state."""

    def __init__(
        self,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Box | None = None,
        episode_length: int = 7,
        terminates: bool = False,
    ):
        self.observation_space = observation_space or spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = action_space or spaces.Box(-1, 1, (2,), np.float32)
        self.episode_length = episode_length
        self.terminates = terminates
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.steps += 1
        ended = self.steps == self.episode_length
        reward = float(-np.square(action / np.maximum(-self.action_space.low, self.action_space.high)).mean())
        return self.observation_space.sample(), reward, ended and self.terminates, ended and not self.terminates, {}

    def state_dict(self) -> dict[str, Any]:
        # The generators of the spaces are saved with any environment
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def make_model(algorithm: Algorithm, env: Any = None, **kwargs: Any) -> Any:
    """A small model on a small environment; ``policy_kwargs`` are added to the small ones."""
    policy_kwargs = {**SMALL_POLICY, **kwargs.pop("policy_kwargs", {})}
    return algorithm(
        kwargs.pop("policy", "MlpPolicy"),
        RandomEnv() if env is None else env,
        **{**SMALL[algorithm], **kwargs},
        policy_kwargs=policy_kwargs,
    )


def assert_equal(first: Any, second: Any) -> None:
    """Nested dictionaries and lists of tensors and arrays, bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, th.Tensor):
        assert th.equal(first, second)
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second)
    else:
        assert first == second


# Of the benchmarks
TINY_SUITE: dict[str, Any] = {
    "steps": 200,
    "evaluations": 2,
    "episodes": 1,
    "seeds": [0],
    "params": {"learning_starts": 50, "batch_size": 16, "policy_kwargs": {"net_arch": [8]}},
    "tasks": {"Pendulum-v1": {"score": [-1230, -150]}},
    "algorithms": {"MFPO": {"algo": "mfpo"}},
}


def write_suite(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump(TINY_SUITE | changes))
    return path
