"""Score-based One-step MeanFlow policy optimization (SOM) as a Stable-Baselines3 algorithm."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, ReplayBufferSamples, Schedule

from sb3_mfpo.checks import check_choice, check_integer, check_range
from sb3_mfpo.maths import boltzmann, mean_flow, paths
from sb3_mfpo.maths.categorical import reduce_values
from sb3_mfpo.nets.layers import in_chunks
from sb3_mfpo.som.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SOMPolicy
from sb3_mfpo.training.actor_critic import Metrics
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm, MeanFlowDraws

# The path's mu_t and sigma_t, and the velocity of its flow from the posterior mean
PATHS = {
    "linear": (paths.linear_path, paths.linear_velocity),
    "vp": (paths.variance_preserving_path, paths.variance_preserving_velocity),
}
SCORE_ESTIMATORS = ("posterior_mean", "gradient")


class GradientStepDraws(NamedTuple):
    """
    All randomness of one gradient step.

    ``next_noise`` and ``policy_noise``: start the next actions and those on whose paths the flow is learned, standard normal,
    shape (B, d); ``proposals``: of the score's estimate, in [0, 1) and stratified for the posterior mean, else standard
    normal, shape (B, K, d).
    """

    next_noise: th.Tensor
    policy_noise: th.Tensor
    proposals: th.Tensor
    actor: MeanFlowDraws


class SOM(MeanFlowAlgorithm):
    """
    Score-based One-step MeanFlow policy optimization (SOM)

    Off-policy reinforcement learning with a policy that carries noise to actions in a single step. It is learned from the
    critics: their values give the score of the noisy actions of the Boltzmann policy exp(Q / temperature), the score gives the
    velocity of the probability flow, and the MeanFlow identity makes of it the average velocity over the whole way.

    Paper: https://arxiv.org/abs/2605.23365. The defaults depart from it where its form was found to fail on densities with
    known scores: linear path in place of a variance-preserving one, score by the posterior mean of the bounded actions, not by
    gradients, no normalisation of the score, plain loss. Every one of these can be switched.

    The arguments up to ``_init_setup_model`` are those of SB3's ``TD3`` but for its target policy's noise, in the same order;
    SOM's own follow by keyword. ``policy_kwargs`` hold the architecture, see :class:`sb3_mfpo.som.policies.SOMPolicy`.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str); a Box action space with finite bounds
    :param learning_rate: Learning rate of the critics, the actor's is ``actor_rate`` times this; it can be a function of the
        current progress remaining (from 1 to 0)
    :param buffer_size: Size of the replay buffer, in transitions. Observations are kept in the environment's own type: wrapped
        in ``gymnasium.wrappers.DtypeObservation(env, np.float32)``, those of MuJoCo take half the memory.
    :param learning_starts: How many steps of uniformly random actions to collect before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: Soft update coefficient of the target critics ("Polyak update", in [0, 1]), by default twice TD3's
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
    :param policy_delay: Update the actor every so many gradient steps
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
    :param target_update_interval: Update the target critics every so many gradient steps
    :param inverse_temperature: How sharply the policy prefers high values, above 0: per standard deviation of the values if
        these are normalised, else per unit of return
    :param normalize_q: Whether to divide values by their standard deviation over the batch's proposals, so that one inverse
        temperature serves every scale of rewards
    :param n_samples: Number K of actions per state from which the score is estimated
    :param score_estimator: "posterior_mean" (of actions within the bounds) or "gradient" (of the critics at unbounded
        actions, as stated in the paper)
    :param score_norm: Length w that all scores are normalised to, as stated in the paper; None leaves them as they are
    :param path: Path from actions to noise, "linear" or "vp" (variance-preserving, as stated in the paper)
    :param adaptive_loss: Whether to weight each state's squared error by 1 / (its sum + 0.001), as stated in the paper
    :param actor_rate: By how many times ``learning_rate`` the actor learns, above 0; it learns seldom (``policy_delay``)
    :param actor_tau: Soft update coefficient in (0, 1] of the target actor, which acts; 1 makes it the actor itself
    :param intervals: Time intervals that the flow is trained on: "any", as in the paper, or those of the sampler's steps
        ("grid"), as in MFPO
    :param equal_time_share: Share in [0, 1] of a batch with r = t, that is of plain flow matching
    :param uniform_time_share: Share in [0, 1] of times that are uniform; the others are logit-normal
    :param time_mean: Mean of the normal distribution inside the logit-normal distribution of times
    :param time_std: Its standard deviation
    :param critic_reduction: "min" or "mean" over the critics, in targets, score estimates and choice of action
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
    policy_base = SOMPolicy
    policy: SOMPolicy

    def __init__(
        self,
        policy: str | type[SOMPolicy],
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
        policy_delay: int = 4,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        target_update_interval: int = 1,
        inverse_temperature: float = 30.0,
        normalize_q: bool = True,
        n_samples: int = 32,
        score_estimator: str = "posterior_mean",
        score_norm: float | None = None,
        path: str = "linear",
        adaptive_loss: bool = False,
        actor_rate: float = 1.0,
        actor_tau: float = 0.02,
        intervals: str = "any",
        equal_time_share: float = 0.25,
        uniform_time_share: float = 1.0,
        time_mean: float = -0.4,
        time_std: float = 1.0,
        critic_reduction: str = "min",
        compile_step: bool = False,
        allow_non_finite_observations: bool = False,
    ):
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
        self.inverse_temperature = inverse_temperature
        self.normalize_q = normalize_q
        self.n_samples = n_samples
        self.score_estimator = score_estimator
        self.score_norm = score_norm
        self.path = path
        self.adaptive_loss = adaptive_loss

        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_range("inverse_temperature", self.inverse_temperature, above=0)
        check_integer("n_samples", self.n_samples, minimum=1)
        check_choice("score_estimator", self.score_estimator, SCORE_ESTIMATORS)
        if self.score_norm is not None:
            check_range("score_norm", self.score_norm, above=0)
        check_choice("path", self.path, tuple(PATHS))
        for name in ("normalize_q", "adaptive_loss"):
            check_choice(name, getattr(self, name), (True, False))

    def _draw(self, batch_size: int) -> GradientStepDraws:
        d = get_action_dim(self.action_space)
        draw_proposals = self._stratified if self.score_estimator == "posterior_mean" else self._normal
        return GradientStepDraws(
            next_noise=self._normal(batch_size, d),
            policy_noise=self._normal(batch_size, d),
            proposals=draw_proposals(batch_size, self.n_samples, d),
            actor=self._draw_regression(batch_size, self.policy.actor_type),
        )

    def _update(
        self, batch: ReplayBufferSamples, draws: GradientStepDraws, update_target: bool = True, improve_policy: bool = True
    ) -> Metrics:
        """
        One gradient step.

        :param batch: Sample of a replay buffer
        :param draws: The step's randomness
        :param update_target: Whether the target critics follow
        :param improve_policy: Whether to update the actor
        :return: Quantities to log by name, scalars without gradient
        """
        # Critics: regression on the Bellman target of the policy as it is. SOM does not follow the entropy: no bonus on it.
        with th.no_grad():
            next_actions = self.policy.act(self.actor_target.encode(batch.next_observations), draws.next_noise)
        critic_loss, metrics = self._td_loss(batch, next_actions, entropy_bonus=next_actions.new_zeros(()))
        metrics["critic_loss"] = self._descend("critic_loss", critic_loss, self.critic.optimizer)
        if update_target:
            self._update_target(self.critic_target, self.critic, self.tau)
        if not improve_policy:
            return metrics

        # A point on the path from an action of the policy
        t = draws.actor.t
        path, velocity_of = PATHS[self.path]
        mu, sigma = path(t)
        with th.no_grad():
            actions = self.policy.act(self.actor_target.encode(batch.observations), draws.policy_noise)
        noisy_actions = paths.interpolate(actions, draws.actor.noise, mu, sigma)

        # Velocity field of the Boltzmann policy there
        mean_action, sample_size = self._posterior_mean(batch.observations, noisy_actions, mu, sigma, draws.proposals)
        velocity = velocity_of(noisy_actions, mean_action, t)
        metrics["ess_gaussian"] = sample_size

        # Actor: mean-flow regression on this velocity
        features = self.actor.encode(batch.observations)
        errors = self._regression_errors(self.actor, features, noisy_actions, draws.actor, velocity, velocity)
        squares = errors.square()
        loss = (mean_flow.adaptive_weights(errors) * squares).mean() if self.adaptive_loss else squares.mean()
        metrics["actor_loss"] = self._descend("actor_loss", loss, self.actor.optimizer)
        self._update_target(self.actor_target, self.actor, self.actor_tau)
        return metrics

    @th.no_grad()
    def _posterior_mean(
        self, observations: PyTorchObs, noisy_actions: th.Tensor, mu: th.Tensor, sigma: th.Tensor, proposals: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Mean E[a_0 | a_t] of the actions of exp(inverse temperature * Q) that lead to the noisy ones.

        :param observations: Batch of observations
        :param noisy_actions: a_t, shape (B, d)
        :param mu: mu_t, shape (B, 1)
        :param sigma: sigma_t, shape (B, 1)
        :param proposals: Draws behind the proposed actions, shape (B, K, d)
        :return: Mean action, shape (B, d); mean effective sample size, a scalar
        """
        features = self.critic.encode(observations).unsqueeze(1)
        if self.score_estimator == "posterior_mean":
            actions = boltzmann.gaussian_proposal(noisy_actions, mu, sigma, proposals)
            q_values = reduce_values(self.critic.q_values(features, actions), self.policy.critic_reduction)
        else:
            actions = paths.actions_from_noise(noisy_actions.unsqueeze(1), proposals, mu.unsqueeze(1), sigma.unsqueeze(1))
            q_values, gradients = in_chunks(self._values_and_gradients, features, actions)
        temperature = (boltzmann.spread(q_values) if self.normalize_q else 1.0) / self.inverse_temperature
        # The best value of each state is subtracted, which leaves the weights as they are, and equal values without rounding
        weights = ((q_values - q_values.amax(dim=1, keepdim=True)) / temperature).softmax(dim=1)
        mean_action, sample_size = boltzmann.snis_mean(weights, actions)
        if self.score_estimator == "gradient":
            score = boltzmann.score_from_gradients(weights, gradients / temperature, mu)
        elif self.score_norm is not None:
            score = boltzmann.score_from_mean_action(mean_action, noisy_actions, mu, sigma)
        else:
            return mean_action, sample_size.mean()
        if self.score_norm is not None:
            score = boltzmann.with_length(score, self.score_norm)
        return boltzmann.mean_action_from_score(score, noisy_actions, mu, sigma), sample_size.mean()

    def _values_and_gradients(self, features: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param features: The critics' state features, shape (B, 1, features_dim)
        :param actions: shape (B, K, d)
        :return: Their values, reduced over the critics, shape (B, K); the gradients of these, shape (B, K, d)
        """
        with th.enable_grad():
            actions = actions.detach().requires_grad_()
            q_values = reduce_values(self.critic.q_values(features, actions), self.policy.critic_reduction)
            (gradients,) = th.autograd.grad(q_values.sum(), actions)
        return q_values.detach(), gradients
