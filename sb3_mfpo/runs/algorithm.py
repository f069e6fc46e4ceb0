"""An off-policy algorithm whose runs can be saved and resumed."""

from __future__ import annotations

import copy
import uuid
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn

from sb3_mfpo.runs.callback import RunSaver
from sb3_mfpo.runs.checkpoint import read_newest_run
from sb3_mfpo.runs.state import restore_buffer, restore_run

SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")


class ResumableAlgorithm(OffPolicyAlgorithm):
    """
    Off-policy algorithm whose runs :class:`sb3_mfpo.RunCheckpointCallback` saves between rollouts, and ``resume`` continues.

    :param args: Those of SB3's ``OffPolicyAlgorithm``
    :param kwargs: Those of SB3's ``OffPolicyAlgorithm``
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Which environments had just begun an episode when the last transition was stored, and after how many steps that was
        self._episode_starts = np.ones(1, dtype=bool)
        self._stored_timesteps = 0
        # Identifies the run in its checkpoints
        self._run_id = ""
        # Only during ``learn``
        self._saver: RunSaver | None = None
        # Between ``resume`` and ``learn``: what is left to restore
        self._run_state: dict[str, Any] | None = None

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        state, self._run_state = self._run_state, None
        action_noise = self.action_noise
        if state is not None:
            # SB3 resets the action noise when a training begins
            action_noise = copy.deepcopy(action_noise)
            # The caller gives the steps of the whole run, as in the call that was interrupted
            total_timesteps, reset_num_timesteps = total_timesteps - self.num_timesteps, False
        elif reset_num_timesteps or not self._run_id:
            self._run_id = uuid.uuid4().hex
        if reset_num_timesteps or self._last_obs is None:
            self._episode_starts = np.ones(self.n_envs, dtype=bool)
        self._saver = RunSaver(self)
        result, callback = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._stored_timesteps = self.num_timesteps
        self._saver.begin(callback)
        if state is not None:
            self.action_noise = action_noise
            restore_run(self, state, callback)
        return result, callback

    def learn(
        self: SelfResumable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfResumable:
        """
        Return a trained model.

        :param total_timesteps: The total number of samples (env steps) to train on; after ``resume`` those of the whole run
        :param callback: Callback(s) called at every step with the state of the algorithm
        :param log_interval: The number of episodes between two logs
        :param tb_log_name: The name of the run for TensorBoard; by default that of the algorithm
        :param reset_num_timesteps: Whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich
        :return: The trained model
        """
        tb_log_name = tb_log_name or type(self).__name__
        try:
            super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
            self._save_run_if_due(at_the_end=True)
        except Exception:
            # Ctrl-C also reaches the environments' processes; they may end before the step is done
            if self._saver is not None and self._saver.received is not None:
                self._save_run_if_due()
            raise
        finally:
            if self._saver is not None:
                self._saver.release()
            self._saver = None
        return self

    def _save_run_if_due(self, at_the_end: bool = False) -> None:
        if self._saver is not None:
            self._saver.save_if_due(at_the_end)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        self._save_run_if_due()
        return super().collect_rollouts(*args, **kwargs)

    def _store_transition(
        self, replay_buffer: Any, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: Any
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._episode_starts, self._stored_timesteps = np.asarray(dones, dtype=bool), self.num_timesteps

    @classmethod
    def resume(
        cls: type[SelfResumable],
        path: str | Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        name_prefix: str = "run",
        **kwargs: Any,
    ) -> SelfResumable:
        """
        Load a run from a checkpoint of :class:`sb3_mfpo.RunCheckpointCallback`. The next ``learn`` continues it. Its
        ``total_timesteps`` counts from the beginning of the run, so the call is the same as before.

        :param path: A checkpoint (".zip" may be left out), or the folder of the checkpoints, of which the newest undamaged one
            is taken. It is unpickled, which can run code: resume only files that you trust.
        :param env: The environment to continue in, wrapped as before (if registered in Gym, can be str)
        :param device: Device on which the code should run
        :param name_prefix: The checkpoints' common prefix
        :param kwargs: Arguments to change, see ``load``, but none of the replay buffer's: the checkpoint's buffer goes on
        :return: The model
        :raises FileNotFoundError: If there is no checkpoint
        :raises ValueError: If every checkpoint is damaged, the number of environments differs, or an argument is of the replay
            buffer
        """
        for name in ("buffer_size", "n_steps", "optimize_memory_usage", "replay_buffer_class", "replay_buffer_kwargs"):
            if name in kwargs:
                raise ValueError(
                    f"`{name}` cannot be changed: the checkpoint's replay buffer goes on. `load` makes a new one."
                )
        path, state = read_newest_run(Path(path), name_prefix)
        model = cls.load(path, env=maybe_make_env(env, verbose=0), device=device, **kwargs)
        restore_buffer(model, state)
        if isinstance(model.replay_buffer, NStepReplayBuffer):
            model.replay_buffer.gamma = model.gamma
        model._run_state, model._run_id = state, state["run_id"]
        return model

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_run_state", "_saver"]
