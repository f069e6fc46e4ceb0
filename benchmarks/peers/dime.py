"""DIME: diffusion-based maximum-entropy reinforcement learning, with a bound on the entropy of a path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn
from torch.nn import functional as F

from sb3_mfpo.checks import check_range
from sb3_mfpo.maths.mean_flow import standard_normal_log_prob

from . import maths
from .common import ChainActor, PathPeer, PeerPolicy


class DIMEActor(ChainActor):
    """
    Drift of a Langevin diffusion from a wide Gaussian, whose step sizes are learned, and tanh at its end.

    :param sampling_steps: Number N of steps
    :param prior_std: Standard deviation S of the Gaussian
    :param kwargs: Those of ``ChainActor`` but ``times`` and ``n_draws``
    """

    schedule: th.Tensor

    def __init__(self, *, sampling_steps: int, prior_std: float, **kwargs: Any):
        times = 1 - th.arange(sampling_steps) / sampling_steps
        super().__init__(times=times, n_draws=sampling_steps + 1, **kwargs)
        self.prior_std = prior_std
        self.register_buffer("schedule", maths.langevin_schedule(sampling_steps).unsqueeze(-1), persistent=False)
        # Before softplus: 0.1 and, for every coordinate, 1
        self.step_size = nn.Parameter(th.tensor(0.1).expm1().log())
        self.friction = nn.Parameter(th.ones(get_action_dim(self.action_space)).expm1().log())
        # The policy starts as the uncontrolled diffusion
        last: Any = [self.network.input_layer, *self.network.body][-1]
        for parameter in last.parameters():
            nn.init.constant_(parameter, 1e-8)

    def steps(self) -> th.Tensor:
        """
        :return: Step sizes, shape (N, d)
        """
        return F.softplus(self.step_size) * self.schedule / F.softplus(self.friction)

    def chain(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return maths.langevin_path(self.on_chain(features), self.split(noise), self.steps(), self.prior_std)[-1].tanh()

    def sample(self, features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param features: State features, shape (B, features_dim)
        :param noise: Standard-normal noise, shape (B, noise_dim)
        :return: Actions in [-1, 1], shape (B, d); the path's cost C and the log-density of its start in nats, whose mean
            bounds that of log pi from above, shape (B,); C alone, shape (B,)
        """
        draws, steps = self.split(noise), self.steps()
        path = maths.langevin_path(self.on_chain(features), draws, steps, self.prior_std)
        cost = maths.langevin_cost(path, draws, steps, self.prior_std) - maths.log_tanh_derivative(path[-1]).sum(dim=-1)
        log_start = standard_normal_log_prob(draws[0]) - draws[0].shape[-1] * math.log(self.prior_std)
        return path[-1].tanh(), cost + log_start, cost


class DIMEPolicy(PeerPolicy):
    """
    :param args: Those of ``PeerPolicy``
    :param sampling_steps: Number N of steps from noise to action
    :param prior_std: Standard deviation S of what the path starts from, before tanh
    :param kwargs: Those of ``PeerPolicy``
    """

    actor: DIMEActor
    actor_target: DIMEActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *args: Any,
        sampling_steps: int = 16,
        prior_std: float = 2.5,
        **kwargs: Any,
    ):
        check_range("prior_std", prior_std, above=0)
        super().__init__(observation_space, action_space, lr_schedule, *args, sampling_steps=sampling_steps, **kwargs)
        self.prior_std = prior_std
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        for parameter in self.actor.parameters():
            parameter.register_hook(lambda gradient: gradient.nan_to_num(0.0).clamp(-1, 1))

    def make_actor(self, net_arch: Sequence[int]) -> DIMEActor:
        return DIMEActor(sampling_steps=self.sampling_steps, prior_std=self.prior_std, **self.actor_arguments(net_arch))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | dict(prior_std=self.prior_std)


class DIME(PathPeer):
    """
    Diffusion-Based Maximum Entropy Reinforcement Learning (DIME), https://arxiv.org/abs/2502.02316, after the authors' code,
    https://github.com/ALRhub/DIME.

    The policy is a Langevin diffusion in 16 steps, whose drift is learned by gradients through the whole path. A bound on the
    log-probability of its actions, from the path, takes the place of SAC's.

    Departures from the official settings, all to hold equal what is not the method:

    - Critics: two, of this package's C51 with its range and its start, target networks, and two layers of 256 with LayerNorm
      and GELU, in place of CrossQ's two of 2048 with batch renormalisation, fixed ranges of 200 or 1600, and a bonus of 0.005
      on the entropy of their predictions.
    - Actor: this package's layers and embeddings of time and action, in place of three layers of 256 and 256 time features.
      The drift is not clamped to 1e4.
    - One update per step, of everything, in place of two, and of actor and temperature at every third; Adam's usual betas in
      place of 0.5; 100 random steps by default in place of 5 000.
    - A learned temperature, and what the actor's gradient is clipped in, is in units of the returns' scale, which is 1 where
      the range of the values is fixed.
    - ``predict(deterministic=True)`` takes the best of ten candidates; the official code samples.

    :param policy: The policy model to use, or its alias (MlpPolicy)
    :param env: The environment to learn from
    :param learning_rate: Learning rate of actor and critics
    :param args: Further arguments of SB3's ``OffPolicyAlgorithm``
    :param ent_coef: Temperature, above 0: what it starts from where it is learned, else in units of return
    :param target_cost: What the temperature brings the mean of a path's cost C to, in nats per action coordinate. It leaves
        out the start's log-density, whose mean is -2.335. None fixes the temperature.
    :param ent_coef_learning_rate: Learning rate of the temperature
    :param critic_reduction: "min" or "mean" over the critics
    :param kwargs: Further arguments of ``ActorCriticAlgorithm``
    :raises ValueError: If an argument is out of range; the message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": DIMEPolicy}
    policy_base = DIMEPolicy
    policy: DIMEPolicy

    def __init__(
        self,
        policy: str | type[DIMEPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        *args: Any,
        ent_coef: float = 1.0,
        target_cost: float | None = 4.0,
        ent_coef_learning_rate: float = 1e-3,
        critic_reduction: str = "mean",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ):
        super().__init__(
            policy,
            env,
            learning_rate,
            *args,
            ent_coef=ent_coef,
            learned=target_cost is not None,
            ent_coef_learning_rate=ent_coef_learning_rate,
            critic_reduction=critic_reduction,
            **kwargs,
        )
        self.target_cost = target_cost
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.target_cost is not None:
            check_range("target_cost", self.target_cost)
