"""Mean Flow Policy Optimization."""

from sb3_mfpo.mfpo.mfpo import MFPO
from sb3_mfpo.mfpo.policies import CnnPolicy, MFPOPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["MFPO", "CnnPolicy", "MFPOPolicy", "MlpPolicy", "MultiInputPolicy"]
