"""
The settings of MFPO's paper, which are MFPO's defaults but for what is here, in rl_zoo3's format: values in ±1600 that start
uniform, where the zoo's own hyperparameters fit the task or start narrow.

    python -m sb3_mfpo.zoo train --algo mfpo --env HalfCheetah-v5 --conf-file sb3_mfpo.zoo.paper
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = dict(n_timesteps=1e6, policy="MlpPolicy", learning_starts=10_000)
hyperparams: dict[str, dict[str, Any]] = {
    "default": _COMMON,
    # The authors' choice; the minimum of the critics for all others
    "HalfCheetah-v5": {**_COMMON, "critic_reduction": "mean"},
}
