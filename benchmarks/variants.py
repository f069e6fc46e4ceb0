"""
Variants of MFPO that no argument selects, for suites: callbacks that rl_zoo3 is given by name.

    algorithms:
      MFPO, without itself: {algo: mfpo, params: {callback: [variants.LeaveItselfOut]}}
"""

from __future__ import annotations

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mfpo import MFPO
from sb3_mfpo.training.return_scale import ReturnScale


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


class RefreshRarely(BaseCallback):
    """Let values follow the scale of the returns every 250 steps instead of at every one, as MR.Q does."""

    def _init_callback(self) -> None:
        assert isinstance(self.model, MFPO) and self.model.return_scale is not None
        self.model.return_scale.__class__ = _RareScale

    def _on_step(self) -> bool:
        return True


class _RareScale(ReturnScale):
    held = 1.0

    @property
    def value(self) -> float:
        if self.moments.count < 250 or self.moments.count % 250 == 0:
            self.held = super().value
        return self.held
