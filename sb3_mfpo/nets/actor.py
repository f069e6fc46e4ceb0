"""What every actor has that carries noise to actions."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs


class GenerativeActor(BasePolicy):
    """
    Actor that carries standard-normal noise to actions, as a flow or a diffusion chain does. A policy by itself, as the actors
    of SB3 are.

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Network to extract features
    :param normalize_images: Whether to divide images by 255
    """

    action_space: spaces.Box

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        normalize_images: bool = True,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        # Number of standard normals that one action starts from; an actor that draws along the way has more
        self.noise_dim = get_action_dim(action_space)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | dict(features_extractor=self.features_extractor)

    def encode(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: Batch of observations
        :return: State features, shape (B, features_dim)
        """
        return self.extract_features(observations, self.features_extractor)

    @abstractmethod
    def act(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        Carry noise to actions.

        :param features: State features, shape (B, ..., features_dim), broadcast against ``noise``
        :param noise: Standard-normal noise, shape (B, ..., noise_dim)
        :return: Actions in [-1, 1], shape (B, ..., d)
        """

    def draw_noise(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (B, features_dim)
        :return: Standard-normal noise, shape (B, noise_dim)
        """
        return th.randn(features.shape[0], self.noise_dim, device=features.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = False, noise: th.Tensor | None = None) -> th.Tensor:
        """
        :param obs: Batch of observations
        :param deterministic: Whether to start from the centre of the noise, zeros, instead of a draw
        :param noise: Where else to start from, shape (K, noise_dim), in each of the observations
        :return: Actions in [-1, 1], shape (B, d), or (B, K, d) if noise is given
        """
        features = self.encode(obs)
        if noise is not None:
            return self.act(features.unsqueeze(1), noise.expand(features.shape[0], -1, -1))
        if deterministic:
            return self.act(features, features.new_zeros(features.shape[0], self.noise_dim))
        return self.act(features, self.draw_noise(features))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        :param scaled_action: Action in [-1, 1]
        :return: Action within the bounds of the action space, which rounding alone could leave
        """
        action = super().unscale_action(scaled_action)
        # What `np.clip` does, in a third of its time
        return np.minimum(np.maximum(action, self.action_space.low), self.action_space.high)
