"""
What all peers share where a suite does not say otherwise, in rl_zoo3's format. The algorithms' own settings are their
constructors' defaults.

    python -m peers train --algo dime --env Pendulum-v1 --conf-file peers.frame
"""

from __future__ import annotations

from typing import Any

hyperparams: dict[str, dict[str, Any]] = {"default": dict(n_timesteps=1e6, policy="MlpPolicy", learning_starts=10_000)}
