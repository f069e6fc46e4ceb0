"""
The settings of MFPO's paper, in rl_zoo3's format: ``MFPO.PAPER``.

    python -m sb3_mfpo.zoo train --algo mfpo --env HalfCheetah-v5 --conf-file sb3_mfpo.zoo.paper
"""

from __future__ import annotations

from typing import Any

from sb3_mfpo import MFPO

_COMMON: dict[str, Any] = dict(MFPO.PAPER, n_timesteps=1e6, policy="MlpPolicy", learning_starts=10_000)
hyperparams: dict[str, dict[str, Any]] = {
    "default": _COMMON,
    # The authors' choice; the other tasks take the minimum
    "HalfCheetah-v5": {**_COMMON, "critic_reduction": "mean"},
}
