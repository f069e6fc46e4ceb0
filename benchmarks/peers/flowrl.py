"""FlowRL: a flow by gradients of values through its two evaluations, held near the best actions of the replay buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, get_actor_critic_arch
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule
from torch import nn

from sb3_mfpo.checks import check_range
from sb3_mfpo.maths.categorical import reduce_values
from sb3_mfpo.maths.paths import interpolate
from sb3_mfpo.nets.critics import ScalarCritic
from sb3_mfpo.nets.layers import MultiInputMLP
from sb3_mfpo.training.actor_critic import Metrics

from . import maths
from .common import ChainActor, Peer, PeerPolicy


class FlowRLActor(ChainActor):
    """
    Velocity of a flow from clipped noise in midpoint steps, and tanh at its end.

    :param sampling_steps: Number T of steps, of two evaluations each
    :param kwargs: Those of ``ChainActor`` but ``times`` and ``n_draws``
    """

    def __init__(self, *, sampling_steps: int, **kwargs: Any):
        times = 1 - th.arange(2 * sampling_steps) / (2 * sampling_steps)
        super().__init__(times=times, n_draws=1, **kwargs)

    def velocity(self, features: th.Tensor, x: th.Tensor, times: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (B, features_dim)
        :param x: Points between actions and noise, shape (B, d)
        :param times: In [0, 1], shape (B, 1)
        :return: shape (B, d)
        """
        return self.network(features, x, self.embed(times))

    def chain(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return maths.midpoint_flow(self.on_chain(features), noise.clamp(-1, 1), len(self.times) // 2).tanh()


class StateValue(BaseModel):
    """
    Value of a state, in units of the returns' scale.

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Network to extract features
    :param normalize_images: Whether to divide images by 255
    :param layers: Further arguments of ``MultiInputMLP``
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        normalize_images: bool,
        **layers: Any,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.network = MultiInputMLP([features_extractor.features_dim], 0, 1, **layers)

    @th.no_grad()
    def rescale(self, scale: float, factor: float) -> None:
        """
        Change the unit, as ``Critic.rescale`` does: in units of return values stay what they are.

        :param scale: The unit, in units of return
        :param factor: By which it has changed
        """
        for parameter in self.network.output_layer.parameters():
            parameter.div_(factor)

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: Batch of observations
        :return: In units of the scale, shape (B, 1)
        """
        return self.network(self.extract_features(observations, self.features_extractor))


class FlowRLPolicy(PeerPolicy):
    """
    The flow, its critics, and critics and value of the best that is in the replay buffer.

    :param args: Those of ``PeerPolicy``
    :param sampling_steps: Number T of midpoint steps from noise to action
    :param kwargs: Those of ``PeerPolicy``
    """

    actor: FlowRLActor
    actor_target: FlowRLActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *args: Any,
        sampling_steps: int = 1,
        **kwargs: Any,
    ):
        super().__init__(observation_space, action_space, lr_schedule, *args, sampling_steps=sampling_steps, **kwargs)
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        _, critic_arch = get_actor_critic_arch(self.net_arch)
        self.buffer_critic, self.buffer_critic_target = (
            ScalarCritic(**self.critic_arguments(critic_arch, None)).to(self.device) for _ in range(2)
        )
        self.buffer_critic_target.load_state_dict(self.buffer_critic.state_dict())
        self.buffer_critic_target.set_training_mode(False)
        self.buffer_value = StateValue(
            self.observation_space,
            self.action_space,
            self.make_features_extractor(),
            self.normalize_images,
            net_arch=critic_arch,
            activation_fn=self.activation_fn,
            layer_norm=self.layer_norm,
        ).to(self.device)
        for network in (self.buffer_critic, self.buffer_value):
            network.optimizer = self._make_optimizer(network.parameters(), lr_schedule)

    def make_actor(self, net_arch: Sequence[int]) -> FlowRLActor:
        return FlowRLActor(sampling_steps=self.sampling_steps, **self.actor_arguments(net_arch))

    def _networks(self) -> list[nn.Module]:
        return [*super()._networks(), self.buffer_critic, self.buffer_value]


class FlowRLDraws(NamedTuple):
    """
    All randomness of a gradient step.

    ``next_noise`` and ``policy_noise``: of the next actions and of the policy's, standard normal, shape (B, d);
    ``path_noise``: that the buffer's actions are mixed with, the same; ``times``: of these mixtures, uniform in [0, 1), shape
    (B, 1).
    """

    next_noise: th.Tensor
    policy_noise: th.Tensor
    path_noise: th.Tensor
    times: th.Tensor


class FlowRL(Peer):
    """
    Flow-Based Policy for Online Reinforcement Learning (FlowRL), https://arxiv.org/abs/2506.12811, after the authors' code,
    https://github.com/bytedance/FlowRL.

    The policy is a flow in one midpoint step: two evaluations, as many as MFPO's. It learns by gradients of values through
    both. It is held near the replay buffer's actions by flow matching, the more so where they were worth more than its own,
    which critics of the best in the buffer tell. Nothing rewards entropy.

    Departures from the official settings, all to hold equal what is not the method:

    - Critics: two of this package's C51 with its range and its start in place of scalar ones. Those of the best in the buffer
      are scalar, as in the official code.
    - Networks: two layers of 256 with LayerNorm and GELU in place of five of 512 (critics) and two with ELU (actor); this
      package's embeddings of time and action in place of the plain time.
    - Values in the actor's loss and in its weights are in units of the returns' scale, which is 1 where the range of the
      values is fixed.
    - Targets follow by 0.005 in place of 0.95; actor and targets at every update in place of every second; uniform replay in
      place of a fifth from the newest 2048 transitions; 100 random steps by default in place of 5 000.
    - ``predict(deterministic=True)`` takes the best of ten candidates; the official code samples.

    :param policy: The policy model to use, or its alias (MlpPolicy)
    :param env: The environment to learn from
    :param learning_rate: Learning rate of all networks
    :param args: Further arguments of SB3's ``OffPolicyAlgorithm``
    :param expectile: Which expectile of the values of the buffer's actions is a state's value, in (0, 1)
    :param constraint_factor: Weight of flow matching where all actions of the buffer are equally good, at least 0
    :param critic_reduction: "min" or "mean" over the critics
    :param kwargs: Further arguments of ``ActorCriticAlgorithm``
    :raises ValueError: If an argument is out of range; the message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": FlowRLPolicy}
    policy_base = FlowRLPolicy
    policy: FlowRLPolicy

    def __init__(
        self,
        policy: str | type[FlowRLPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        *args: Any,
        expectile: float = 0.9,
        constraint_factor: float = 0.1,
        critic_reduction: str = "min",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ):
        super().__init__(policy, env, learning_rate, *args, critic_reduction=critic_reduction, **kwargs)
        self.expectile = expectile
        self.constraint_factor = constraint_factor
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_range("expectile", self.expectile, high=1, above=0)
        check_range("constraint_factor", self.constraint_factor, low=0)

    def _draw(self, batch_size: int) -> FlowRLDraws:
        shape = batch_size, get_action_dim(self.action_space)
        return FlowRLDraws(
            next_noise=self._normal(*shape),
            policy_noise=self._normal(*shape),
            path_noise=self._normal(*shape),
            times=th.rand(batch_size, 1, device=self.device),
        )

    def _update(
        self, batch: ReplayBufferSamples, draws: FlowRLDraws, update_target: bool = True, improve_policy: bool = True
    ) -> Metrics:
        policy = self.policy
        metrics: Metrics = {}

        # Critics of the policy: no bonus on the entropy
        with th.no_grad():
            next_actions = self.actor_target.act(self.actor_target.encode(batch.next_observations), draws.next_noise)
        loss, critic_metrics = self._td_loss(batch, next_actions, entropy_bonus=next_actions.new_zeros(()))
        metrics["critic_loss"] = self._descend("critic_loss", loss, self.critic.optimizer)
        metrics |= critic_metrics

        # Value and critics of the best in the buffer
        loss = self._buffer_value_loss(batch)
        metrics["buffer_value_loss"] = self._descend("buffer_value_loss", loss, policy.buffer_value.optimizer)
        loss = self._buffer_critic_loss(batch)
        metrics["buffer_critic_loss"] = self._descend("buffer_critic_loss", loss, policy.buffer_critic.optimizer)
        if update_target:
            self._update_target(self.critic_target, self.critic, self.tau)
            self._update_target(policy.buffer_critic_target, policy.buffer_critic, self.tau)
        if not improve_policy:
            return metrics

        # Actor: values, by gradients through both evaluations, and the flow to the buffer's actions
        features = self.actor.encode(batch.observations)
        values = self._value(batch.observations, self.actor.act(features, draws.policy_noise)) / self.critic.scale
        metrics["constraint_weight"] = self._constraint_weight(batch, values.detach())
        noise = draws.path_noise.clamp(-1, 1)
        points = interpolate(batch.actions, noise, 1 - draws.times, draws.times)
        errors = self.actor.velocity(features, points, draws.times) - (noise - batch.actions)
        loss = metrics["constraint_weight"] * errors.square().mean() - values.mean()
        metrics["actor_loss"] = self._descend("actor_loss", loss, self.actor.optimizer)
        self._update_target(self.actor_target, self.actor, self.actor_tau)
        return metrics

    def _buffer_value_loss(self, batch: ReplayBufferSamples) -> th.Tensor:
        """
        :param batch: Sample of a replay buffer
        :return: A scalar: a high expectile of what the buffer's actions are worth is what a state is worth
        """
        with th.no_grad():
            outputs = self.policy.buffer_critic_target(batch.observations, batch.actions, raw=True)
        values = reduce_values(cast(th.Tensor, outputs), self.policy.critic_reduction)
        return maths.expectile_loss(values - self.policy.buffer_value(batch.observations), self.expectile)

    def _buffer_critic_loss(self, batch: ReplayBufferSamples) -> th.Tensor:
        """
        :param batch: Sample of a replay buffer
        :return: A scalar: rewards and the value of the next state
        """
        critic = self.policy.buffer_critic
        with th.no_grad():
            next_values = self.policy.buffer_value(batch.next_observations) * critic.scale
            target = batch.rewards + self._discounts(batch) * next_values
        outputs = critic(batch.observations, batch.actions, raw=True)
        loss, _ = critic.loss(cast(th.Tensor, outputs), target)
        return loss

    @th.no_grad()
    def _constraint_weight(self, batch: ReplayBufferSamples, values: th.Tensor) -> th.Tensor:
        """
        :param batch: Sample of a replay buffer
        :param values: Of the policy's actions, in units of the scale, shape (B,)
        :return: Mean weight of flow matching, a scalar
        """
        outputs = self.policy.buffer_critic(batch.observations, batch.actions, raw=True)
        of_buffer = reduce_values(cast(th.Tensor, outputs).squeeze(-1), self.policy.critic_reduction)
        return maths.constraint_weights(of_buffer - values, self.constraint_factor).mean()

    def _rescale(self, unit: float, factor: float) -> None:
        super()._rescale(unit, factor)
        for network in (self.policy.buffer_critic, self.policy.buffer_critic_target, self.policy.buffer_value):
            network.rescale(unit, factor)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [*super()._optimizers(), self.policy.buffer_critic.optimizer, self.policy.buffer_value.optimizer]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, _ = super()._get_torch_save_params()
        return [*state_dicts, "policy.buffer_critic.optimizer", "policy.buffer_value.optimizer"], []
