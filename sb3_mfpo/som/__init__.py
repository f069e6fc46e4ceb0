"""Score-based One-step MeanFlow policy optimization."""

from sb3_mfpo.som.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SOMPolicy
from sb3_mfpo.som.som import SOM

__all__ = ["SOM", "CnnPolicy", "MlpPolicy", "MultiInputPolicy", "SOMPolicy"]
