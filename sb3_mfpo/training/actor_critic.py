"""
The training loop of an off-policy actor-critic: arguments, checks, critics, and one gradient step after the other. What the
policy is, and how it improves, is left to the algorithms.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import GymEnv, ReplayBufferSamples, RolloutReturn, Schedule
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sb3_mfpo.checks import check_choice, check_integer, check_range
from sb3_mfpo.nets.critics import Critic
from sb3_mfpo.runs.algorithm import ResumableAlgorithm
from sb3_mfpo.training.guards import check_finite, check_observation, naming_workers_that_ended
from sb3_mfpo.training.policy import CRITIC_REDUCTIONS, GenerativePolicy
from sb3_mfpo.training.return_scale import ReturnScale, discounted_returns

Metrics = dict[str, th.Tensor]


class ActorCriticAlgorithm(ResumableAlgorithm):
    """
    Off-policy actor-critic with a policy that carries noise to actions.

    An algorithm says what the randomness of a gradient step is (``_draw``) and what a step consists of (``_update``). It finds
    the critics' loss (``_td_loss``), a guarded step down a loss (``_descend``) and targets' updates (``_update_target``) here.

    :param policy: The policy model to use, or its alias
    :param env: The environment to learn from (if registered in Gym, can be str); a Box action space with finite bounds
    :param learning_rate: Learning rate of all optimizers
    :param args: Further arguments of SB3's ``OffPolicyAlgorithm``
    :param actor_tau: Soft update coefficient of the target actor, in (0, 1]
    :param target_update_interval: Update the target critics every so many gradient steps
    :param critic_reduction: "min" or "mean" over the critics
    :param policy_delay: Update the policy every so many gradient steps
    :param compile_step: Whether to compile the gradient step with ``torch.compile``; on a CUDA device its parts are captured
        into CUDA graphs
    :param allow_non_finite_observations: Whether observations may hold NaN or infinite numbers
    :param kwargs: Further arguments of SB3's ``OffPolicyAlgorithm``
    :raises ValueError: If an argument is out of range; the message names it
    """

    policy: GenerativePolicy

    # What a custom policy must be derived from
    policy_base: ClassVar[type[GenerativePolicy]]
    # Share of the target's mass beyond the support from which a user should know
    MAX_CLIPPED_MASS = 0.01
    # By how much one reward may raise the scale of the returns while learning, before a user should know
    MAX_SCALE_JUMP = 10.0
    # Gradient steps after which what they recorded is brought to the CPU: seldom, but not only at the end of a million
    READ_EVERY = 1000
    # Half-width of the action space beyond which it is probably not meant
    MAX_USUAL_BOUND = 100.0

    def __init__(
        self,
        policy: str | type[GenerativePolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        *args: Any,
        actor_tau: float = 1.0,
        target_update_interval: int = 1,
        critic_reduction: str = "min",
        policy_delay: int = 1,
        compile_step: bool = False,
        allow_non_finite_observations: bool = False,
        **kwargs: Any,
    ):
        super().__init__(
            policy,
            env,
            learning_rate,
            *args,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
            **kwargs,
        )
        self.actor_tau = actor_tau
        self.target_update_interval = target_update_interval
        self.critic_reduction = critic_reduction
        self.policy_delay = policy_delay
        self.compile_step = compile_step
        self.allow_non_finite_observations = allow_non_finite_observations
        self._rollout_timesteps = 0
        self._warned_of_clipping = False
        # Discounted, of the episodes that are being collected, shape (n_envs,)
        self._returns = np.zeros(0)
        # `learn` makes the one that writes, but `train` may come first
        self._logger = Logger(None, [])

    def _check_arguments(self) -> None:
        """
        Check everything that can be checked without work.

        :raises ValueError: If an argument is out of range; the message names it
        """
        for name in ("buffer_size", "batch_size", "n_steps", "policy_delay", "target_update_interval"):
            check_integer(name, getattr(self, name), minimum=1)
        # SAC takes 1e4
        check_range("learning_starts", self.learning_starts, low=0)
        check_integer("gradient_steps", self.gradient_steps, minimum=-1)
        for name in ("tau", "gamma"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("actor_tau", self.actor_tau, 0, 1, above=0)
        check_choice("critic_reduction", self.critic_reduction, CRITIC_REDUCTIONS)
        for name in ("compile_step", "allow_non_finite_observations"):
            check_choice(name, getattr(self, name), (True, False))
        # Anything else that makes a policy is asked for it first
        if isinstance(self.policy_class, type) and not issubclass(self.policy_class, self.policy_base):
            raise self._wrong_policy()
        if "critic_reduction" in self.policy_kwargs:
            raise ValueError(
                f"`critic_reduction` is an argument of {type(self).__name__} itself, which hands it to the policy: move it "
                "there."
            )
        # A constructor of a user's own may take other arguments, and checks what it makes of them
        if getattr(self.policy_class, "__init__", None) is self.policy_base.__init__:
            self.policy_base.check_arguments(**self.policy_kwargs)

        low, high = self.action_space.low, self.action_space.high  # type: ignore[attr-defined]
        if not (low < high).all():
            raise ValueError(f"Every lower bound of the action space must be below the upper bound, not {self.action_space}.")

    def _wrong_policy(self) -> ValueError:
        return ValueError(
            f"`policy` must be one of {list(self.policy_aliases)} or a subclass of `{self.policy_base.__name__}`, or make "
            f"one, not {self.policy_class}."
        )

    def _warn_of_unusual_settings(self) -> None:
        low, high = self.action_space.low, self.action_space.high  # type: ignore[attr-defined]
        if max(abs(low).max(), abs(high).max()) > self.MAX_USUAL_BOUND:
            warnings.warn(
                f"The action space reaches beyond {self.MAX_USUAL_BOUND:g} ({self.action_space}). The policy explores all "
                "of it alike: if the bounds are only nominal, give the environment tighter ones.",
                stacklevel=5,
            )
        if self.n_envs > 1 and self.gradient_steps == 1:
            warnings.warn(
                f"`gradient_steps=1` with {self.n_envs} environments lowers the number of updates per environment step; "
                "`gradient_steps=-1` keeps it at one.",
                stacklevel=5,
            )

    def _setup_model(self) -> None:
        self._check_arguments()
        self._warn_of_unusual_settings()
        super()._setup_model()
        if not isinstance(self.policy, self.policy_base):
            raise self._wrong_policy()
        self.policy.critic_reduction = self.critic_reduction
        normalizer = self._vec_normalize_env
        # Not again when a model is loaded
        if self.return_scale is not None and self.num_timesteps == 0 and normalizer is not None and normalizer.norm_reward:
            warnings.warn(
                f"`VecNormalize` divides the rewards by their scale, as {type(self).__name__} does, and clips them at "
                f"{normalizer.clip_reward:g}. Give it `norm_reward=False`.",
                stacklevel=4,
            )
        # 1 from the first loss on that is not finite, where losses are looked at late
        self._found_inf = th.zeros((), device=self.device)

    # Looked up, not kept: a callback may give the model another policy, which is then the one that is trained

    @property
    def actor(self) -> Any:  # type: ignore[override]
        """The policy's actor."""
        return self.policy.actor

    @property
    def actor_target(self) -> Any:
        """The policy's target actor, which acts."""
        return self.policy.actor_target

    @property
    def critic(self) -> Critic:
        """The policy's critics."""
        return self.policy.critic

    @property
    def critic_target(self) -> Critic:
        """The policy's target critics."""
        return self.policy.critic_target

    @property
    def return_scale(self) -> ReturnScale | None:
        """The scale of the returns; None where the range of the values is fixed."""
        return self.policy.return_scale

    # Around the environments: what they return is checked before it is stored

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        with naming_workers_that_ended(self.env):
            result = super()._setup_learn(*args, **kwargs)
        self._check_observation("observation", self._last_obs if self._vec_normalize_env is None else self._last_original_obs)
        return result

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        with naming_workers_that_ended(self.env):
            rollout = super().collect_rollouts(*args, **kwargs)
        self._rollout_timesteps = rollout.episode_timesteps
        return rollout

    def _sample_action(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        actions, buffer_actions = super()._sample_action(*args, **kwargs)
        if not np.isfinite(buffer_actions).all():
            raise ValueError(
                f"The policy's actions are not finite at step {self.num_timesteps}: {buffer_actions}. They were not taken. "
                "Usual cause: observations of a huge scale (use `VecNormalize`)."
            )
        return actions, buffer_actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self._vec_normalize_env is None:
            raw_obs, raw_reward = new_obs, reward
        else:
            # Normalisation clips, which would hide an infinite number
            raw_obs = self._vec_normalize_env.get_original_obs()
            raw_reward = self._vec_normalize_env.get_original_reward()
        self._check_observation("observation", raw_obs)
        check_finite("reward", raw_reward, np.float32, self.num_timesteps)
        for i, info in enumerate(infos):
            if dones[i] and (last := info.get("terminal_observation")) is not None:
                rows = {key: [value] for key, value in last.items()} if isinstance(last, Mapping) else [last]
                self._check_observation("terminal observation", rows, first_env=i)
        self._follow_returns(reward)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _follow_returns(self, reward: np.ndarray) -> None:
        if self.return_scale is None:
            return
        # A first return that is not 0 moves what has had no unit
        before, settled = self.return_scale.value, self.return_scale.settled and self.return_scale.largest > 0
        self._returns = discounted_returns(reward, self._episode_starts, self.gamma, self._returns)
        self.return_scale.update(self._returns)
        if settled and self._n_updates > 0 and self.return_scale.value > self.MAX_SCALE_JUMP * before:
            warnings.warn(
                f"The rewards {reward} at step {self.num_timesteps} raised the scale of the returns from {before:g} to "
                f"{self.return_scale.value:g}, which blurs the values learned so far: it does not fall again. If they are "
                "outliers, clip them (`gymnasium.wrappers.TransformReward`), or fix the range of the values: "
                "`policy_kwargs=dict(v_min=..., v_max=...)`.",
                stacklevel=2,
            )

    def _follow_buffer(self) -> None:
        # Transitions that this model has not collected
        buffer, normalizer = self.replay_buffer, self._vec_normalize_env
        assert buffer is not None and self.return_scale is not None
        if buffer.size() == 0:
            return
        rows = np.arange(buffer.size()) if not buffer.full else np.roll(np.arange(buffer.buffer_size), -buffer.pos)
        rewards = buffer.rewards[rows] if normalizer is None else normalizer.normalize_reward(buffer.rewards[rows])
        returns, starts = np.zeros(rewards.shape), np.ones(buffer.n_envs, bool)
        for row, (reward, done) in enumerate(zip(rewards, buffer.dones[rows], strict=True)):
            returns[row] = discounted_returns(reward, starts, self.gamma, returns[row - 1])
            starts = done > 0
        self.return_scale.update(returns.ravel())

    def _check_observation(self, what: str, rows: Any, first_env: int = 0) -> None:
        check_observation(
            what, rows, self.observation_space, self.num_timesteps, first_env, self.allow_non_finite_observations
        )

    # Gradient steps

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and do the updates.

        :param gradient_steps: Number of gradient steps
        :param batch_size: Minibatch size
        :raises ValueError: If a loss is NaN or infinite; the step is then not taken. On a CPU it is noticed at once; on other
            devices, which a look at every loss would stall, at the end of the call or after 1000 steps; all steps from that
            one on are skipped.
        """
        # This affects batch normalisation and dropout
        self.policy.set_training_mode(True)
        self._update_learning_rate(self._optimizers())
        self._found_inf.zero_()
        if self.return_scale is not None:
            if self.return_scale.moments.count == 0:
                self._follow_buffer()
            factor = self.return_scale.follow()
            self._rescale(self.return_scale.unit or 1.0, factor)
            self.logger.record("train/return_scale", self.return_scale.value)

        totals: defaultdict[str, float] = defaultdict(float)
        counts: Counter[str] = Counter()
        history: list[Metrics] = []
        for step in range(1, gradient_steps + 1):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            history.append(self._gradient_step(batch))
            if step % self.READ_EVERY == 0 or step == gradient_steps:
                for name, value in self._read(history):
                    totals[name] += value
                    counts[name] += 1
                history = []
        self._log({name: total / counts[name] for name, total in totals.items()}, gradient_steps)

    def _rescale(self, unit: float, factor: float) -> None:
        """
        Change the unit of the values. In units of return they stay what they are.

        :param unit: The unit, in units of return, above 0
        :param factor: By which it has changed; 1 for the first unit, as nothing is learned yet
        """
        for critic in (self.critic, self.critic_target):
            critic.rescale(unit, factor)

    def _gradient_step(self, batch: ReplayBufferSamples) -> Metrics:
        """
        :param batch: Sample of a replay buffer
        :return: Quantities to log by name, scalars without gradient
        """
        self._n_updates += 1
        draws = self._draw(len(batch.actions))
        update_target = self._n_updates % self.target_update_interval == 0
        improve_policy = self._n_updates % self.policy_delay == 0
        if not self.compile_step:
            return self._update(batch, draws, update_target, improve_policy)
        th.compiler.cudagraph_mark_step_begin()
        metrics = self._compiled_update()(batch, draws, update_target, improve_policy)
        # The next step may write to the same memory
        return {name: value.clone() for name, value in metrics.items()}

    @abstractmethod
    def _draw(self, batch_size: int) -> Any:
        """
        :param batch_size: Minibatch size B
        :return: All randomness of one gradient step, from PyTorch's default generator
        """

    @abstractmethod
    def _update(
        self, batch: ReplayBufferSamples, draws: Any, update_target: bool = True, improve_policy: bool = True
    ) -> Metrics:
        """
        One step of the critics and, if asked for, of their targets and of the policy: actor and target actor.

        :param batch: Sample of a replay buffer
        :param draws: The step's randomness
        :param update_target: Whether the target critics follow
        :param improve_policy: Whether to update the policy
        :return: Quantities to log by name, scalars without gradient; the losses' names end in "_loss" and come in the order of
            their steps
        """

    def _compiled_update(self) -> Callable[..., Metrics]:
        # Made when first asked for; copies and pickles make their own
        if "_compiled" not in self.__dict__:
            # Other shapes are compiled anew: symbolic ones would be slower. The mode captures CUDA graphs where it can.
            self._compiled = th.compile(self._update, dynamic=False, mode="reduce-overhead")
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def _td_loss(
        self, batch: ReplayBufferSamples, next_actions: th.Tensor, entropy_bonus: th.Tensor
    ) -> tuple[th.Tensor, Metrics]:
        """
        Temporal-difference loss: regression of the critics on the Bellman target (Eq. 29 of https://arxiv.org/abs/2604.14698).

        :param batch: Sample of a replay buffer
        :param next_actions: The policy's actions at the next states, in [-1, 1], shape (B, d)
        :param entropy_bonus: Bonus on their values in units of return, shape (B, 1) or a scalar
        :return: Loss, a scalar; quantities to log
        """
        with th.no_grad():
            next_outputs = self.critic_target(batch.next_observations, next_actions, raw=True)
            target, clipped = self.critic_target.bellman_target(
                next_outputs, batch.rewards, self._discounts(batch), entropy_bonus, self.policy.critic_reduction
            )
        loss, q_value = self.critic.loss(self.critic(batch.observations, batch.actions, raw=True), target)
        return loss, {"q_value": q_value, "clipped_target_mass": clipped}

    def _discounts(self, batch: ReplayBufferSamples) -> th.Tensor:
        """
        :param batch: Sample of a replay buffer
        :return: Discount factors, zero where the episode terminated, shape (B, 1)
        """
        # n-step buffers bring their own, gamma to the number of steps that were summed
        return (1 - batch.dones) * (self.gamma if batch.discounts is None else batch.discounts)

    @th.compiler.disable
    def _descend(self, name: str, loss: th.Tensor, optimizer: th.optim.Optimizer) -> th.Tensor:
        """
        Take a step down a loss.

        :param name: Name of the loss, for the message
        :param loss: A scalar
        :param optimizer: Optimizer of the parameters to change
        :return: The loss without gradient
        :raises ValueError: If the loss is NaN or infinite, before any weight changes
        """
        if self._looks_at_losses_late(optimizer):
            # Fused optimizers skip their step where this is 1. The difference is 0 or NaN: fewer operators than `isfinite`
            self._found_inf.masked_fill_(loss.detach() - loss.detach() != 0, 1.0)
            optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        else:
            self._raise_if_not_finite(name, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def _looks_at_losses_late(self, optimizer: th.optim.Optimizer) -> bool:
        # On a CPU a look costs nothing; elsewhere it would wait for the device
        return self.device.type != "cpu" and all(group.get("fused") for group in optimizer.param_groups)

    def _raise_if_not_finite(self, name: str, loss: th.Tensor) -> None:
        if not th.isfinite(loss):
            raise ValueError(
                f"`{name}` is {loss.item()} at gradient step {self._n_updates} (environment step {self.num_timesteps}). The "
                "step was not taken: saving the model now gives a clean checkpoint. Usual causes: rewards or observations of "
                "a huge scale (use `VecNormalize`), or a too high learning rate."
            )

    @th.compiler.disable
    def _update_target(self, target: nn.Module, online: nn.Module, tau: float) -> None:
        """
        :param target: Network that follows
        :param online: Network that is trained
        :param tau: Soft update coefficient in [0, 1]
        """
        get_ema_multi_avg_fn(1 - tau)(list(target.parameters()), list(online.parameters()), None)
        # Running statistics of batch normalisation are copied, as in SAC
        polyak_update(get_parameters_by_name(online, ["running_"]), get_parameters_by_name(target, ["running_"]), 1.0)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.actor.optimizer, self.critic.optimizer]

    def _read(self, history: list[Metrics]) -> list[tuple[str, float]]:
        """
        Bring what the last gradient steps have recorded to the CPU, all at once: every transfer waits for the device.

        :param history: Quantities by name, for every step
        :return: Names and values
        :raises ValueError: If a loss was NaN or infinite
        """
        names = [name for metrics in history for name in metrics]
        tensors = [value for metrics in history for value in metrics.values()]
        found_inf, *values = th.stack([self._found_inf, *tensors]).tolist()
        if found_inf:
            self._n_updates -= len(history)
            for metrics in history:
                self._n_updates += 1
                for name in metrics:
                    if name.endswith("_loss"):
                        self._raise_if_not_finite(name, metrics[name])
        return list(zip(names, values, strict=True))

    def _log(self, metrics: dict[str, float], gradient_steps: int) -> None:
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/updates_per_step", gradient_steps / max(self._rollout_timesteps, 1))
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", value)
        settled = self.return_scale is None or self.return_scale.settled
        if settled and metrics.get("clipped_target_mass", 0.0) > self.MAX_CLIPPED_MASS and not self._warned_of_clipping:
            self._warned_of_clipping = True
            atoms: Any = self.critic.atoms
            low, high = atoms[0].item(), atoms[-1].item()
            wider = "a higher `value_range`" if self.policy.v_min is None else "lower `v_min` or higher `v_max`"
            warnings.warn(
                f"{metrics['clipped_target_mass']:.1%} of the value targets' mass lies outside of [{low:g}, {high:g}] and is "
                f"clipped (gradient step {self._n_updates}): returns beyond are not told apart. Give {wider} in "
                '`policy_kwargs`, or use `policy_kwargs=dict(critic_type="scalar")`.',
                stacklevel=2,
            )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_compiled", "_found_inf"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []
