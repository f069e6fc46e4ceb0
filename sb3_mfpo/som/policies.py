"""SOM's policy: the shared one, acting in a single step."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule

from sb3_mfpo.training.mean_flow_policy import MeanFlowPolicy


class SOMPolicy(MeanFlowPolicy):
    """
    Policy class (with actor and critics) for SOM.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param sampling_steps: Number of steps from noise to action
    :param kwargs: Further arguments of :class:`sb3_mfpo.training.mean_flow_policy.MeanFlowPolicy`
    :raises ValueError: If an argument is out of range; the message names it
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        sampling_steps: int = 1,
        **kwargs: Any,
    ):
        super().__init__(observation_space, action_space, lr_schedule, sampling_steps=sampling_steps, **kwargs)
        self._build(lr_schedule)


MlpPolicy = SOMPolicy


class CnnPolicy(SOMPolicy):
    """``SOMPolicy`` for images, with ``NatureCNN`` as features extractor."""

    default_features_extractor = NatureCNN


class MultiInputPolicy(SOMPolicy):
    """``SOMPolicy`` for Dict observations, with ``CombinedExtractor`` as features extractor."""

    default_features_extractor = CombinedExtractor
