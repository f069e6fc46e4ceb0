"""DACER: a diffusion policy by gradients of values through its whole chain, with noise that follows an entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule

from sb3_mfpo.checks import check_integer, check_range
from sb3_mfpo.training.actor_critic import Metrics

from . import maths
from .common import DenoisingActor, Peer, PeerPolicy, PositiveNumber


class DACERPolicy(PeerPolicy):
    """
    The chain's action, and noise on it that has a learned scale. Candidates for the best action have no such noise.

    :param args: Those of ``PeerPolicy``
    :param sampling_steps: Number T of steps from noise to action
    :param noise_factor: Standard deviation of the noise is this times its learned scale
    :param noise_scale: What the scale starts from, above 0
    :param noise_learning_rate: Learning rate of its logarithm
    :param kwargs: Those of ``PeerPolicy``
    """

    actor: DenoisingActor
    actor_target: DenoisingActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *args: Any,
        sampling_steps: int = 20,
        noise_factor: float = 0.1,
        noise_scale: float = 3.0,
        noise_learning_rate: float = 0.03,
        **kwargs: Any,
    ):
        check_range("noise_factor", noise_factor, low=0)
        check_range("noise_scale", noise_scale, above=0)
        super().__init__(observation_space, action_space, lr_schedule, *args, sampling_steps=sampling_steps, **kwargs)
        self.noise_arguments = dict(
            noise_factor=noise_factor, noise_scale=noise_scale, noise_learning_rate=noise_learning_rate
        )
        self._build(lr_schedule)
        self.noise_scale = PositiveNumber(noise_scale, noise_learning_rate).to(self.device)

    def make_actor(self, net_arch: Sequence[int]) -> DenoisingActor:
        powers = maths.variance_preserving_powers(self.sampling_steps)
        times = th.arange(1, self.sampling_steps + 1) / self.sampling_steps
        variances = maths.posterior_variances(powers)
        return DenoisingActor(powers=powers, variances=variances, times=times, **self.actor_arguments(net_arch))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self.noise_arguments

    def explore(self, actions: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        :param actions: The chain's, shape (..., d)
        :param noise: Standard normal, shape (..., d)
        :return: Noisy actions in [-1, 1], shape (..., d), with a gradient for the actions alone, none where a bound is passed
        """
        return (actions + self.noise_arguments["noise_factor"] * self.noise_scale().detach() * noise).clamp(-1, 1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        actions = super()._predict(observation, deterministic)
        return actions if deterministic else self.explore(actions, th.randn_like(actions))


class DACERDraws(NamedTuple):
    """
    All randomness of a gradient step, standard normal.

    ``next_noise`` and ``policy_noise``: of the chains, shape (B, noise_dim); ``next_added`` and ``policy_added``: on their
    actions, shape (B, d); ``entropy_noise`` and ``entropy_added``: the same for the actions by which the entropy is measured,
    shapes (B, n, noise_dim) and (B, n, d), None where it is not.
    """

    next_noise: th.Tensor
    next_added: th.Tensor
    policy_noise: th.Tensor
    policy_added: th.Tensor
    entropy_noise: th.Tensor | None
    entropy_added: th.Tensor | None


class DACER(Peer):
    """
    Diffusion Actor-Critic with Entropy Regulator (DACER), https://arxiv.org/abs/2405.15177, after the authors' code,
    https://github.com/happy-yan/DACER-Diffusion-with-Online-RL.

    The policy predicts the noise in noisy actions, and acts in 20 denoising steps, with noise on the last. It learns by
    gradients of values through all of them. Nothing rewards entropy: every 10 000 updates, mixtures of three Gaussians that
    are fitted to its actions tell an entropy, and the scale of the noise takes one step towards its target.

    Departures from the official settings, all to hold equal what is not the method:

    - Critics: two of this package's C51 with its range and its start in place of Gaussian ones (DSAC-T), no reward scale of
      0.2; two layers of 256 with LayerNorm and GELU in place of three with Mish.
    - Actor: this package's layers and embeddings of time and action in place of Mish and fixed sinusoids.
    - Learning rate 3e-4 in place of 1e-4; policy and targets at every update in place of every second; one update per step of
      one environment in place of one per 20 steps of 20 environments; 100 random steps by default in place of 30 000 and more.
    - ``predict(deterministic=True)`` takes the best of ten candidates without the added noise; the official code takes a
      single one, with draws made from the observation.
    - The mixtures are fitted by expectation maximisation from three samples in place of k-means, in one batch; the first are
      fitted after 10 000 updates in place of before the first.

    :param policy: The policy model to use, or its alias (MlpPolicy)
    :param env: The environment to learn from
    :param learning_rate: Learning rate of actor and critics
    :param args: Further arguments of SB3's ``OffPolicyAlgorithm``
    :param target_entropy: What the scale of the noise brings the entropy to, in nats per action coordinate
    :param entropy_interval: Number of updates from one step of the scale to the next
    :param n_entropy_samples: Number of actions per state that a mixture is fitted to
    :param critic_reduction: "min" or "mean" over the critics
    :param kwargs: Further arguments of ``ActorCriticAlgorithm``
    :raises ValueError: If an argument is out of range; the message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": DACERPolicy}
    policy_base = DACERPolicy
    policy: DACERPolicy

    def __init__(
        self,
        policy: str | type[DACERPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        *args: Any,
        target_entropy: float = -0.9,
        entropy_interval: int = 10_000,
        n_entropy_samples: int = 200,
        critic_reduction: str = "min",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ):
        super().__init__(policy, env, learning_rate, *args, critic_reduction=critic_reduction, **kwargs)
        self.target_entropy = target_entropy
        self.entropy_interval = entropy_interval
        self.n_entropy_samples = n_entropy_samples
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_range("target_entropy", self.target_entropy)
        check_integer("entropy_interval", self.entropy_interval, minimum=1)
        check_integer("n_entropy_samples", self.n_entropy_samples, minimum=3)

    def _draw(self, batch_size: int) -> DACERDraws:
        d, length, n = get_action_dim(self.action_space), self.actor.noise_dim, self.n_entropy_samples
        due = self._n_updates % self.entropy_interval == 0
        return DACERDraws(
            next_noise=self._normal(batch_size, length),
            next_added=self._normal(batch_size, d),
            policy_noise=self._normal(batch_size, length),
            policy_added=self._normal(batch_size, d),
            entropy_noise=self._normal(batch_size, n, length) if due else None,
            entropy_added=self._normal(batch_size, n, d) if due else None,
        )

    def _update(
        self, batch: ReplayBufferSamples, draws: DACERDraws, update_target: bool = True, improve_policy: bool = True
    ) -> Metrics:
        metrics: Metrics = {"noise_scale": self.policy.noise_scale().detach()}
        with th.no_grad():
            next_actions = self.policy.act(self.actor_target.encode(batch.next_observations), draws.next_noise)
            next_actions = self.policy.explore(next_actions, draws.next_added)

        # Actor: values of the critics as they are before their own update, by gradients through the whole chain
        if improve_policy:
            actions = self.actor.act(self.actor.encode(batch.observations), draws.policy_noise)
            actions = self.policy.explore(actions, draws.policy_added)
            loss = -self._value(batch.observations, actions).mean()
            metrics["actor_loss"] = self._descend("actor_loss", loss, self.actor.optimizer)

        # Critics: no bonus on the entropy
        loss, critic_metrics = self._td_loss(batch, next_actions, entropy_bonus=next_actions.new_zeros(()))
        metrics["critic_loss"] = self._descend("critic_loss", loss, self.critic.optimizer)
        metrics |= critic_metrics
        if update_target:
            self._update_target(self.critic_target, self.critic, self.tau)

        # Noise: its scale falls when the entropy is above its target
        if draws.entropy_noise is not None and draws.entropy_added is not None:
            with th.no_grad():
                features = self.actor_target.encode(batch.observations).unsqueeze(1)
                samples = self.policy.explore(self.policy.act(features, draws.entropy_noise), draws.entropy_added)
                metrics["entropy"] = maths.mixture_entropy(samples).mean()
            loss = self.policy.noise_scale.log * (metrics["entropy"] - self.target_entropy * samples.shape[-1])
            metrics["noise_loss"] = self._descend("noise_loss", loss, self.policy.noise_scale.optimizer)
        self._update_target(self.actor_target, self.actor, self.actor_tau)
        return metrics

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, _ = super()._get_torch_save_params()
        return [*state_dicts, "policy.noise_scale.optimizer"], []
