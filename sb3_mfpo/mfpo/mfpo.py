"""Mean Flow Policy Optimization (MFPO) as a Stable-Baselines3 algorithm."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule

from sb3_mfpo.checks import check_integer, check_range
from sb3_mfpo.maths import boltzmann
from sb3_mfpo.maths.categorical import reduce_values
from sb3_mfpo.maths.divergence import hutchinson_divergence
from sb3_mfpo.maths.entropy import nearest_neighbour_entropy
from sb3_mfpo.maths.paths import interpolate, linear_path, linear_velocity
from sb3_mfpo.mfpo.policies import (
    AverageDivergenceNetwork,
    CnnPolicy,
    InstantaneousDivergence,
    MFPOPolicy,
    MlpPolicy,
    MultiInputPolicy,
)
from sb3_mfpo.training.actor_critic import Metrics
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm, MeanFlowDraws

# Standard deviation, in scaled actions, of a proposal around an action of the policy: about that of a good mode
LOCAL_STD = 0.1
# Nats per action coordinate between entropy and target from which on the temperature moves at its full rate
ENTROPY_BAND = 0.3


class GradientStepDraws(NamedTuple):
    """
    All randomness of one gradient step.

    ``next_noise``: starts the next actions, standard normal, shape (B, d); ``policy_noise``: starts the policy's proposals,
    standard normal, shape (B, max(K1, 1), d); ``local_noise``: starts the actions that local proposals surround, standard
    normal, shape (B, K3, d); ``uniform``: of the Gaussian and the local proposals, in [0, 1), shape (B, K2 + K3, d);
    ``probes``: Hutchinson probes with identity covariance, shape (N, B, d).
    """

    next_noise: th.Tensor
    policy_noise: th.Tensor
    local_noise: th.Tensor
    uniform: th.Tensor
    actor: MeanFlowDraws
    divergence: MeanFlowDraws
    probes: th.Tensor


class MFPO(MeanFlowAlgorithm):
    """
    Mean Flow Policy Optimization (MFPO)

    Maximum-entropy off-policy reinforcement learning with a policy that carries noise to actions in two steps of a learned
    average velocity field. A second network, the average divergence network (ADN), follows the log-probability along the
    same steps.

    Paper: https://arxiv.org/abs/2604.14698
    Authors' code: https://github.com/dongxiaoyi-xyz/MFPO

    The arguments up to ``_init_setup_model`` are those of SB3's ``SAC``, in the same order; MFPO's own follow by keyword.
    ``policy_kwargs`` hold the architecture, see :class:`sb3_mfpo.mfpo.policies.MFPOPolicy`.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str); a Box action space with finite bounds
    :param learning_rate: Learning rate of the critics; that of actor and divergence network is ``actor_rate`` times this, the
        temperature's ``ent_coef_rate`` times; it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: Size of the replay buffer, in transitions. Observations are kept in the environment's own type: wrapped
        in ``gymnasium.wrappers.DtypeObservation(env, np.float32)``, those of MuJoCo take half the memory.
    :param learning_starts: How many steps of uniformly random actions to collect before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: Soft update coefficient of the target critics ("Polyak update", in [0, 1]), by default twice SAC's
    :param gamma: Discount factor in [0, 1]
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit like
        ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``); ``-1`` does as many as
        steps were done in the environments during the rollout
    :param action_noise: Noise added to the actions during collection; None by default, the policy explores by itself
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``). If ``None``, it is selected
        automatically.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer at a cost of more complexity
    :param n_steps: When n_steps > 1, uses n-step returns (with the ``NStepReplayBuffer``)
    :param ent_coef: Temperature alpha > 0. ``"auto_0.01"`` learns it, from 0.01 scales of the returns (of 1 if ``v_min`` and
        ``v_max`` are given), ``"auto"`` from 1 as in SAC; a float fixes it, in units of return.
    :param target_update_interval: Update the target critics every so many gradient steps
    :param target_entropy: Entropy in nats of the scaled action that a learned temperature aims at; ``"auto_0.3"`` is -0.3
        times the number of action coordinates, and ``"auto"`` is ``"auto_0.5"`` (the paper's rho)
    :param use_sde: Not supported: gSDE perturbs the weights of a Gaussian policy's last layer, which a flow does not have
    :param sde_sample_freq: Without effect, for the sake of SAC's signature
    :param use_sde_at_warmup: Without effect, for the sake of SAC's signature
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average the reported
        success rate, mean episode length, and mean reward over
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug
        messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run. Setting it to auto, the code will be run on the
        GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param n_policy_samples: Number K1 of actions per state that the policy proposes to the velocity estimate, as in the paper
    :param n_gaussian_samples: Number K2 of actions per state from the truncated Gaussian proposal; 0 leaves the policy's
        proposal alone
    :param n_local_samples: Number K3 of actions per state that are near an action of the policy each, weighed together with
        the Gaussian's. The distances between K3 actions of the policy also give the entropy that a learned temperature
        follows; the divergence network's is taken where it is lower, and alone with 0, as in the paper.
    :param n_probes: Number N of Hutchinson probes of the divergence
    :param ent_coef_rate: By how many times ``learning_rate`` an update changes the logarithm of a learned temperature, where
        the entropy is 0.3 nats per action coordinate or more from its target; in proportion where it is closer, and downwards
        also where the velocity estimate rests on fewer than two proposals (an effective sample size below 2). ``None``
        takes a step of Adam down SAC's loss, as in the paper: one length everywhere, so that the entropy swings.
    :param actor_rate: By how many times ``learning_rate`` actor and divergence network learn, above 0; they learn seldom
        (``policy_delay``). 1 in the paper.
    :param actor_tau: Soft update coefficient in (0, 1] of the target actor, which acts; 1 makes it the actor itself, as in the
        paper
    :param intervals: Time intervals that the flow is trained on: those of the sampler's steps ("grid"), which suit
        ``sampling_steps``, or "any", as in the paper, which suits every number of steps
    :param equal_time_share: Share in [0, 1] of a batch with r = t, that is of plain flow matching
    :param uniform_time_share: Share in [0, 1] of times that are uniform; the others are logit-normal
    :param time_mean: Mean of the normal distribution inside the logit-normal distribution of times
    :param time_std: Its standard deviation
    :param critic_reduction: "min" or "mean" over the critics, in targets, velocity estimate and choice of action. (The paper
        takes "min" except for HalfCheetah.)
    :param policy_delay: Update actor, divergence network and temperature every so many gradient steps
    :param compile_step: Whether to compile the gradient step with ``torch.compile``, which on a CUDA device also captures its
        parts into CUDA graphs. The first steps then take a minute; the results are the same up to rounding.
    :param allow_non_finite_observations: Whether observations may hold NaN or infinite numbers, which the features extractor
        must then replace; by default they stop the training. Rewards and actions must be finite in any case.
    :raises ValueError: If an argument is out of range; the message names it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy_base = MFPOPolicy
    policy: MFPOPolicy

    # The paper's settings, where they differ: `MFPO("MlpPolicy", env, **MFPO.PAPER)`
    PAPER: ClassVar[dict[str, Any]] = dict(
        tau=0.005,
        n_policy_samples=16,
        n_gaussian_samples=32,
        n_local_samples=0,
        ent_coef_rate=None,
        actor_rate=1.0,
        actor_tau=1.0,
        policy_delay=1,
        intervals="any",
        equal_time_share=0.75,
        uniform_time_share=0.0,
        policy_kwargs=dict(
            net_arch=[256, 256, 256],
            action_fourier_dim=0,
            sampling_power=1.0,
            v_min=-1600.0,
            v_max=1600.0,
            value_init="uniform",
        ),
    )

    def __init__(
        self,
        policy: str | type[MFPOPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.01,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto_0.01",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        n_policy_samples: int = 0,
        n_gaussian_samples: int = 6,
        n_local_samples: int = 6,
        n_probes: int = 2,
        ent_coef_rate: float | None = 12.0,
        actor_rate: float = 3.0,
        actor_tau: float = 0.04,
        intervals: str = "grid",
        equal_time_share: float = 0.5,
        uniform_time_share: float = 0.5,
        time_mean: float = -0.4,
        time_std: float = 1.0,
        critic_reduction: str = "min",
        policy_delay: int = 8,
        compile_step: bool = False,
        allow_non_finite_observations: bool = False,
    ):
        if use_sde:
            raise ValueError(
                "`use_sde=True` is not supported: gSDE has no meaning for a flow policy, which explores by itself. Remove the "
                "argument, or use `action_noise` for more exploration."
            )
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            actor_rate=actor_rate,
            actor_tau=actor_tau,
            target_update_interval=target_update_interval,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            intervals=intervals,
            equal_time_share=equal_time_share,
            uniform_time_share=uniform_time_share,
            time_mean=time_mean,
            time_std=time_std,
            critic_reduction=critic_reduction,
            policy_delay=policy_delay,
            compile_step=compile_step,
            allow_non_finite_observations=allow_non_finite_observations,
        )
        self.ent_coef = ent_coef
        self.target_entropy = target_entropy
        self.n_policy_samples = n_policy_samples
        self.n_gaussian_samples = n_gaussian_samples
        self.n_local_samples = n_local_samples
        self.n_probes = n_probes
        self.ent_coef_rate = ent_coef_rate
        self.log_ent_coef: th.Tensor | None = None
        self.ent_coef_optimizer: th.optim.Optimizer | None = None

        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_integer("n_probes", self.n_probes, minimum=1)
        for name in ("n_policy_samples", "n_gaussian_samples", "n_local_samples"):
            check_integer(name, getattr(self, name), minimum=0)
        if self.n_policy_samples + self.n_gaussian_samples == 0:
            raise ValueError("`n_policy_samples` and `n_gaussian_samples` are both 0: the velocity estimate needs a proposal.")
        if self.n_local_samples > 0 and self.n_gaussian_samples == 0:
            raise ValueError(
                f"`n_local_samples={self.n_local_samples}` needs `n_gaussian_samples` above 0: local proposals see modes that "
                "the policy has."
            )
        if self.n_local_samples == 1:
            raise ValueError(
                "`n_local_samples` must be 0 or at least 2, not 1: the policy's entropy is estimated from the distances "
                "between the actions that they surround."
            )
        if self.ent_coef_rate is not None:
            check_range("ent_coef_rate", self.ent_coef_rate, above=0)
        parse_ent_coef(self.ent_coef)
        parse_target_entropy(self.target_entropy, self.action_space)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.target_entropy = parse_target_entropy(self.target_entropy, self.action_space)
        value, learned = parse_ent_coef(self.ent_coef)
        if learned:
            # The logarithm is learned, so that the temperature stays positive
            self.log_ent_coef = th.log(th.ones(1, device=self.device) * value).requires_grad_(True)
            self.ent_coef_optimizer = self._make_ent_coef_optimizer(self.log_ent_coef)
        else:
            self.ent_coef_tensor = th.tensor(value, device=self.device)

    def _make_ent_coef_optimizer(self, log_ent_coef: th.Tensor) -> th.optim.Optimizer:
        optimizer_class, rate = (th.optim.Adam, 1.0) if self.ent_coef_rate is None else (th.optim.SGD, self.ent_coef_rate)
        return optimizer_class([log_ent_coef], lr=rate * self.lr_schedule(1), fused=True)

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        super().set_parameters(*args, **kwargs)
        optimizer = self.ent_coef_optimizer
        # It may have got the state of another kind, of a model with another kind of `ent_coef_rate`
        if optimizer is not None and optimizer.param_groups[0].keys() != {"params", *optimizer.defaults}:
            assert self.log_ent_coef is not None
            self.ent_coef_optimizer = self._make_ent_coef_optimizer(self.log_ent_coef)

    @property
    def divergence(self) -> AverageDivergenceNetwork | InstantaneousDivergence:
        """The policy's divergence network."""
        return self.policy.divergence

    def _optimizers(self) -> list[th.optim.Optimizer]:
        optimizers = super()._optimizers()
        if isinstance(self.divergence, AverageDivergenceNetwork):
            optimizers.append(self.divergence.optimizer)
        if self.ent_coef_optimizer is not None:
            optimizers.append(self.ent_coef_optimizer)
        return optimizers

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        if isinstance(self.divergence, AverageDivergenceNetwork):
            self._set_rate(self.divergence.optimizer, self.actor_rate)
        if self.ent_coef_optimizer is not None and self.ent_coef_rate is not None:
            self._set_rate(self.ent_coef_optimizer, self.ent_coef_rate)

    def _draw(self, batch_size: int) -> GradientStepDraws:
        d, n_policy = get_action_dim(self.action_space), max(self.n_policy_samples, 1)
        strata = [self._stratified(batch_size, n, d) for n in (self.n_gaussian_samples, self.n_local_samples)]
        return GradientStepDraws(
            next_noise=self._normal(batch_size, d),
            policy_noise=self._normal(batch_size, n_policy, d),
            local_noise=self._normal(batch_size, self.n_local_samples, d),
            uniform=th.cat(strata, dim=1),
            actor=self._draw_regression(batch_size, self.policy.actor_type),
            divergence=self._draw_regression(batch_size, self.policy.divergence_type),
            # Signs: of all probes with identity covariance they vary the least
            probes=self._normal(self.n_probes, batch_size, d).sign(),
        )

    def _update(
        self, batch: ReplayBufferSamples, draws: GradientStepDraws, update_target: bool = True, improve_policy: bool = True
    ) -> Metrics:
        """
        Algorithm 3 of the paper; the order of the updates is that of the authors' code.

        :param batch: Sample of a replay buffer
        :param draws: The step's randomness
        :param update_target: Whether the target critics follow
        :param improve_policy: Whether to update actor, divergence network and temperature
        :return: Quantities to log by name, scalars without gradient
        """
        ent_coef = self._temperature()
        metrics = {"ent_coef": ent_coef}

        # Critics: regression on the soft Bellman target (Eq. 29)
        with th.no_grad():
            next_features = self.actor_target.encode(batch.next_observations)
            next_actions, next_log_prob = self.policy.sample(next_features, draws.next_noise)
            entropy_bonus = -ent_coef * next_log_prob.unsqueeze(1)
        critic_loss, critic_metrics = self._td_loss(batch, next_actions, entropy_bonus)
        metrics["critic_loss"] = self._descend("critic_loss", critic_loss, self.critic.optimizer)
        metrics |= critic_metrics
        if update_target:
            self._update_target(self.critic_target, self.critic, self.tau)
        if not improve_policy:
            return metrics

        # Proposals: samples of the policy
        with th.no_grad():
            features = self.actor_target.encode(batch.observations)
            actions, log_prob = self.policy.sample(features.unsqueeze(1), draws.policy_noise)
            centres, metrics["entropy"] = self._centres(features, actions[:, :1], log_prob, draws.local_noise)

        # Velocity field of the Boltzmann policy, at a point on the path from the first of them (Eq. 19-27)
        t = draws.actor.t
        noisy_actions = interpolate(actions[:, 0], draws.actor.noise, *linear_path(t))
        velocity, velocity_metrics = self._boltzmann_velocity(
            batch.observations, actions, log_prob, centres, noisy_actions, t, draws.uniform, ent_coef
        )
        metrics |= velocity_metrics

        # Actor: mean-flow regression on this velocity (Eq. 28)
        features = self.actor.encode(batch.observations)
        errors = self._regression_errors(self.actor, features, noisy_actions, draws.actor, velocity, velocity)
        metrics["actor_loss"] = self._descend("actor_loss", errors.square().mean(), self.actor.optimizer)
        self._update_target(self.actor_target, self.actor, self.actor_tau)

        # Divergence network: mean-flow regression on the divergence of the policy's velocity (Eq. 12-18)
        if isinstance(self.divergence, AverageDivergenceNetwork):
            loss = self._divergence_loss(self.divergence, batch.observations, actions[:, 0], draws)
            metrics["divergence_loss"] = self._descend("divergence_loss", loss, self.divergence.optimizer)

        # Temperature: it rises when the entropy is below its target (Eq. 30)
        if self.ent_coef_optimizer is not None:
            sample_size = th.stack([size for name, size in velocity_metrics.items() if name.startswith("ess_")]).amax()
            loss = self._temperature_loss(metrics["entropy"], sample_size, actions.shape[-1])
            metrics["ent_coef_loss"] = self._descend("ent_coef_loss", loss, self.ent_coef_optimizer)
        return metrics

    def _centres(
        self, features: th.Tensor, action: th.Tensor, log_prob: th.Tensor, noise: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Actions of the policy that local proposals surround, and the policy's entropy before actions are clipped, the lower of
        two estimates that err upwards: the divergence network's where the policy is sharp, that of nearest neighbours where it
        has many coordinates.

        :param features: The target actor's state features, shape (B, features_dim)
        :param action: The action that a_t is made from, shape (B, 1, d)
        :param log_prob: Log-probabilities by the divergence network in nats, shape (B, max(K1, 1))
        :param noise: Standard-normal noise that K3 actions start from, shape (B, K3, d)
        :return: The action and K3 - 1 others, shape (B, max(K3, 1), d); mean entropy in nats, a scalar
        """
        entropy = -log_prob.mean()
        if self.n_local_samples == 0:
            return action, entropy
        samples = self.actor_target.flow(features.unsqueeze(1), noise)
        centres = th.cat([action, samples[:, 1:].clamp(-1, 1)], dim=1)
        return centres, th.minimum(entropy, nearest_neighbour_entropy(samples).mean())

    def _divergence_loss(
        self, network: AverageDivergenceNetwork, observations: PyTorchObs, actions: th.Tensor, draws: GradientStepDraws
    ) -> th.Tensor:
        """
        :param network: The divergence network
        :param observations: Batch of observations
        :param actions: Samples of the policy that a_t is made from, shape (B, d)
        :param draws: The step's randomness
        :return: Mean squared error of the divergence network's MeanFlow identity, a scalar
        """
        t = draws.divergence.t
        noisy_actions = interpolate(actions, draws.divergence.noise, *linear_path(t))
        with th.no_grad():
            features = self.actor_target.encode(observations)
            velocity, jacobian_product = self.actor_target.linearize_velocity(features, noisy_actions, t)
            divergence = hutchinson_divergence(draws.probes, jacobian_product(draws.probes))
        errors = self._regression_errors(network, features, noisy_actions, draws.divergence, velocity, divergence)
        return errors.square().mean()

    def _temperature_loss(self, entropy: th.Tensor, sample_size: th.Tensor, d: int) -> th.Tensor:
        """
        :param entropy: Of the policy in nats, a scalar
        :param sample_size: Mean effective sample size of the velocity estimate, at least 1, a scalar
        :param d: Number of action coordinates
        :return: A scalar: SAC's loss (Eq. 30) for Adam; or one whose gradient is the distance from the target in bands of
            ``ENTROPY_BAND`` nats per coordinate, at most 1, and downwards at most ``sample_size - 1``, for plain steps
        """
        assert self.log_ent_coef is not None
        excess = entropy - float(self.target_entropy)
        if self.ent_coef_rate is None:
            return (self.log_ent_coef.exp() * excess).mean()
        # Where one proposal has all the weight, a lower temperature makes the policy no sharper; it only falls too far, until
        # the policy follows the critics' errors
        step = (excess / (ENTROPY_BAND * d)).clamp(-1, 1).minimum(sample_size - 1)
        return (self.log_ent_coef * step).mean()

    def _temperature(self) -> th.Tensor:
        if self.log_ent_coef is None:
            return self.ent_coef_tensor
        return self.log_ent_coef.detach().exp().squeeze() * self.critic.scale

    @th.no_grad()
    def _boltzmann_velocity(
        self,
        observations: PyTorchObs,
        actions: th.Tensor,
        log_prob: th.Tensor,
        centres: th.Tensor,
        noisy_actions: th.Tensor,
        t: th.Tensor,
        uniform: th.Tensor,
        ent_coef: th.Tensor,
    ) -> tuple[th.Tensor, Metrics]:
        """
        Velocity field of exp(Q / alpha), by importance sampling (Eq. 19-27; the local proposals are ours).

        :param observations: Batch of observations
        :param actions: Samples of the policy, shape (B, max(K1, 1), d)
        :param log_prob: Their log-probabilities, shape (B, max(K1, 1))
        :param centres: Samples of the policy that local proposals surround, shape (B, max(K3, 1), d)
        :param noisy_actions: a_t, shape (B, d)
        :param t: Time in (0, 1), shape (B, 1)
        :param uniform: Draws behind the Gaussian and the local proposals, shape (B, K2 + K3, d)
        :param ent_coef: Temperature
        :return: Velocity, shape (B, d); quantities to log
        """
        policy_actions, policy_log_prob = actions[:, : self.n_policy_samples], log_prob[:, : self.n_policy_samples]
        gaussian_actions, gaussian_log_weights = self._gaussian_proposals(noisy_actions, centres, t, uniform)
        # Values, of all proposals in one pass
        features = self.critic.encode(observations).unsqueeze(1)
        q_values = reduce_values(
            self.critic.q_values(features, th.cat([policy_actions, gaussian_actions], dim=1)), self.policy.critic_reduction
        )
        policy_q, gaussian_q = q_values.split([policy_actions.shape[1], gaussian_actions.shape[1]], dim=1)
        # Weights, of the policy's samples by themselves, of the others together
        proposals = {}
        if self.n_policy_samples > 0:
            log_weights = boltzmann.policy_log_weights(policy_q, policy_log_prob, policy_actions, noisy_actions, t, ent_coef)
            proposals["policy"] = (log_weights, policy_actions)
        if self.n_gaussian_samples > 0:
            proposals["gaussian"] = (gaussian_q / ent_coef + gaussian_log_weights, gaussian_actions)
        # Self-normalised estimates of E[a_0 | a_t], and their mean by effective sample size
        estimates = {
            name: boltzmann.snis_mean(log_weights.softmax(dim=1), samples)
            for name, (log_weights, samples) in proposals.items()
        }
        mean_action, shares = boltzmann.combine_by_sample_size(*zip(*estimates.values(), strict=True))
        metrics = {f"ess_{name}": size.mean() for name, (_, size) in estimates.items()}
        if "policy" in proposals:
            metrics["policy_proposal_weight"] = shares[0].mean()
        return linear_velocity(noisy_actions, mean_action, t), metrics

    def _gaussian_proposals(
        self, noisy_actions: th.Tensor, centres: th.Tensor, t: th.Tensor, uniform: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor | float]:
        """
        Proposals around where a_t points to and, which follow the policy where actions have many coordinates, one around each
        of several actions of the policy.

        :param noisy_actions: a_t, shape (B, d)
        :param centres: Actions of the policy, shape (B, max(K3, 1), d)
        :param t: Time in (0, 1), shape (B, 1)
        :param uniform: Draws behind the proposals, shape (B, K2 + K3, d)
        :return: Actions, shape (B, K2 + K3, d); their log-weights but for Q / alpha, shape (B, K2 + K3), or 0 if there are no
            local proposals
        """
        gaussian = (noisy_actions, *linear_path(t))
        if self.n_local_samples == 0:
            return boltzmann.gaussian_proposal(*gaussian, uniform), 0.0
        local = (centres, th.ones_like(t[:1]), th.full_like(t[:1], LOCAL_STD))
        of_gaussian = boltzmann.gaussian_proposal(*gaussian, uniform[:, : self.n_gaussian_samples])
        of_local = boltzmann.gaussian_proposal(*local, uniform[:, self.n_gaussian_samples :].unsqueeze(2)).squeeze(2)
        actions = th.cat([of_gaussian, of_local], dim=1)
        log_probs = [
            boltzmann.gaussian_log_prob(actions, *gaussian).unsqueeze(1),
            boltzmann.gaussian_log_prob(actions.unsqueeze(1), *local),
        ]
        return actions, boltzmann.mixture_log_weights(log_probs, [self.n_gaussian_samples, 1])

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, _ = super()._get_torch_save_params()
        if isinstance(self.divergence, AverageDivergenceNetwork):
            state_dicts.append("divergence.optimizer")
        if self.ent_coef_optimizer is None:
            return state_dicts, ["ent_coef_tensor"]
        return [*state_dicts, "ent_coef_optimizer"], ["log_ent_coef"]


def parse_ent_coef(ent_coef: str | float) -> tuple[float, bool]:
    """
    :param ent_coef: "auto", "auto_<initial value>", or a number
    :return: The (initial) temperature, and whether it is learned
    :raises ValueError: If it is none of these, or not positive
    """
    text = str(ent_coef)
    learned = text.startswith("auto")
    try:
        value = 1.0 if text == "auto" else float(text.removeprefix("auto_"))
    except ValueError:
        value = np.nan
    if not 0 < value < np.inf:
        raise ValueError(
            f'`ent_coef` must be "auto", "auto_<initial value>" such as "auto_0.01", or a positive number (the policy '
            f"improvement divides by it), not {ent_coef!r}."
        )
    return value, learned


def parse_target_entropy(target_entropy: str | float, action_space: spaces.Space) -> float:
    """
    :param target_entropy: "auto", "auto_<rho>", or a number
    :param action_space: Box action space
    :return: Target entropy in nats
    :raises ValueError: If it is none of these
    """
    text = str(target_entropy)
    try:
        value = float("0.5" if text == "auto" else text.removeprefix("auto_"))
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(
            '`target_entropy` must be "auto", "auto_<rho>" such as "auto_0.5" for -0.5 nats per action coordinate, or a '
            f"finite number of nats, not {target_entropy!r}."
        )
    return -value * get_action_dim(action_space) if text.startswith("auto") else value
