"""Adds this package's algorithms and tasks to the installed rl_zoo3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import rl_zoo3
from rl_zoo3 import exp_manager, hyperparams_opt, utils
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mfpo.envs import is_of_shimmy, ready_spec
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm
from sb3_mfpo.zoo import manager, search_space
from sb3_mfpo.zoo.hub import prepare_hub
from sb3_mfpo.zoo.manager import ALGORITHMS


def hyperparameter_file(algorithm: str) -> Path:
    """
    :param algorithm: Name of one of our algorithms, such as "mfpo"
    :return: The YAML file with its hyperparameters by task
    """
    return Path(__file__).parent / "hyperparams" / f"{algorithm}.yml"


def register(playing: bool = False) -> None:
    """
    Add our algorithms to rl_zoo3's registry, samplers and converters, replace its experiment by that of
    :mod:`sb3_mfpo.zoo.manager`, prepare the registered DeepMind Control tasks for its policies, and its hub commands as
    :func:`sb3_mfpo.zoo.hub.prepare_hub` does.

    Call it before anything is imported from ``rl_zoo3.exp_manager``, ``rl_zoo3.train`` or its hub commands.

    :param playing: Whether models will be loaded only to act; they then get a replay buffer of a single transition. rl_zoo3
        does this for the algorithms in lists within its functions, which cannot be extended.
    """
    for name, algorithm in ALGORITHMS.items():
        utils.ALGOS[name] = _without_memory(algorithm) if playing else algorithm
        hyperparams_opt.HYPERPARAMS_SAMPLER[name] = getattr(search_space, f"sample_{name}_params")
        hyperparams_opt.HYPERPARAMS_CONVERTER[name] = getattr(search_space, f"convert_{name}_params")
    exp_manager.ExperimentManager = manager.Manager  # type: ignore[misc]
    rl_zoo3.create_test_env = utils.create_test_env = manager.create_test_env
    prepare_hub()
    ready_dm_control()


def ready_dm_control() -> None:
    """Prepare the registered DeepMind Control tasks of shimmy for rl_zoo3's policies."""
    for env_id, spec in gym.registry.items():
        if is_of_shimmy(spec):
            gym.registry[env_id] = ready_spec(spec)


def _without_memory(algorithm: type[MeanFlowAlgorithm]) -> type[MeanFlowAlgorithm]:
    class WithoutMemory(algorithm):  # type: ignore[misc,valid-type]
        @classmethod
        def load(cls, *args: Any, **kwargs: Any) -> BaseAlgorithm:
            return algorithm.load(*args, **{"buffer_size": 1, "optimize_memory_usage": False, **kwargs})

    WithoutMemory.__name__ = algorithm.__name__
    return WithoutMemory
