"""The policy that MFPO and SOM share: a mean-flow actor, which acts in few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_mfpo.checks import check_integer, check_range
from sb3_mfpo.nets.flow import MeanFlowActor
from sb3_mfpo.nets.layers import TanhGELU
from sb3_mfpo.training.policy import GenerativePolicy

MINIMA = {"sampling_steps": 1, "time_fourier_dim": 2, "time_embedding_dim": 1, "action_fourier_dim": 0}


class MeanFlowPolicy(GenerativePolicy):
    """
    Policy with a mean-flow actor: base of those of MFPO and SOM, which end their constructors with ``_build``.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: Widths of the hidden layers, [256, 256] by default, as SB3's SAC, or ``dict(pi=[...], qf=[...])``
    :param activation_fn: Activation function, or anything that makes one; tanh-approximated GELU by default
    :param layer_norm: Whether to use LayerNorm in all hidden layers
    :param time_fourier_dim: Number of learned Fourier features of each time (even)
    :param time_embedding_dim: Size of a time's embedding
    :param action_fourier_dim: Number of fixed random Fourier features of the noisy action (even); 0 leaves it alone
    :param action_fourier_std: Standard deviation of their frequencies over all coordinates together, in turns per unit of
        action
    :param sampling_steps: Number of steps T from noise to action; an algorithm's policy has its own default
    :param sampling_power: The steps end at ``(k / T) ** sampling_power`` for k from T - 1 down to 0; 1 makes them equally
        long, a higher one makes the last ones shorter
    :param kwargs: Further arguments of :class:`sb3_mfpo.training.policy.GenerativePolicy`
    :raises ValueError: If an argument is out of range; the message names it
    """

    actor: MeanFlowActor
    actor_target: MeanFlowActor
    # "mean_flow" (average velocity over an interval) or "flow_matching" (velocity at its start)
    actor_type: str = "mean_flow"

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: Callable[[], nn.Module] = TanhGELU,
        layer_norm: bool = True,
        time_fourier_dim: int = 128,
        time_embedding_dim: int = 64,
        *,
        action_fourier_dim: int = 32,
        action_fourier_std: float = 0.5,
        sampling_steps: int,
        sampling_power: float = 2.0,
        **kwargs: Any,
    ):
        self.check_arguments(
            sampling_steps=sampling_steps,
            sampling_power=sampling_power,
            time_fourier_dim=time_fourier_dim,
            time_embedding_dim=time_embedding_dim,
            action_fourier_dim=action_fourier_dim,
            action_fourier_std=action_fourier_std,
        )
        super().__init__(observation_space, action_space, net_arch, activation_fn, layer_norm, **kwargs)
        self.time_fourier_dim = time_fourier_dim
        self.time_embedding_dim = time_embedding_dim
        self.action_fourier_dim = action_fourier_dim
        self.action_fourier_std = action_fourier_std
        self.sampling_power = sampling_power
        self.initial_sampling_steps = sampling_steps

    @classmethod
    def check_arguments(cls, **kwargs: Any) -> None:
        super().check_arguments(**kwargs)
        for name, minimum in MINIMA.items():
            if name in kwargs:
                check_integer(name, kwargs[name], minimum)
        for name in ("time_fourier_dim", "action_fourier_dim"):
            if kwargs.get(name, 0) % 2 == 1:
                raise ValueError(f"`{name}` must be even (cosines and sines), not {kwargs[name]}.")
        for name in ("action_fourier_std", "sampling_power"):
            if name in kwargs:
                check_range(name, kwargs[name], above=0)

    @property
    def sampling_steps(self) -> int:
        """Number of steps from noise to action; may be changed at any time, also on a trained model."""
        return self.actor_target.sampling_steps

    @sampling_steps.setter
    def sampling_steps(self, value: int) -> None:
        check_integer("sampling_steps", value, 1)
        self.actor.sampling_steps = value
        self.actor_target.sampling_steps = value

    def network_arguments(self, net_arch: Sequence[int]) -> dict[str, Any]:
        """
        :param net_arch: Widths of the hidden layers
        :return: Arguments that the networks of the flow share
        """
        return dict(
            net_arch=net_arch,
            activation_fn=self.activation_fn,
            layer_norm=self.layer_norm,
            time_fourier_dim=self.time_fourier_dim,
            time_embedding_dim=self.time_embedding_dim,
            action_fourier_dim=self.action_fourier_dim,
            action_fourier_std=self.action_fourier_std,
        )

    def make_actor(self, net_arch: Sequence[int]) -> MeanFlowActor:
        return MeanFlowActor(
            self.observation_space,
            self.action_space,
            self.make_features_extractor(),
            **self.network_arguments(net_arch),
            sampling_steps=self.initial_sampling_steps,
            sampling_power=self.sampling_power,
            instantaneous=self.actor_type == "flow_matching",
            normalize_images=self.normalize_images,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lr_schedule=self._dummy_schedule,  # not needed for loading the policy alone
            time_fourier_dim=self.time_fourier_dim,
            time_embedding_dim=self.time_embedding_dim,
            action_fourier_dim=self.action_fourier_dim,
            action_fourier_std=self.action_fourier_std,
            sampling_steps=self.sampling_steps,
            sampling_power=self.sampling_power,
        )
        return data
