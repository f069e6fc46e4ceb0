"""Mean-flow policies for Stable-Baselines3."""

from sb3_mfpo.mfpo import MFPO
from sb3_mfpo.runs.callback import RunCheckpointCallback
from sb3_mfpo.som import SOM
from sb3_mfpo.training.health import HealthCallback

__version__ = "0.2.0"

__all__ = ["MFPO", "SOM", "HealthCallback", "RunCheckpointCallback", "__version__"]
