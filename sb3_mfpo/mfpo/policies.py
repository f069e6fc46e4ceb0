"""MFPO's policy: the shared one with an average divergence network (ADN) that follows the log-probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN, get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_mfpo.checks import check_choice
from sb3_mfpo.maths.divergence import exact_divergence
from sb3_mfpo.maths.mean_flow import few_step_sample, sampling_grid
from sb3_mfpo.nets.flow import MeanFlowActor, MeanFlowMLP, embed_grid
from sb3_mfpo.nets.layers import in_chunks
from sb3_mfpo.training.mean_flow_policy import MeanFlowPolicy

ACTOR_TYPES = ("mean_flow", "flow_matching")
DIVERGENCE_TYPES = ("mean_flow", "flow_matching", "exact")


class AverageDivergenceNetwork(MeanFlowMLP):
    """
    Average divergence of the target actor's velocity field over [r, t] (ADN), for log-probabilities without a fine ODE solve.

    It sees the state through that actor's features: the policy depends on the state through nothing else.
    """

    optimizer: th.optim.Optimizer


class InstantaneousDivergence(nn.Module):
    """
    Divergence of an actor's velocity at t in place of its average over [r, t]: the ablation without an ADN.

    The log-probability is then that of an Euler solve with the sampling steps, and d Jacobian-vector products per step
    replace one network.

    :param actor: The actor; it stays a submodule of the policy alone
    """

    def __init__(self, actor: MeanFlowActor):
        super().__init__()
        # Bound, so that the actor does not become a submodule
        self.linearize_velocity: Callable[..., Any] = actor.linearize_velocity

    def embed(self, t: th.Tensor, h: th.Tensor) -> th.Tensor:
        """
        :param t: End of the interval in [0, 1], shape (..., 1)
        :param h: Its length, on which the divergence at t does not depend
        :return: t
        """
        return t

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (..., features_dim)
        :param noisy_actions: a_t, shape (..., d)
        :param t: Time in [0, 1], shape (..., 1)
        :return: Divergence at t, shape (..., 1), without gradient
        """
        _, jacobian_product = self.linearize_velocity(features, noisy_actions, t)
        return exact_divergence(jacobian_product, noisy_actions)


class MFPOPolicy(MeanFlowPolicy):
    """
    Policy class (with actor, average divergence network and critics) for MFPO.

    The divergence network has the actor's hidden layers.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param actor_type: "mean_flow" (average velocity) or "flow_matching" (instantaneous velocity, Euler steps; an ablation)
    :param divergence_type: "mean_flow" (ADN), "flow_matching" (a network of the instantaneous divergence; an ablation) or
        "exact" (no network: the Jacobian's trace at each sampling step; an ablation)
    :param sampling_steps: Number of steps T from noise to action
    :param kwargs: Further arguments of :class:`sb3_mfpo.training.mean_flow_policy.MeanFlowPolicy`
    :raises ValueError: If an argument is out of range; the message names it
    """

    divergence: AverageDivergenceNetwork | InstantaneousDivergence

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        actor_type: str = "mean_flow",
        divergence_type: str = "mean_flow",
        sampling_steps: int = 2,
        **kwargs: Any,
    ):
        super().__init__(observation_space, action_space, lr_schedule, sampling_steps=sampling_steps, **kwargs)
        self.check_arguments(actor_type=actor_type, divergence_type=divergence_type)
        self.actor_type = actor_type
        self.divergence_type = divergence_type
        self._build(lr_schedule)

    @classmethod
    def check_arguments(cls, **kwargs: Any) -> None:
        super().check_arguments(**kwargs)
        check_choice("actor_type", kwargs.get("actor_type", "mean_flow"), ACTOR_TYPES)
        check_choice("divergence_type", kwargs.get("divergence_type", "mean_flow"), DIVERGENCE_TYPES)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if self.divergence_type == "exact":
            self.divergence = InstantaneousDivergence(self.actor_target)
            return
        self.divergence = AverageDivergenceNetwork(
            self.actor_target.features_extractor.features_dim,
            get_action_dim(self.action_space),
            output_dim=1,
            **self.network_arguments(get_actor_critic_arch(self.net_arch)[0]),
            instantaneous=self.divergence_type == "flow_matching",
        ).to(self.device)
        self.divergence.optimizer = self._make_optimizer(self.divergence.parameters(), lr_schedule)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = dict(actor_type=self.actor_type, divergence_type=self.divergence_type)
        return super()._get_constructor_parameters() | own

    def sample(self, features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Carry noise to actions in ``sampling_steps`` steps, with the change of log-density.

        :param features: The target actor's state features, shape (B, ..., features_dim), broadcast against ``noise``
        :param noise: Standard-normal noise, shape (B, ..., d)
        :return: Actions clipped to [-1, 1], shape (B, ..., d); log-density in nats of the actions before the clip (as in the
            authors' code), shape (B, ...)
        """
        network, times = self.actor_target.network, self.actor_target.sampling_times
        actor_intervals, divergence_intervals = embed_grid(network, times), embed_grid(self.divergence, times)

        def flow(features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, ...]:
            actions, log_prob = few_step_sample(
                lambda noisy_actions, k: network(features, noisy_actions, actor_intervals[k]),
                noise,
                times,
                lambda noisy_actions, k: self.divergence(features, noisy_actions, divergence_intervals[k]),
            )
            assert log_prob is not None
            return actions.clamp(-1, 1), log_prob

        return in_chunks(flow, features, noise)

    def solve(self, features: th.Tensor, noise: th.Tensor, n_steps: int) -> tuple[th.Tensor, th.Tensor]:
        """
        Carry noise to actions by an Euler solve of the instantaneous velocity, with its exact divergence: what ``sample``
        approximates in few steps.

        :param features: The target actor's state features, shape (B, ..., features_dim), broadcast against ``noise``
        :param noise: Standard-normal noise, shape (B, ..., d)
        :param n_steps: Number of steps, between which time is spaced as for ``sample``
        :return: Actions clipped to [-1, 1], shape (B, ..., d); log-density in nats before the clip, shape (B, ...); the latter
            without gradient
        """
        network = self.actor_target.network
        times = sampling_grid(n_steps, self.actor_target.sampling_power).to(noise.device)
        instants = network.embed(times[:-1, None], th.zeros_like(times[:-1, None])).split(1)
        exact = InstantaneousDivergence(self.actor_target)
        actions, log_prob = few_step_sample(
            lambda noisy_actions, k: network(features, noisy_actions, instants[k]),
            noise,
            times,
            lambda noisy_actions, k: exact(features, noisy_actions, times[k, None]),
        )
        assert log_prob is not None
        return actions.clamp(-1, 1), log_prob

    def action_log_prob(self, obs: PyTorchObs, noise: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """
        Sample one action per observation, with its log-probability by the divergence network.

        :param obs: Batch of observations as tensors on the policy's device (see ``obs_to_tensor``)
        :param noise: Standard-normal noise to start from, shape (B, d); drawn if not given
        :return: Actions scaled to [-1, 1], shape (B, d); log-probabilities in nats of the scaled actions before they are
            clipped to the bounds, shape (B,)
        """
        features = self.actor_target.encode(obs)
        return self.sample(features, self.actor_target.draw_noise(features) if noise is None else noise)

    def _networks(self) -> list[nn.Module]:
        return [self.actor, self.divergence, self.critic]


MlpPolicy = MFPOPolicy


class CnnPolicy(MFPOPolicy):
    """``MFPOPolicy`` for images, with ``NatureCNN`` as features extractor."""

    default_features_extractor = NatureCNN


class MultiInputPolicy(MFPOPolicy):
    """``MFPOPolicy`` for Dict observations, with ``CombinedExtractor`` as features extractor."""

    default_features_extractor = CombinedExtractor
