"""rl_zoo3's experiment, changed where our algorithms need it."""

from __future__ import annotations

import copy
import operator
import sys
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator
from rl_zoo3 import exp_manager, utils
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_mfpo import MFPO, SOM, RunCheckpointCallback
from sb3_mfpo.envs import NoRendererError, choose_renderer, renders_offscreen
from sb3_mfpo.runs.algorithm import ResumableAlgorithm
from sb3_mfpo.runs.checkpoint import is_run
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm

ALGORITHMS: dict[str, type[MeanFlowAlgorithm]] = {"mfpo": MFPO, "som": SOM}
Original = exp_manager.ExperimentManager
original_create_test_env = utils.create_test_env


class Hyperparameters(dict):
    """Hyperparameters of a file. ``update`` with those of a trial merges them by ``merged``."""

    def copy(self) -> Hyperparameters:
        return Hyperparameters(self)

    def update(self, sampled: dict[str, Any]) -> None:  # type: ignore[override]
        super().update(merged(self, sampled))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """
    :param below: Hyperparameters in rl_zoo3's format
    :param above: Others, which override them
    :return: All of them. Keyword arguments such as ``policy_kwargs`` that both have are merged into one dictionary.
    """
    result = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) or isinstance(above[name], dict):
            first, second = _evaluated(below[name]), _evaluated(above[name])
            if isinstance(first, dict) and isinstance(second, dict):
                result[name] = {**first, **second}
    return result


def without_checkpoints(callbacks: Any) -> list[Any]:
    """
    :param callbacks: From a hyperparameter file: a name, a dictionary of a name and arguments, or a list of these
    :return: The same without ``RunCheckpointCallback``
    """
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    names = [next(iter(one)) if isinstance(one, dict) else one for one in listed]
    return [one for one, name in zip(listed, names, strict=True) if name.split(".")[-1] != RunCheckpointCallback.__name__]


def _evaluated(value: Any) -> Any:
    # As rl_zoo3 does, with the names that it knows
    return eval(value, vars(exp_manager)) if isinstance(value, str) else value


class Manager(Original):
    """
    rl_zoo3's experiment with these differences:

    - A trial of our algorithms sets only the keyword arguments that it has sampled; the others stay as in the file, in the
      search and with ``--trial-id``.
    - ``-i`` with a checkpoint of a run resumes that run. Trials write no checkpoints: they are never resumed, and each would
      be another run in the same folder.
    - Environments that render get a renderer that works. Those of evaluations get the ``env_kwargs`` of the file.
    """

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        results = super().setup_experiment()
        if self.algo in ALGORITHMS:
            self._hyperparams = Hyperparameters(self._hyperparams)
        if self.optimize_hyperparameters:
            self.specified_callbacks = without_checkpoints(self.specified_callbacks)
        return results

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # rl_zoo3 would ignore the first trial, whose number is 0
        if self.trial_id is not None and self.storage and self.study_name:
            base = copy.copy(self)
            base.trial_id = None
            with redirect_stdout(StringIO()):
                hyperparams, _ = base.read_hyperparameters()
            print(f"With hyperparameters of trial {self.trial_id} of the study {self.study_name}")
            sampled = self.load_trial(self.storage, self.study_name, self.trial_id)
            merge = merged if self.algo in ALGORITHMS else operator.or_
            # The command line overrides the trial
            self.custom_hyperparams = merge(merge(hyperparams, sampled), self.custom_hyperparams or {})
            self.trial_id = None
        return super().read_hyperparameters()

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        if self._eval_env_kwargs_args is None:
            # rl_zoo3 ignores those of the file
            self.eval_env_kwargs = self.env_kwargs
        choose_renderer_for(self.env_name.gym_id, self.eval_env_kwargs if eval_env else self.env_kwargs)
        return super().create_envs(n_envs, eval_env, no_log)

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        algorithm = exp_manager.ALGOS[self.algo]
        if not issubclass(algorithm, ResumableAlgorithm) or not is_run(self.trained_agent):
            return super()._load_pretrained_agent(hyperparams, env)
        not_applied = sorted((self.custom_hyperparams or {}).keys() & hyperparams.keys())
        print("Loading pretrained agent")
        print(
            f"Going on with the run in {self.trained_agent}, with its own hyperparameters and random state"
            + (f"; not applied: -params {', '.join(not_applied)}" if not_applied else "")
        )
        return algorithm.resume(
            self.trained_agent, env, self.device, tensorboard_log=self.tensorboard_log, verbose=self.verbose
        )


def create_test_env(env_id: str, *args: Any, **kwargs: Any) -> VecEnv:
    """
    rl_zoo3's function of this name, with a renderer that works and the hyperparameters' ``env_kwargs``, which rl_zoo3 ignores
    in videos.

    :param env_id: Gymnasium id
    :param args: rl_zoo3's
    :param kwargs: rl_zoo3's
    :return: The environment
    """
    in_file = (kwargs.get("hyperparams") or {}).get("env_kwargs") or {}
    kwargs["env_kwargs"] = {**in_file, **(kwargs.get("env_kwargs") or {})}
    choose_renderer_for(env_id, kwargs["env_kwargs"])
    return original_create_test_env(env_id, *args, **kwargs)


def choose_renderer_for(env_id: str, env_kwargs: dict[str, Any]) -> None:
    """
    :param env_id: Gymnasium id
    :param env_kwargs: The environment's keyword arguments
    :raises NoRendererError: If MuJoCo is asked for images and nothing renders
    """
    if not renders_offscreen(env_kwargs.get("render_mode")):
        return
    entry_point = gym.spec(env_id).entry_point
    if isinstance(entry_point, str):
        load_env_creator(entry_point)
    try:
        choose_renderer()
    except NoRendererError:
        # Other environments, such as classic control, do not need one
        if "mujoco" in sys.modules:
            raise
