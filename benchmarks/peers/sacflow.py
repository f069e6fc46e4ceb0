"""SAC-Flow with Flow-G: soft actor-critic with a noisy flow of gated steps, by the density of its whole path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_mfpo.checks import check_range
from sb3_mfpo.nets.layers import MultiInputMLP

from . import maths
from .common import ChainActor, PathPeer, PeerPolicy


class SACFlowActor(ChainActor):
    """
    Gate and candidate of a flow from standard noise, noise in its steps by the state, and tanh at its end.

    :param sampling_steps: Number T of steps
    :param network_arguments: Those of ``ChainActor``
    :param kwargs: Those of ``ChainActor`` but ``times``, ``n_draws`` and ``n_outputs``
    """

    def __init__(self, *, sampling_steps: int, network_arguments: dict[str, Any], **kwargs: Any):
        times = 1 - th.arange(sampling_steps) / sampling_steps
        super().__init__(network_arguments=network_arguments, times=times, n_draws=sampling_steps + 1, n_outputs=2, **kwargs)
        d, features_dim = get_action_dim(self.action_space), self.features_extractor.features_dim
        layers = {name: network_arguments[name] for name in ("net_arch", "activation_fn", "layer_norm")}
        self.std_network = MultiInputMLP([features_dim], 0, d, **layers)
        # Gates start open: sigmoid(5) = 0.993
        with th.no_grad():
            self.network.output_layer.weight[:d] = 0
            self.network.output_layer.bias[:d] = 5

    def on_chain(self, features: th.Tensor) -> maths.OnChain:
        """
        :param features: State features, shape (..., features_dim)
        :return: The velocity as a function of a point, shape (..., d), and of the index of the step
        """
        outputs = super().on_chain(features)
        return lambda x, step: maths.gated_velocity(x, *outputs(x, step).chunk(2, dim=-1))

    def log_std(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (..., features_dim)
        :return: Logarithm of the standard deviation of the noise in every step, in [-5, 2], shape (..., d)
        """
        return maths.bounded_log_std(self.std_network(features))

    def chain(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return maths.noisy_flow(self.on_chain(features), self.split(noise), self.log_std(features).exp()).tanh()

    def sample(self, features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param features: State features, shape (B, features_dim)
        :param noise: Standard-normal noise, shape (B, noise_dim)
        :return: Actions in [-1, 1], shape (B, d); log-density of their whole paths, of which tanh maps the end, in nats,
            shape (B,); once more, as what the temperature brings to a target
        """
        draws, log_std = self.split(noise), self.log_std(features)
        end = maths.noisy_flow(self.on_chain(features), draws, log_std.exp())
        log_prob = maths.noisy_flow_log_prob(draws, log_std) - maths.log_tanh_derivative(end).sum(dim=-1)
        return end.tanh(), log_prob, log_prob


class SACFlowPolicy(PeerPolicy):
    """
    :param args: Those of ``PeerPolicy``
    :param sampling_steps: Number T of steps from noise to action
    :param kwargs: Those of ``PeerPolicy``
    """

    actor: SACFlowActor
    actor_target: SACFlowActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *args: Any,
        sampling_steps: int = 4,
        **kwargs: Any,
    ):
        super().__init__(observation_space, action_space, lr_schedule, *args, sampling_steps=sampling_steps, **kwargs)
        self._build(lr_schedule)

    def make_actor(self, net_arch: Sequence[int]) -> SACFlowActor:
        return SACFlowActor(sampling_steps=self.sampling_steps, **self.actor_arguments(net_arch))


class SACFlow(PathPeer):
    """
    SAC Flow with Flow-G, its gated velocity, https://arxiv.org/abs/2509.25756, after the authors' code that learns from
    scratch, https://github.com/Elessar123/SAC-FLOW.

    The policy is a flow in four steps with noise in each. Soft actor-critic trains it by gradients through all of them, with
    the log-density of the whole path in place of that of the action. Its entropy counts the noise of every step: a temperature
    weighs T times what it does in SAC.

    Departures from the official settings, all to hold equal what is not the method:

    - Critics: two, of this package's C51 with its range and its start, target networks, and two layers of 256 with LayerNorm
      and GELU, in place of CrossQ's two scalar ones of 1024 with batch renormalisation.
    - Actor: gate and candidate are two outputs of one network with this package's layers and embeddings of time and action, in
      place of two networks of one hidden layer of 512 with batch renormalisation and fixed sinusoids; the noise is that of a
      network with the same layers, in place of two layers of 512.
    - One update per step, of everything, in place of actor and temperature at every third; batches of 256 in place of 512; a
      rate of 3e-4 for the critics in place of 1e-3; Adam's usual betas in place of 0.5; 100 random steps by default in place
      of 50 000.
    - A learned temperature is in units of the returns' scale, which is 1 where the range of the values is fixed.
    - Densities are those of actions in [-1, 1] in place of the environment's; tanh's part is exact, without an added 1e-6.
    - ``predict(deterministic=True)`` takes the best of ten candidates; the official code samples.

    :param policy: The policy model to use, or its alias (MlpPolicy)
    :param env: The environment to learn from
    :param learning_rate: Learning rate of actor and critics
    :param args: Further arguments of SB3's ``OffPolicyAlgorithm``
    :param ent_coef: Temperature, above 0: what it starts from where it is learned, else in units of return
    :param target_entropy: What the temperature brings the entropy of the whole path, over T + 1 points, to, in nats per action
        coordinate. None fixes the temperature.
    :param ent_coef_learning_rate: Learning rate of the temperature
    :param critic_reduction: "min" or "mean" over the critics
    :param kwargs: Further arguments of ``ActorCriticAlgorithm``
    :raises ValueError: If an argument is out of range; the message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": SACFlowPolicy}
    policy_base = SACFlowPolicy
    policy: SACFlowPolicy

    def __init__(
        self,
        policy: str | type[SACFlowPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        *args: Any,
        ent_coef: float = 0.2,
        target_entropy: float | None = 0.0,
        ent_coef_learning_rate: float = 1e-3,
        critic_reduction: str = "min",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ):
        super().__init__(
            policy,
            env,
            learning_rate,
            *args,
            ent_coef=ent_coef,
            learned=target_entropy is not None,
            ent_coef_learning_rate=ent_coef_learning_rate,
            critic_reduction=critic_reduction,
            **kwargs,
        )
        self.target_entropy = target_entropy
        if _init_setup_model:
            self._setup_model()

    @property
    def target_cost(self) -> float | None:  # type: ignore[override]
        """That of a path's cost, which is its log-density, in nats per action coordinate."""
        return None if self.target_entropy is None else -self.target_entropy

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.target_entropy is not None:
            check_range("target_entropy", self.target_entropy)
