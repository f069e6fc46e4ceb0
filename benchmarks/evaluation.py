"""How runs of a suite are evaluated: a callback that rl_zoo3 is given by name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

from sb3_mfpo.runs.files import replacing

# "deterministic": the best of ten candidates (MFPO, SOM), the mean (SAC, TQC, CrossQ), the policy's only action (TD3).
# "sample": as in training, without the noise that TD3 adds.
MODES = {"deterministic": True, "sample": False}


class Evaluation(BaseCallback):
    """
    Every so many steps evaluate both ways of acting, on a clock that stands still meanwhile, and write all rows so far to a
    CSV file. The training's random numbers are those of a training without evaluations.

    :param task: Gymnasium id
    :param every: Evaluate every so many environment steps
    :param episodes: Episodes of an evaluation, for each way of acting
    :param seed: Of the evaluation's environment
    :param path: The CSV file: step, seconds of training so far (of the processor; where a device computes, by the wall clock),
        mode, mean return
    """

    def __init__(self, task: str, every: int, episodes: int, seed: int, path: str):
        super().__init__()
        self.task, self.every, self.episodes, self.seed, self.path = task, every, episodes, seed, path
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.evaluations = 0

    def _init_callback(self) -> None:
        self._env = make_vec_env(self.task, seed=1000 + self.seed)
        normalizer = self.model.get_vec_normalize_env()
        if normalizer is not None:
            self._env = VecNormalize(self._env, training=False, norm_obs=normalizer.norm_obs, norm_reward=False)

    def _on_training_start(self) -> None:
        # Other processes take their share of a processor, hardly of a device
        self._clock = time.process_time if self.model.device.type == "cpu" else time.perf_counter
        self._start = self._clock()

    def _on_step(self) -> bool:
        # At every step, because a checkpoint may be written at any
        now = self._clock()
        self.seconds += now - self._start
        self._start = now
        if self.num_timesteps // self.every > self.evaluations:
            self.evaluations = self.num_timesteps // self.every
            self._evaluate()
            self._start = self._clock()
        return True

    def _evaluate(self) -> None:
        if isinstance(self._env, VecNormalize):
            sync_envs_normalization(self.training_env, self._env)
        with th.random.fork_rng():
            # Others than those of the other seeds
            th.manual_seed(1000 * self.num_timesteps + self.seed)
            for mode, deterministic in MODES.items():
                mean: Any = evaluate_policy(self.model, self._env, self.episodes, deterministic)[0]
                row = {"step": self.num_timesteps, "seconds": round(self.seconds, 1), "mode": mode}
                self.rows.append(row | {"return": round(float(mean), 3)})
        with replacing(Path(self.path)) as file:
            pd.DataFrame(self.rows).to_csv(file, index=False)

    def _on_training_end(self) -> None:
        self._env.close()
