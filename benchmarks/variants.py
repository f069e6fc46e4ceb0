"""
A variant of MFPO that no argument selects, for suites: a callback that rl_zoo3 is given by name.

    algorithms:
      a scale of every 250 steps: {algo: mfpo, params: {callback: [variants.RefreshRarely]}}
"""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback

from sb3_mfpo import MFPO
from sb3_mfpo.training.return_scale import ReturnScale


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
