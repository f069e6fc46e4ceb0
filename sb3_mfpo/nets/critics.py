"""Critics: ensembles of categorical or scalar Q-networks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_mfpo.maths import categorical
from sb3_mfpo.nets.layers import MultiInputMLP, in_chunks


class Critic(BaseModel):
    """
    Ensemble of Q-networks on [state features, action]. They learn values in units of ``scale``, and give them in units of
    return.

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param net_arch: Widths of the hidden layers
    :param activation_fn: Makes the activations
    :param layer_norm: Whether to use LayerNorm in the hidden layers
    :param n_critics: Number of Q-networks
    :param output_dim: Number of outputs of each Q-network
    :param share_features_extractor: Whether the extractor belongs to the actor, so that no gradient may reach it
    :param normalize_images: Whether to divide images by 255
    """

    features_extractor: BaseFeaturesExtractor
    scale: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        net_arch: Sequence[int],
        activation_fn: Callable[[], nn.Module],
        layer_norm: bool,
        n_critics: int,
        output_dim: int,
        share_features_extractor: bool,
        normalize_images: bool = True,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        self.register_buffer("scale", th.ones(()))
        self.q_networks = nn.ModuleList(
            MultiInputMLP([features_dim, get_action_dim(action_space)], 0, output_dim, net_arch, activation_fn, layer_norm)
            for _ in range(n_critics)
        )

    @th.no_grad()
    def rescale(self, scale: float, factor: float) -> None:
        """
        Change the unit of what the networks learn. In units of return values stay what they are: that some returns rise is no
        reason for all of them to.

        :param scale: The unit, in units of return, above 0
        :param factor: By which it has changed; 1 for the first unit, as nothing is learned yet
        """
        self.scale.fill_(scale)
        if factor != 1:
            for layer in self._output_layers():
                # Where a parametrization computes them, they change in proportion
                if isinstance(layer.weight, nn.Parameter) and isinstance(layer.bias, nn.Parameter):
                    layer.weight.copy_(self._in_new_unit(layer.weight, factor))
                    layer.bias.copy_(self._in_new_unit(layer.bias, factor))

    def _output_layers(self) -> list[nn.Linear]:
        return [cast(MultiInputMLP, q_network).output_layer for q_network in self.q_networks]

    @abstractmethod
    def _in_new_unit(self, parameter: th.Tensor, factor: float) -> th.Tensor:
        """
        :param parameter: Weight or bias of an output layer, shape (output_dim, ...)
        :param factor: By which the unit of the values has changed
        :return: The same for values that have not, shape (output_dim, ...)
        """

    def encode(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: Batch of observations
        :return: State features, shape (B, features_dim)
        """
        with self._without_counting():
            return self._features(observations)

    def _features(self, observations: PyTorchObs) -> th.Tensor:
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(observations, self.features_extractor)

    @contextmanager
    def _without_counting(self) -> Iterator[None]:
        # Layers of batch normalisation count what the critics learn from alone, which is what ``forward`` sees. To value an
        # action they use the statistics and leave them as they are, so that the target critics have the same.
        modules = self.modules() if self.training else ()
        norms = [module for module in modules if module.training and hasattr(module, "running_mean")]
        for norm in norms:
            norm.training = False
        try:
            yield
        finally:
            for norm in norms:
                norm.training = True

    def outputs(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (..., features_dim), leading dimensions broadcast against those of actions
        :param actions: Actions in [-1, 1], shape (..., d)
        :return: Raw outputs, shape (n_critics, ..., output_dim)
        """
        # Within `autocast` layers return fewer digits
        return th.stack([q_network(features, actions).to(actions.dtype) for q_network in self.q_networks])

    def forward(self, observations: PyTorchObs, actions: th.Tensor, raw: bool = False) -> tuple[th.Tensor, ...] | th.Tensor:
        """
        Q-values in the form of SB3's ``ContinuousCritic``, or what they are read off.

        :param observations: Batch of observations
        :param actions: Actions in [-1, 1], shape (B, d)
        :param raw: Whether to return the raw outputs, which training takes
        :return: One tensor of shape (B, 1) per critic, in units of return; raw outputs, shape (n_critics, B, output_dim)
        """
        outputs = self.outputs(self._features(observations), actions)
        return outputs if raw else tuple(self.expected_return(outputs).unsqueeze(-1))

    def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (B, ..., features_dim)
        :param actions: Actions in [-1, 1], shape (B, ..., d)
        :return: Expected soft returns, shape (n_critics, B, ...)
        """

        def values(features: th.Tensor, actions: th.Tensor) -> th.Tensor:
            # The critics come last, so that chunks can be put together along the first dimension
            outputs = (q_network(features, actions).to(actions.dtype) for q_network in self.q_networks)
            return th.stack([self.expected_return(output) for output in outputs], dim=-1)

        with self._without_counting():
            return in_chunks(values, features, actions).movedim(-1, 0)

    @abstractmethod
    def expected_return(self, outputs: th.Tensor) -> th.Tensor:
        """
        :param outputs: Raw outputs, shape (..., output_dim)
        :return: Expected soft returns, shape (...)
        """

    @abstractmethod
    def bellman_target(
        self, outputs: th.Tensor, rewards: th.Tensor, discounts: th.Tensor, entropy_bonus: th.Tensor, reduction: str
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Soft Bellman target from this critic's values at the next state.

        :param outputs: This critic's raw outputs there, shape (n_critics, B, output_dim)
        :param rewards: shape (B, 1)
        :param discounts: Discount factors, zero where the episode terminated, shape (B, 1)
        :param entropy_bonus: Entropy bonus -alpha log pi(a' | s'), shape (B, 1) or a scalar
        :param reduction: "min" or "mean" over the critics
        :return: What ``loss`` takes as target; the share of the target's mass that was clipped, a scalar in [0, 1]
        """

    @abstractmethod
    def loss(self, outputs: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param outputs: This critic's raw outputs, shape (n_critics, B, output_dim)
        :param target: From ``bellman_target``
        :return: Loss, summed over the critics and averaged over the batch, a scalar; mean expected return, a scalar
        """


class CategoricalCritic(Critic):
    """
    Q-networks that predict a categorical distribution of the soft return (C51).

    :param grid: Support, evenly spaced, in units of the scale, shape (n_atoms,)
    :param value_init: "narrow" starts with a narrow distribution around 0 for all states and actions, "uniform" with random
        ones near the uniform one
    :param kwargs: Those of ``Critic`` but ``output_dim``
    """

    grid: th.Tensor
    # In units of return
    atoms: th.Tensor

    def __init__(self, *, grid: th.Tensor, value_init: str, **kwargs: Any):
        super().__init__(output_dim=len(grid), **kwargs)
        self.register_buffer("grid", grid)
        self.register_buffer("atoms", grid.clone())
        if value_init == "narrow":
            for layer in self._output_layers():
                nn.init.zeros_(layer.weight)
                with th.no_grad():
                    layer.bias.copy_(categorical.narrow_logits(grid))

    def rescale(self, scale: float, factor: float) -> None:
        super().rescale(scale, factor)
        th.mul(self.grid, self.scale, out=self.atoms)

    def _in_new_unit(self, parameter: th.Tensor, factor: float) -> th.Tensor:
        return categorical.stretch_support(parameter, factor)

    def expected_return(self, outputs: th.Tensor) -> th.Tensor:
        return categorical.expected_value(outputs.softmax(dim=-1), self.atoms)

    def bellman_target(
        self, outputs: th.Tensor, rewards: th.Tensor, discounts: th.Tensor, entropy_bonus: th.Tensor, reduction: str
    ) -> tuple[th.Tensor, th.Tensor]:
        probs = outputs.softmax(dim=-1)
        positions = categorical.bellman_atoms(rewards, discounts, entropy_bonus, self.atoms)
        target = categorical.reduce_distributions(categorical.project(probs, positions, self.atoms), self.atoms, reduction)
        return target, categorical.clipped_mass(probs, positions, self.atoms).mean()

    def loss(self, outputs: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        with th.no_grad():
            q_value = self.expected_return(outputs).mean()
        return categorical.cross_entropy(outputs, target).sum(), q_value


class ScalarCritic(Critic):
    """
    Q-networks that predict the expected soft return itself, trained by mean squared error as in SAC.

    :param kwargs: Those of ``Critic`` but ``output_dim``
    """

    def __init__(self, **kwargs: Any):
        super().__init__(output_dim=1, **kwargs)

    def _in_new_unit(self, parameter: th.Tensor, factor: float) -> th.Tensor:
        return parameter / factor

    def expected_return(self, outputs: th.Tensor) -> th.Tensor:
        return outputs.squeeze(-1) * self.scale

    def bellman_target(
        self, outputs: th.Tensor, rewards: th.Tensor, discounts: th.Tensor, entropy_bonus: th.Tensor, reduction: str
    ) -> tuple[th.Tensor, th.Tensor]:
        next_values = categorical.reduce_values(outputs * self.scale, reduction)
        return rewards + discounts * (next_values + entropy_bonus), rewards.new_zeros(())

    def loss(self, outputs: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        # The factor is SB3's (SAC): the gradient of half the squared error is the error
        loss = 0.5 * F.mse_loss(outputs, (target / self.scale).expand_as(outputs)) * len(outputs)
        return loss, self.expected_return(outputs.detach()).mean()
