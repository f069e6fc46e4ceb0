"""Mean-flow policies for Stable-Baselines3."""

from sb3_mfpo.mfpo import MFPO

__version__ = "0.1.0"

__all__ = ["MFPO", "__version__"]
