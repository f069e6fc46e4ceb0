"""What the algorithms share of the training loop: arguments, checks, critics, and one gradient step after the other."""

from __future__ import annotations

import copy
import uuid
import warnings
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    PyTorchObs,
    ReplayBufferSamples,
    RolloutReturn,
    Schedule,
    TrainFreq,
)
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.common.vec_env import VecEnv
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sb3_mfpo.checks import check_choice, check_integer, check_range
from sb3_mfpo.maths import mean_flow
from sb3_mfpo.nets.critics import Critic
from sb3_mfpo.nets.flow import MeanFlowActor
from sb3_mfpo.runs.callback import RunSaver
from sb3_mfpo.runs.checkpoint import read_newest_run
from sb3_mfpo.runs.state import restore_buffer, restore_run
from sb3_mfpo.training.guards import check_finite, naming_workers_that_ended
from sb3_mfpo.training.mean_flow_policy import MeanFlowPolicy
from sb3_mfpo.training.policy import CRITIC_REDUCTIONS
from sb3_mfpo.training.stepper import StepRunner, onednn_matmul, onednn_matmul_is_exact

SelfFlowAlgorithm = TypeVar("SelfFlowAlgorithm", bound="FlowAlgorithm")

# In the order in which a gradient step looks at them
LOSSES = ("critic_loss", "actor_loss", "divergence_loss", "ent_coef_loss")


class FlowDraws(NamedTuple):
    """
    Random draws of a regression on the flow.

    ``t`` and ``r``: time pairs in (0, 1), shape (B, 1); ``noise``: standard normal, shape (B, d).
    """

    t: th.Tensor
    r: th.Tensor
    noise: th.Tensor


class FlowAlgorithm(OffPolicyAlgorithm):
    """
    Off-policy actor-critic with a mean-flow policy: base of MFPO and SOM, which document the arguments.

    An algorithm says what the randomness of a gradient step is (``_draw``), which actions its critics look ahead to
    (``_next_actions``), and what a step consists of (``_update``).
    """

    policy: MeanFlowPolicy

    # What a custom policy must be derived from
    policy_base: ClassVar[type[MeanFlowPolicy]]
    # Share of the target's mass beyond the support from which a user should know
    MAX_CLIPPED_MASS = 0.01
    # Gradient steps after which what they recorded is brought to the CPU: seldom, but not only at the end of a million
    READ_EVERY = 1000
    # Half-width of the action space beyond which it is probably not meant
    MAX_USUAL_BOUND = 100.0

    def __init__(
        self,
        policy: str | type[MeanFlowPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule,
        buffer_size: int,
        learning_starts: int,
        batch_size: int,
        tau: float,
        gamma: float,
        train_freq: int | tuple[int, str],
        gradient_steps: int,
        action_noise: ActionNoise | None,
        *,
        replay_buffer_class: type[ReplayBuffer] | None,
        replay_buffer_kwargs: dict[str, Any] | None,
        optimize_memory_usage: bool,
        n_steps: int,
        target_update_interval: int,
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: th.device | str,
        equal_time_share: float,
        time_mean: float,
        time_std: float,
        critic_reduction: str,
        policy_delay: int,
        compile_step: bool,
        onednn_matmul: bool,
        allow_non_finite_observations: bool,
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
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )
        self.target_update_interval = target_update_interval
        self.equal_time_share = equal_time_share
        self.time_mean = time_mean
        self.time_std = time_std
        self.critic_reduction = critic_reduction
        self.policy_delay = policy_delay
        self.compile_step = compile_step
        self.onednn_matmul = onednn_matmul
        self.allow_non_finite_observations = allow_non_finite_observations
        self._rollout_timesteps = 0
        self._warned_of_clipping = False
        # Which environments have just begun an episode, after so many steps
        self._episode_starts = np.ones(1, dtype=bool)
        self._stored_timesteps = 0
        # Which run this is, for its checkpoints; what saves it while it trains
        self._run_id = ""
        self._saver: RunSaver | None = None
        # What is left to restore when the training of a resumed run begins
        self._run_state: dict[str, Any] | None = None

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
        for name in ("tau", "gamma", "equal_time_share"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("time_mean", self.time_mean)
        check_range("time_std", self.time_std, low=0)
        check_choice("critic_reduction", self.critic_reduction, CRITIC_REDUCTIONS)
        for name in ("compile_step", "onednn_matmul", "allow_non_finite_observations"):
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
        self._runner = StepRunner(self.device, self.compile_step)
        self._uses_onednn = self._check_onednn()

    def _check_onednn(self) -> bool:
        if not self.onednn_matmul or self.device.type != "cpu":
            return False
        if not onednn_matmul_is_exact():
            warnings.warn(
                "`onednn_matmul=True` has no effect here: on this processor (or with this PyTorch) oneDNN would round the "
                "products to bfloat16. Remove the argument.",
                stacklevel=4,
            )
            return False
        return True

    # Looked up, not kept: a callback may give the model another policy, which is then the one that is trained

    @property
    def actor(self) -> MeanFlowActor:  # type: ignore[override]
        """The policy's actor."""
        return self.policy.actor

    @property
    def critic(self) -> Critic:
        """The policy's critics."""
        return self.policy.critic

    @property
    def critic_target(self) -> Critic:
        """The policy's target critics."""
        return self.policy.critic_target

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        state, self._run_state = self._run_state, None
        action_noise = self.action_noise
        if state is not None:
            # A training begins by resetting it
            action_noise = copy.deepcopy(action_noise)
            # The number of steps is that of the whole run, as in the call that was interrupted
            total_timesteps, reset_num_timesteps = total_timesteps - self.num_timesteps, False
        elif reset_num_timesteps or not self._run_id:
            self._run_id = uuid.uuid4().hex
        if reset_num_timesteps or self._last_obs is None:
            self._episode_starts = np.ones(self.n_envs, dtype=bool)
        self._saver = RunSaver(self)
        with naming_workers_that_ended(self.env):
            result, callback = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._stored_timesteps = self.num_timesteps
        self._saver.begin(callback)
        if state is not None:
            self.action_noise = action_noise
            restore_run(self, state, callback)
        self._check_observation("observation", self._last_obs if self._vec_normalize_env is None else self._last_original_obs)
        return result, callback

    def learn(self: SelfFlowAlgorithm, *args: Any, **kwargs: Any) -> SelfFlowAlgorithm:
        try:
            super().learn(*args, **kwargs)
            self._between_rollouts(at_the_end=True)
        except Exception:
            # Processes of environments get Ctrl-C as well, and may end before the step is done
            if self._saver is not None and self._saver.received is not None:
                self._between_rollouts()
            raise
        finally:
            if self._saver is not None:
                self._saver.release()
            self._saver = None
        return self

    def _between_rollouts(self, at_the_end: bool = False) -> None:
        if self._saver is not None:
            self._saver.save_if_due(at_the_end)

    @classmethod
    def resume(
        cls: type[SelfFlowAlgorithm],
        path: str | Path,
        env: GymEnv | str,
        device: th.device | str = "auto",
        name_prefix: str = "run",
        **kwargs: Any,
    ) -> SelfFlowAlgorithm:
        """
        Go on with a run from a checkpoint of :class:`sb3_mfpo.RunCheckpointCallback`. The next ``learn`` continues it: its
        ``total_timesteps`` are those of the whole run, so that the call is the same as before.

        :param path: A checkpoint (".zip" may be left out), or the folder of the checkpoints: the newest one that is whole. It
            is unpickled, which can run code: resume only files that you trust.
        :param env: The environment to go on with, wrapped as it was (if registered in Gym, can be str)
        :param device: Device on which the code should run
        :param name_prefix: The checkpoints' common prefix
        :param kwargs: Arguments to change, see ``load``
        :return: The model
        :raises FileNotFoundError: If there is no checkpoint
        :raises ValueError: If no checkpoint is whole, or the environments do not fit
        """
        path, state = read_newest_run(Path(path), name_prefix)
        model = cls.load(path, env=maybe_make_env(env, verbose=0), device=device, **kwargs)
        restore_buffer(model, state)
        model._run_state, model._run_id = state, state["run_id"]
        return model

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        self._between_rollouts()
        with naming_workers_that_ended(env):
            rollout = super().collect_rollouts(
                env, callback, train_freq, replay_buffer, action_noise, learning_starts, log_interval
            )
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
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._episode_starts, self._stored_timesteps = np.asarray(dones, dtype=bool), self.num_timesteps

    def _check_observation(self, what: str, rows: Any, first_env: int = 0) -> None:
        """
        Check what will be stored of observations: the entries that the observation space has, as its types.

        :param what: What they are, for the message
        :param rows: One per environment, or a dictionary of such
        :param first_env: Index of the environment that the first row comes from
        :raises ValueError: If a number is NaN or infinite, unless that is allowed, or an entry is missing or not of its type
        """
        check = partial(
            check_finite,
            num_timesteps=self.num_timesteps,
            first_env=first_env,
            may_be_non_finite=self.allow_non_finite_observations,
            way_out=", or set `allow_non_finite_observations=True` if the features extractor replaces such numbers",
        )
        space = self.observation_space
        if not isinstance(space, spaces.Dict):
            check(what, rows, space.dtype)
            return
        for key, part in space.items():
            if key not in rows:
                raise ValueError(
                    f"Environment {first_env} returned no {key!r} in its {what} at step {self.num_timesteps}, but only "
                    f"{', '.join(map(repr, rows))}. The observation space has it."
                )
            check(f"{what} {key!r}", rows[key], part.dtype)

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
        self._runner.failed.zero_()

        totals: defaultdict[str, float] = defaultdict(float)
        counts: Counter[str] = Counter()
        for start in range(0, gradient_steps, self.READ_EVERY):
            steps = min(self.READ_EVERY, gradient_steps - start)
            for name, values in self._read(self._gradient_steps(steps, batch_size)).items():
                totals[name] += sum(values)
                counts[name] += len(values)
        self._log({name: total / counts[name] for name, total in totals.items()}, gradient_steps)

    def _gradient_steps(self, steps: int, batch_size: int) -> list[dict[str, th.Tensor]]:
        """
        :param steps: Number of gradient steps
        :param batch_size: Minibatch size
        :return: What each of them recorded, by name, scalars without gradient
        """
        history = []
        with onednn_matmul(self._uses_onednn):
            for _ in range(steps):
                batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
                history.append(self._gradient_step(batch))
        return history

    def _gradient_step(self, batch: ReplayBufferSamples) -> dict[str, th.Tensor]:
        """
        :param batch: Sample of a replay buffer
        :return: Quantities to log by name, scalars without gradient
        """
        self._n_updates += 1
        flags = (self._n_updates % self.target_update_interval == 0, self._n_updates % self.policy_delay == 0)
        return self._runner.run(self._draw_and_update, batch, flags, self._settings())

    def _draw_and_update(self, batch: ReplayBufferSamples, update_target: bool, improve_policy: bool) -> dict[str, th.Tensor]:
        return self._update(batch, self._draw(len(batch.actions)), update_target, improve_policy)

    def _settings(self) -> tuple[Any, ...]:
        """
        :return: All that a gradient step reads from this object and that is no tensor
        """
        shared = (self.gamma, self.tau, self.equal_time_share, self.time_mean, self.time_std, self.critic_reduction)
        return (*shared, self.policy.sampling_steps)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.actor.optimizer, self.critic.optimizer]

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        self._runner.prepare(optimizers if isinstance(optimizers, list) else [optimizers])

    def _read(self, history: list[dict[str, th.Tensor]]) -> dict[str, list[float]]:
        """
        Bring what the last gradient steps have recorded to the CPU, all at once: every transfer waits for the device.

        :param history: Quantities by name, for every step
        :return: Their values by name
        :raises ValueError: If a loss was NaN or infinite
        """
        tensors = [self._runner.failed, *(value for metrics in history for value in metrics.values())]
        failed, *values = th.stack(tensors).tolist()
        columns: defaultdict[str, list[float]] = defaultdict(list)
        remaining = iter(values)
        for metrics in history:
            for name in metrics:
                columns[name].append(next(remaining))
        if failed:
            self._n_updates -= len(history)
            for metrics in history:
                self._n_updates += 1
                for name in LOSSES:
                    if name in metrics:
                        self._raise_if_not_finite(name, metrics[name])
        return columns

    def _log(self, metrics: dict[str, float], gradient_steps: int) -> None:
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/updates_per_step", gradient_steps / max(self._rollout_timesteps, 1))
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", value)
        if metrics.get("clipped_target_mass", 0.0) > self.MAX_CLIPPED_MASS and not self._warned_of_clipping:
            self._warned_of_clipping = True
            warnings.warn(
                f"{metrics['clipped_target_mass']:.1%} of the value targets' mass lies outside of [v_min, v_max] = "
                f"[{self.policy.v_min:g}, {self.policy.v_max:g}] and is clipped (gradient step {self._n_updates}): returns "
                "beyond are not told apart. Widen them, `policy_kwargs=dict(v_min=..., v_max=...)`, scale the rewards "
                '(`VecNormalize`), or use `policy_kwargs=dict(critic_type="scalar")`.',
                stacklevel=2,
            )

    @abstractmethod
    def _draw(self, batch_size: int) -> Any:
        """
        :param batch_size: Minibatch size B
        :return: All randomness of one gradient step, from PyTorch's default generator
        """

    def _draw_flow(self, batch_size: int, network_type: str) -> FlowDraws:
        """
        :param batch_size: Minibatch size B
        :param network_type: "mean_flow" or "flow_matching"
        :return: Draws of a regression on the flow
        """
        times = self._draw_times(batch_size, self._n_equal(batch_size, network_type))
        return FlowDraws(*times, self._normal(batch_size, get_action_dim(self.action_space)))

    def _draw_times(self, batch_size: int, n_equal: int) -> tuple[th.Tensor, th.Tensor]:
        """
        :param batch_size: Minibatch size B
        :param n_equal: Number of leading rows with r = t
        :return: Logit-normal t and r in (0, 1), r <= t, each of shape (B, 1)
        """
        return mean_flow.sample_times(self._normal(batch_size, 2), self.time_mean, self.time_std, n_equal)

    def _normal(self, *shape: int) -> th.Tensor:
        return th.randn(*shape, device=self.device)

    @abstractmethod
    def _update(
        self, batch: ReplayBufferSamples, draws: Any, update_target: bool = True, improve_policy: bool = True
    ) -> dict[str, th.Tensor]:
        """
        One step of the critics and, if asked for, of their targets and of the policy.

        :param batch: Sample of a replay buffer
        :param draws: The step's randomness
        :param update_target: Whether the target critics follow
        :param improve_policy: Whether to update the policy
        :return: Quantities to log by name, scalars without gradient
        """

    @abstractmethod
    def _next_actions(self, observations: PyTorchObs, *sampling: Any) -> tuple[th.Tensor, th.Tensor]:
        """
        What the critics look ahead to.

        :param observations: Batch of next observations
        :param sampling: What ``_update_critic`` was given
        :return: Actions in [-1, 1], shape (B, d); bonus on their values in units of return, shape (B, 1) or a scalar
        """

    def _update_critic(self, batch: ReplayBufferSamples, *sampling: Any) -> dict[str, th.Tensor]:
        """
        :param batch: Sample of a replay buffer
        :param sampling: Tensors that the choice of the next actions depends on
        :return: Quantities to log
        """
        loss, metrics = self._runner.compiled(self._critic_loss)(batch, *sampling)
        self._optimize("critic_loss", loss, self.critic.optimizer)
        return {"critic_loss": loss.detach()} | metrics

    def _critic_loss(self, batch: ReplayBufferSamples, *sampling: Any) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        Regression of the critics on the Bellman target.

        :param batch: Sample of a replay buffer
        :param sampling: Tensors that the choice of the next actions depends on
        :return: Loss; quantities to log
        """
        # n-step buffers bring their own discounts, gamma to the number of steps that were summed
        discounts = (1 - batch.dones) * (self.gamma if batch.discounts is None else batch.discounts)
        with th.no_grad():
            next_actions, bonus = self._next_actions(batch.next_observations, *sampling)
            target, clipped = self.critic_target.bellman_target(
                self.critic_target(batch.next_observations, next_actions, raw=True),
                batch.rewards,
                discounts,
                bonus,
                self.critic_reduction,
            )
        loss, q_value = self.critic.loss(self.critic(batch.observations, batch.actions, raw=True), target)
        return loss, {"q_value": q_value, "clipped_target_mass": clipped}

    def _update_target(self) -> None:
        get_ema_multi_avg_fn(1 - self.tau)(list(self.critic_target.parameters()), list(self.critic.parameters()), None)
        # Running statistics of batch normalisation are copied, as in SAC
        polyak_update(_running_statistics(self.critic), _running_statistics(self.critic_target), 1.0)

    def _total_derivative(self, jvp: Callable[..., th.Tensor], velocity: th.Tensor, network_type: str) -> th.Tensor:
        """
        Derivative of an average over [r, t] along the flow, for the rows that have r < t.

        :param jvp: Of the network, see ``MeanFlowMLP.linearize``
        :param velocity: Instantaneous velocity, shape (B, d)
        :param network_type: "mean_flow" or "flow_matching"
        :return: shape (B - n_equal, output_dim)
        """
        rows = slice(self._n_equal(len(velocity), network_type), None)
        tangent = velocity[rows]
        return jvp(tangent, tangent.new_ones(len(tangent), 1), rows=rows)

    def _n_equal(self, batch_size: int, network_type: str) -> int:
        """
        :param batch_size: Minibatch size B
        :param network_type: "mean_flow" or "flow_matching", of which the latter learns from r = t alone
        :return: Number of leading rows with r = t
        """
        return batch_size if network_type == "flow_matching" else int(self.equal_time_share * batch_size)

    def _optimize(self, name: str, loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
        """
        Take a step down a loss.

        :param name: Name of the loss, for the message
        :param loss: A scalar
        :param optimizer: Optimizer of the parameters to change
        :raises ValueError: If the loss is NaN or infinite, before any weight changes
        """
        if not self._runner.defers_checks(optimizer):
            self._raise_if_not_finite(name, loss)
        self._runner.descend(loss, optimizer)

    def _raise_if_not_finite(self, name: str, loss: th.Tensor) -> None:
        if not th.isfinite(loss):
            raise ValueError(
                f"`{name}` is {loss.item()} at gradient step {self._n_updates} (environment step {self.num_timesteps}). The "
                "step was not taken: saving the model now gives a clean checkpoint. Usual causes: rewards or observations of "
                "a huge scale (use `VecNormalize`), or a too high learning rate."
            )

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        super().set_parameters(*args, **kwargs)
        self._runner.forget_graphs()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_runner", "_run_state", "_saver"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []


def _running_statistics(critic: Critic) -> list[th.Tensor]:
    """
    :param critic: Critics
    :return: What their layers of batch normalisation have counted
    """
    return [buffer for name, buffer in critic.named_buffers() if "running_" in name]
