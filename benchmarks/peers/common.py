"""What the peers share: their policy around an actor of many steps, the denoising actor, a learned positive number."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples, Schedule
from torch import nn

from sb3_mfpo.checks import check_integer, check_range
from sb3_mfpo.maths.categorical import reduce_values
from sb3_mfpo.nets.actor import GenerativeActor
from sb3_mfpo.nets.flow import MeanFlowMLP
from sb3_mfpo.nets.layers import TanhGELU, in_chunks
from sb3_mfpo.training.actor_critic import ActorCriticAlgorithm, Metrics
from sb3_mfpo.training.policy import GenerativePolicy

from . import maths


class ChainActor(GenerativeActor):
    """
    Actor that goes from noise to an action in many steps of one network, with a draw at every step.

    :param network_arguments: Of the network, which is that of MFPO's and SOM's actors without the length of an interval
    :param times: What the network is told of the time at every step, from noise to action, shape (T,)
    :param n_draws: Number of standard-normal draws of d numbers that an action takes
    :param n_outputs: Number of outputs of d numbers that the network has
    :param kwargs: Those of ``GenerativeActor``
    """

    times: th.Tensor

    def __init__(
        self, *, network_arguments: dict[str, Any], times: th.Tensor, n_draws: int, n_outputs: int = 1, **kwargs: Any
    ):
        super().__init__(**kwargs)
        d = get_action_dim(self.action_space)
        features_dim = self.features_extractor.features_dim
        self.network = MeanFlowMLP(features_dim, d, n_outputs * d, **network_arguments, instantaneous=True)
        self.register_buffer("times", times.float(), persistent=False)
        self.n_draws, self.noise_dim = n_draws, n_draws * d

    def split(self, noise: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param noise: shape (..., noise_dim)
        :return: Its draws, each of shape (..., d)
        """
        return noise.chunk(self.n_draws, dim=-1)

    def on_chain(self, features: th.Tensor) -> maths.OnChain:
        """
        :param features: State features, shape (..., features_dim)
        :return: The network as a function of a point, shape (..., d), and of the index of the step
        """
        times = self.embed(self.times.unsqueeze(-1)).split(1)
        return lambda x, step: self.network(features, x, times[step])

    def embed(self, times: th.Tensor) -> th.Tensor:
        """
        :param times: What the network is told of the time, shape (..., 1)
        :return: Its embedding, shape (..., time_embedding_dim)
        """
        return self.network.embed(times, th.zeros_like(times))

    def act(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return in_chunks(self.chain, features, noise)

    @abstractmethod
    def chain(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        All steps for all rows at once, with gradient.

        :param features: State features, shape (B, ..., features_dim), broadcast against ``noise``
        :param noise: Standard-normal noise, shape (B, ..., noise_dim)
        :return: Actions in [-1, 1], shape (B, ..., d)
        """


class DenoisingActor(ChainActor):
    """
    Actor that predicts the noise in a noisy action, and takes ancestral steps.

    :param powers: Power of the signal at the levels 0 ... T
    :param variances: Variances of the noise that the steps add, for the levels 1 ... T
    :param times: What the network is told of the time at the levels 1 ... T, shape (T,)
    :param kwargs: Those of ``ChainActor`` but ``n_draws``
    """

    def __init__(self, *, powers: Sequence[float], variances: Sequence[float], times: th.Tensor, **kwargs: Any):
        super().__init__(times=times.flip(0), n_draws=len(variances), **kwargs)
        self.powers, self.variances = list(powers), list(variances)

    def chain(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return maths.ancestral_chain(self.on_chain(features), self.split(noise), self.powers, self.variances)


class PeerPolicy(GenerativePolicy):
    """
    Policy with a chain as actor, whose network has the defaults of MFPO's and SOM's. A peer's policy ends its constructor with
    ``_build``.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: Widths of the hidden layers
    :param activation_fn: Makes the activations
    :param layer_norm: Whether to use LayerNorm in all hidden layers
    :param sampling_steps: Number of steps from noise to action
    :param time_fourier_dim: Number of learned Fourier features of the time (even)
    :param time_embedding_dim: Size of its embedding
    :param action_fourier_dim: Number of fixed random Fourier features of the noisy action (even); 0 leaves it alone
    :param action_fourier_std: Standard deviation of their frequencies, in turns per unit of action
    :param kwargs: Further arguments of :class:`sb3_mfpo.training.policy.GenerativePolicy`
    :raises ValueError: If an argument is out of range; the message names it
    """

    actor: ChainActor
    actor_target: ChainActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: Callable[[], nn.Module] = TanhGELU,
        layer_norm: bool = True,
        *,
        sampling_steps: int,
        time_fourier_dim: int = 128,
        time_embedding_dim: int = 64,
        action_fourier_dim: int = 32,
        action_fourier_std: float = 0.5,
        **kwargs: Any,
    ):
        check_integer("sampling_steps", sampling_steps, minimum=1)
        super().__init__(observation_space, action_space, net_arch, activation_fn, layer_norm, **kwargs)
        self.sampling_steps = sampling_steps
        self.embedding: dict[str, Any] = dict(
            time_fourier_dim=time_fourier_dim,
            time_embedding_dim=time_embedding_dim,
            action_fourier_dim=action_fourier_dim,
            action_fourier_std=action_fourier_std,
        )

    def actor_arguments(self, net_arch: Sequence[int]) -> dict[str, Any]:
        """
        :param net_arch: Widths of the hidden layers
        :return: Arguments of ``ChainActor`` that do not depend on the chain
        """
        return dict(
            observation_space=self.observation_space,
            action_space=self.action_space,
            features_extractor=self.make_features_extractor(),
            normalize_images=self.normalize_images,
            network_arguments=dict(
                net_arch=net_arch, activation_fn=self.activation_fn, layer_norm=self.layer_norm, **self.embedding
            ),
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = dict(lr_schedule=self._dummy_schedule, sampling_steps=self.sampling_steps)
        return super()._get_constructor_parameters() | self.embedding | own


class PositiveNumber(nn.Module):
    """
    A positive number. Its logarithm is learned, at a rate of its own.

    :param value: What it starts from, above 0
    :param learning_rate: Of Adam
    """

    def __init__(self, value: float, learning_rate: float):
        super().__init__()
        self.log = nn.Parameter(th.tensor(math.log(value)))
        self.optimizer = th.optim.Adam([self.log], lr=learning_rate)

    def forward(self) -> th.Tensor:
        """
        :return: A scalar with gradient
        """
        return self.log.exp()


class Peer(ActorCriticAlgorithm):
    """
    Actor-critic with a chain as actor, which has no average: the actor itself acts.

    :param args: Those of ``ActorCriticAlgorithm``
    :param kwargs: Those of ``ActorCriticAlgorithm``
    """

    def _normal(self, *shape: int) -> th.Tensor:
        return th.randn(*shape, device=self.device)

    def _value(self, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param observations: Batch of observations
        :param actions: In [-1, 1], shape (B, d)
        :return: Their values by the critics, with a gradient for the actions alone, shape (B,)
        """
        with frozen(self.critic):
            values = self.critic.q_values(self.critic.encode(observations), actions)
        return reduce_values(values, self.policy.critic_reduction)


class SoftPeer(Peer):
    """
    Peer with a temperature.

    :param args: Those of ``ActorCriticAlgorithm``
    :param ent_coef: Temperature, above 0: where it is learned what it starts from, in units of the returns' scale, else in
        units of return
    :param learned: Whether it is learned
    :param ent_coef_learning_rate: Learning rate of its logarithm
    :param kwargs: Those of ``ActorCriticAlgorithm``
    """

    def __init__(self, *args: Any, ent_coef: float, learned: bool, ent_coef_learning_rate: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ent_coef = ent_coef
        self.learned = learned
        self.ent_coef_learning_rate = ent_coef_learning_rate

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_range("ent_coef", self.ent_coef, above=0)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.temperature = PositiveNumber(self.ent_coef, self.ent_coef_learning_rate).to(self.device)

    def _temperature(self) -> th.Tensor:
        """
        :return: Temperature in units of return, a scalar without gradient
        """
        temperature = self.temperature().detach()
        return temperature * self.critic.scale if self.learned else temperature

    def _temperature_loss(self, excess: th.Tensor) -> th.Tensor:
        """
        :param excess: By how much the entropy is above its target, in nats, a scalar without gradient
        :return: A scalar: SAC's loss
        """
        return self.temperature() * excess

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, _ = super()._get_torch_save_params()
        return [*state_dicts, "temperature", "temperature.optimizer"], []


class PathDraws(NamedTuple):
    """Randomness of a gradient step: noise of the next actions and of the policy's, standard normal, shape (B, noise_dim)."""

    next_noise: th.Tensor
    policy_noise: th.Tensor


class PathPeer(SoftPeer):
    """
    Soft actor-critic by gradients through the whole path of a chain, with a bound on the log-probability, or the path's own
    log-density, in its place. The actor's ``sample`` gives actions, that, and the cost of the path.

    :param args: Those of ``SoftPeer``
    :param kwargs: Those of ``SoftPeer``
    """

    # What the temperature brings the mean of a path's cost to, in nats per action coordinate; None fixes the temperature
    target_cost: float | None

    def _draw(self, batch_size: int) -> PathDraws:
        shape = batch_size, self.actor.noise_dim
        return PathDraws(next_noise=self._normal(*shape), policy_noise=self._normal(*shape))

    def _update(
        self, batch: ReplayBufferSamples, draws: PathDraws, update_target: bool = True, improve_policy: bool = True
    ) -> Metrics:
        ent_coef = self._temperature()
        metrics = {"ent_coef": ent_coef}

        # Critics: the path's log-density in place of the action's
        with th.no_grad():
            next_features = self.actor_target.encode(batch.next_observations)
            next_actions, next_log_prob, _ = self.actor_target.sample(next_features, draws.next_noise)
        loss, critic_metrics = self._td_loss(batch, next_actions, -ent_coef * next_log_prob.unsqueeze(1))
        metrics["critic_loss"] = self._descend("critic_loss", loss, self.critic.optimizer)
        metrics |= critic_metrics
        if update_target:
            self._update_target(self.critic_target, self.critic, self.tau)
        if not improve_policy:
            return metrics

        # Actor: values and entropy, by gradients through the whole path
        features = self.actor.encode(batch.observations)
        actions, log_prob, cost = self.actor.sample(features, draws.policy_noise)
        loss = (ent_coef * log_prob - self._value(batch.observations, actions)).mean() / self.critic.scale
        metrics["actor_loss"] = self._descend("actor_loss", loss, self.actor.optimizer)
        self._update_target(self.actor_target, self.actor, self.actor_tau)
        metrics["entropy"] = -log_prob.detach().mean()

        # Temperature: it rises when the cost of a path is above its target
        if self.target_cost is not None:
            loss = self._temperature_loss(self.target_cost * actions.shape[-1] - cost.detach().mean())
            metrics["ent_coef_loss"] = self._descend("ent_coef_loss", loss, self.temperature.optimizer)
        return metrics


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """
    Let what is computed within have no gradient for a network's parameters.

    :param network: Any module
    """
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
