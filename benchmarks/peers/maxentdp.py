"""MaxEntDP: maximum-entropy reinforcement learning with a diffusion policy, by noise that is weighted by values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule

from sb3_mfpo.checks import check_integer, check_range
from sb3_mfpo.maths.boltzmann import gaussian_proposal, snis_mean
from sb3_mfpo.maths.categorical import reduce_values
from sb3_mfpo.maths.paths import interpolate
from sb3_mfpo.nets.layers import in_chunks
from sb3_mfpo.training.actor_critic import Metrics

from . import maths
from .common import DenoisingActor, PeerPolicy, SoftPeer

# Times of the levels 0 and T: neither the action nor wholly noise
FIRST_TIME, LAST_TIME = 0.001, 0.9946


class MaxEntDPActor(DenoisingActor):
    """
    The network is told the log-ratio of signal to noise.

    :param sampling_steps: Number T of steps
    :param kwargs: Those of ``ChainActor`` but ``times`` and ``n_draws``
    """

    def __init__(self, *, sampling_steps: int, **kwargs: Any):
        power = maths.cosine_power(th.linspace(FIRST_TIME, LAST_TIME, sampling_steps + 1, dtype=th.float64))
        powers = power.tolist()
        variances = maths.forward_variances(powers)
        super().__init__(powers=powers, variances=variances, times=power[1:].logit(), **kwargs)

    def predicted_noise(self, features: th.Tensor, noisy_actions: th.Tensor, power: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (..., features_dim)
        :param noisy_actions: shape (..., d)
        :param power: Power of the signal in them, in (0, 1), shape (..., 1)
        :return: shape (..., d)
        """
        return self.network(features, noisy_actions, self.embed(power.logit()))

    def log_prob(self, features: th.Tensor, actions: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (B, features_dim)
        :param actions: In [-1, 1], shape (B, d)
        :param noise: Standard-normal draws at every level, shape (B, T, n, d)
        :return: Estimate of their log-probability in nats, shape (B,)
        """
        power = noise.new_tensor(self.powers[1:])[:, None, None]
        embedding = self.embed(power.logit())
        noisy_actions = interpolate(actions[:, None, None], noise, power.sqrt(), (1 - power).sqrt())
        predicted = in_chunks(
            lambda features, points: self.network(features, points, embedding), features[:, None, None], noisy_actions
        )
        # The noise that leads from an action within the bounds
        within = maths.clean_action(noisy_actions, predicted, power)
        predicted = (noisy_actions - power.sqrt() * within) / (1 - power).sqrt()
        errors = (predicted - noise).square().sum(dim=-1).mean(dim=-1)
        return maths.log_prob_from_errors(errors, self.powers, actions.shape[-1])


class MaxEntDPPolicy(PeerPolicy):
    """
    :param args: Those of ``PeerPolicy``
    :param sampling_steps: Number T of steps from noise to action
    :param kwargs: Those of ``PeerPolicy``
    """

    actor: MaxEntDPActor
    actor_target: MaxEntDPActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *args: Any,
        sampling_steps: int = 20,
        **kwargs: Any,
    ):
        super().__init__(observation_space, action_space, lr_schedule, *args, sampling_steps=sampling_steps, **kwargs)
        self._build(lr_schedule)

    def make_actor(self, net_arch: Sequence[int]) -> MaxEntDPActor:
        return MaxEntDPActor(sampling_steps=self.sampling_steps, **self.actor_arguments(net_arch))


class MaxEntDPDraws(NamedTuple):
    """
    All randomness of a gradient step.

    ``next_noise``: of the next actions, standard normal, shape (B, noise_dim); ``entropy_noise``: of their log-probabilities,
    standard normal, shape (B, T, n, d); ``times``: of the regression, uniform between those of the chain's ends, shape (B, 1);
    ``noise``: that noisy actions are made with, standard normal, shape (B, d); ``proposals``: uniform in [0, 1), shape
    (B, K, d).
    """

    next_noise: th.Tensor
    entropy_noise: th.Tensor
    times: th.Tensor
    noise: th.Tensor
    proposals: th.Tensor


class MaxEntDP(SoftPeer):
    """
    Maximum Entropy Reinforcement Learning with Diffusion Policy (MaxEntDP), https://arxiv.org/abs/2502.11612, after the
    authors' code, https://github.com/diffusionyes/MaxEntDP.

    The policy predicts the noise in noisy actions, and acts in 20 denoising steps. It learns from many actions that could have
    led to a noisy one, weighted by the Boltzmann factor of their values. Log-probabilities are integrals over levels of noise.

    Departures from the official settings, all to hold equal what is not the method:

    - Critics: two of this package's C51 with its range and its start in place of scalar ones; LayerNorm.
    - Networks: GELU in place of Mish and ReLU, two layers of 256, and this package's embeddings, which for the log-ratio of
      signal to noise are the official kind with its own number of features; features of the noisy action beside it.
    - The actor's learning rate is constant in place of a cosine that ends after two million updates. 100 random steps by
      default in place of 10 000.
    - The best of ten for ``predict(deterministic=True)`` are ten fixed draws in place of fresh ones.

    The official temperature is fixed by task: HalfCheetah 0.2, Humanoid 0.02, Ant and Hopper 0.05, Walker2d and Swimmer 0.01;
    0.1 otherwise. With ``target_entropy`` it is learned as SAC's, which is ours. ``n_samples=48, n_entropy_draws=2`` is the
    budget of MFPO's paper.

    :param policy: The policy model to use, or its alias (MlpPolicy)
    :param env: The environment to learn from
    :param learning_rate: Learning rate of actor and critics
    :param args: Further arguments of SB3's ``OffPolicyAlgorithm``
    :param ent_coef: Temperature, above 0: in units of return, or of the returns' scale where it is learned
    :param target_entropy: What a learned temperature brings the entropy to, in nats per action coordinate (MFPO: -0.5). None
        fixes the temperature. The estimate of the entropy is too high for sharp policies, by about 0.3 nats there.
    :param ent_coef_learning_rate: Learning rate of a learned temperature
    :param n_samples: Number K of actions per state that are weighted
    :param n_entropy_draws: Number of draws per level and action for a log-probability
    :param critic_reduction: "min" or "mean" over the critics
    :param kwargs: Further arguments of ``ActorCriticAlgorithm``
    :raises ValueError: If an argument is out of range; the message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MaxEntDPPolicy}
    policy_base = MaxEntDPPolicy
    policy: MaxEntDPPolicy

    def __init__(
        self,
        policy: str | type[MaxEntDPPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        *args: Any,
        ent_coef: float = 0.1,
        target_entropy: float | None = None,
        ent_coef_learning_rate: float = 3e-4,
        n_samples: int = 500,
        n_entropy_draws: int = 50,
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
        self.n_samples = n_samples
        self.n_entropy_draws = n_entropy_draws
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        for name in ("n_samples", "n_entropy_draws"):
            check_integer(name, getattr(self, name), minimum=1)
        if self.target_entropy is not None:
            check_range("target_entropy", self.target_entropy)

    def _draw(self, batch_size: int) -> MaxEntDPDraws:
        d = get_action_dim(self.action_space)
        return MaxEntDPDraws(
            next_noise=self._normal(batch_size, self.actor.noise_dim),
            entropy_noise=self._normal(batch_size, self.policy.sampling_steps, self.n_entropy_draws, d),
            times=FIRST_TIME + (LAST_TIME - FIRST_TIME) * th.rand(batch_size, 1, device=self.device),
            noise=self._normal(batch_size, d),
            proposals=th.rand(batch_size, self.n_samples, d, device=self.device),
        )

    def _update(
        self, batch: ReplayBufferSamples, draws: MaxEntDPDraws, update_target: bool = True, improve_policy: bool = True
    ) -> Metrics:
        ent_coef = self._temperature()
        metrics = {"ent_coef": ent_coef}

        # Critics: regression on the soft Bellman target
        with th.no_grad():
            next_features = self.actor_target.encode(batch.next_observations)
            next_actions = self.actor_target.act(next_features, draws.next_noise)
            next_log_prob = self.actor_target.log_prob(next_features, next_actions, draws.entropy_noise)
        metrics["entropy"] = -next_log_prob.mean()
        loss, critic_metrics = self._td_loss(batch, next_actions, -ent_coef * next_log_prob.unsqueeze(1))
        metrics["critic_loss"] = self._descend("critic_loss", loss, self.critic.optimizer)
        metrics |= critic_metrics
        if update_target:
            self._update_target(self.critic_target, self.critic, self.tau)
        if not improve_policy:
            return metrics

        # Actor: the noise of the Boltzmann policy in noisy versions of the replay buffer's actions
        power = maths.cosine_power(draws.times)
        noisy_actions = interpolate(batch.actions, draws.noise, power.sqrt(), (1 - power).sqrt())
        noise, metrics["ess"] = self._boltzmann_noise(batch.observations, noisy_actions, power, draws.proposals, ent_coef)
        predicted = self.actor.predicted_noise(self.actor.encode(batch.observations), noisy_actions, power)
        metrics["actor_loss"] = self._descend("actor_loss", (predicted - noise).square().mean(), self.actor.optimizer)
        self._update_target(self.actor_target, self.actor, self.actor_tau)

        # Temperature, where it is learned: it rises when the entropy is below its target
        if self.target_entropy is not None:
            loss = self._temperature_loss(metrics["entropy"] - self.target_entropy * noise.shape[-1])
            metrics["ent_coef_loss"] = self._descend("ent_coef_loss", loss, self.temperature.optimizer)
        return metrics

    @th.no_grad()
    def _boltzmann_noise(
        self,
        observations: PyTorchObs,
        noisy_actions: th.Tensor,
        power: th.Tensor,
        proposals: th.Tensor,
        ent_coef: th.Tensor,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Mean noise in noisy actions if the actions were those of exp(Q / temperature), by self-normalised importance sampling.

        :param observations: Batch of observations
        :param noisy_actions: shape (B, d)
        :param power: Power of the signal in them, in (0, 1), shape (B, 1)
        :param proposals: Draws behind the actions that are weighted, in [0, 1), shape (B, K, d)
        :param ent_coef: Temperature in units of return
        :return: Noise, shape (B, d); mean effective sample size, a scalar
        """
        mu, sigma = power.sqrt(), (1 - power).sqrt()
        actions = gaussian_proposal(noisy_actions, mu, sigma, proposals)
        features = self.critic_target.encode(observations).unsqueeze(1)
        values = reduce_values(self.critic_target.q_values(features, actions), self.policy.critic_reduction)
        mean_action, sample_size = snis_mean((values / ent_coef).softmax(dim=1), actions)
        return (noisy_actions - mu * mean_action) / sigma, sample_size.mean()
