"""
Variants of MFPO that no argument selects, for suites: callbacks that rl_zoo3 is given by name.

    algorithms:
      MFPO, averaged: {algo: mfpo, params: {callback: [{variants.ActWithAverage: {decay: 0.999}}]}}
"""

from __future__ import annotations

import copy

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import polyak_update

from sb3_mfpo import MFPO


class ActWithAverage(BaseCallback):
    """
    Explore and be evaluated with a moving average of the actor, while the actor itself is trained. Log-probabilities, which
    only training needs, stay those of the actor.

    A checkpoint written during a rollout holds the average in place of the actor, and an interrupted run resumes from it.

    :param decay: Share of the average that stays at an update, in [0, 1)
    """

    model: MFPO

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay

    def _on_training_start(self) -> None:
        self._trained = self.model.policy.actor
        self._average = copy.deepcopy(self._trained)

    def _on_rollout_start(self) -> None:
        polyak_update(self._trained.parameters(), self._average.parameters(), 1 - self.decay)
        self.model.policy.actor = self._average

    def _on_rollout_end(self) -> None:
        self.model.policy.actor = self._trained

    def _on_step(self) -> bool:
        return True


class LeaveItselfOut(BaseCallback):
    """
    Do not let the action that the point a_t is made from, the first sample of the policy, propose itself. Give
    ``n_policy_samples`` one more to have as many proposals as otherwise, and no ``n_local_samples``, which surround it.
    """

    def _init_callback(self) -> None:
        self.model.__class__ = _WithoutItself

    def _on_step(self) -> bool:
        return True


class _WithoutItself(MFPO):
    def _boltzmann_velocity(
        self, observations, actions: th.Tensor, log_prob: th.Tensor, *rest
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        return super()._boltzmann_velocity(observations, actions[:, 1:], log_prob[:, 1:], *rest)
