"""Makes this package's algorithms and tasks known to the installed rl_zoo3."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import gymnasium as gym
from rl_zoo3 import hyperparams_opt, utils
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.common.off_policy import FlowAlgorithm
from sb3_mfpo.envs import ready_spec
from sb3_mfpo.runs.checkpoint import is_run
from sb3_mfpo.zoo import search_space

ALGORITHMS: dict[str, type[FlowAlgorithm]] = {"mfpo": MFPO, "som": SOM}


def hyperparameter_file(algorithm: str) -> Path:
    """
    :param algorithm: Name of one of our algorithms, such as "mfpo"
    :return: The YAML file with its hyperparameters by task
    """
    return Path(__file__).parent / "hyperparams" / f"{algorithm}.yml"


def register(playing: bool = False) -> None:
    """
    Add our algorithms to rl_zoo3's registry, samplers and converters, and make the DeepMind Control tasks that are registered
    ready for its policies.

    ``train -i`` with a checkpoint of a run goes on with that run.

    :param playing: Whether models will be loaded only to act: they then get a replay buffer of a single transition. rl_zoo3
        does so for the off-policy algorithms in lists within its functions, which cannot be extended.
    """
    for name, algorithm in ALGORITHMS.items():
        utils.ALGOS[name] = _without_memory(algorithm) if playing else _resuming(algorithm)
        hyperparams_opt.HYPERPARAMS_SAMPLER[name] = getattr(search_space, f"sample_{name}_params")
        hyperparams_opt.HYPERPARAMS_CONVERTER[name] = getattr(search_space, f"convert_{name}_params")
    _mend_push_to_hub()
    for env_id, spec in gym.registry.items():
        if env_id.startswith("dm_control/"):
            gym.registry[env_id] = ready_spec(spec)


def _mend_push_to_hub() -> None:
    # rl_zoo3 2.9.2 imports a function that its dependency sb3-team-hf-integration 3.2 has renamed and made return an object
    # The package also exports a function of the module's name
    push_to_hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(push_to_hub, "generate_metadata"):
        push_to_hub.generate_metadata = lambda *args: push_to_hub._generate_metadata(*args).to_dict()


def _resuming(algorithm: type[FlowAlgorithm]) -> type[FlowAlgorithm]:
    class Resuming(algorithm):  # type: ignore[misc,valid-type]
        @classmethod
        def load(cls, path: Any, env: Any = None, device: Any = "auto", **kwargs: Any) -> BaseAlgorithm:
            # A run goes on with its own hyperparameters, not those of the file
            return algorithm.resume(path, env, device) if is_run(path) else algorithm.load(path, env, device, **kwargs)

    Resuming.__name__ = algorithm.__name__
    return Resuming


def _without_memory(algorithm: type[FlowAlgorithm]) -> type[FlowAlgorithm]:
    class WithoutMemory(algorithm):  # type: ignore[misc,valid-type]
        @classmethod
        def load(cls, *args: Any, **kwargs: Any) -> BaseAlgorithm:
            return algorithm.load(*args, **{"buffer_size": 1, "optimize_memory_usage": False, **kwargs})

    WithoutMemory.__name__ = algorithm.__name__
    return WithoutMemory
