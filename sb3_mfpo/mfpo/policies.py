"""Mean-flow policy: the actor, its average divergence network (ADN) and the critics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_mfpo.common.categorical import reduce_values
from sb3_mfpo.common.checks import check_choice, check_integer, check_range
from sb3_mfpo.common.divergence import exact_divergence
from sb3_mfpo.common.mean_flow import few_step_sample
from sb3_mfpo.common.policies import CategoricalCritic, Critic, FeaturesModel, ScalarCritic, spread_noise
from sb3_mfpo.common.torch_layers import FlowMLP, TanhGELU, in_chunks

ACTOR_TYPES = ("mean_flow", "flow_matching")
DIVERGENCE_TYPES = ("mean_flow", "flow_matching", "exact")
CRITIC_TYPES = ("categorical", "scalar")
CRITIC_REDUCTIONS = ("min", "mean")


class MeanFlowActor(FeaturesModel):
    """
    Average velocity u(s, a_t, r, t) of the flow that carries noise (t = 1) to actions (t = 0).

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Network to extract features
    :param network: The network behind the features
    :param normalize_images: Whether to divide images by 255
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        network: FlowMLP,
        normalize_images: bool = True,
    ):
        super().__init__(observation_space, action_space, features_extractor, normalize_images)
        self.network = network

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, length: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (..., features_dim)
        :param noisy_actions: a_t, shape (..., d)
        :param t: End of the interval in [0, 1], shape (..., 1)
        :param length: Its length t - r in [0, t], shape (..., 1)
        :return: Average velocity over [r, t], shape (..., d)
        """
        return self.network(features, noisy_actions, t, length)

    def linearize_velocity(
        self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, Callable[[th.Tensor], th.Tensor]]:
        """
        Instantaneous velocity v(s, a_t, t) = u(s, a_t, t, t), and its Jacobian with respect to a_t.

        :param features: State features, shape (B, ..., features_dim)
        :param noisy_actions: a_t, shape (B, ..., d)
        :param t: Time in [0, 1], shape (..., 1)
        :return: d a_t / dt, shape (B, ..., d); the function that multiplies the Jacobian by vectors, shape (N, B, ..., d),
            without gradient
        """
        return self.network.linearize(features, noisy_actions, t, th.zeros_like(t))


class AverageDivergenceNetwork(FlowMLP):
    """
    Average divergence of the actor's velocity field over [r, t] (ADN), for log-probabilities without a fine ODE solve.

    It sees the state through the actor's features: the policy depends on the state through nothing else.
    """

    optimizer: th.optim.Optimizer


class InstantaneousDivergence(nn.Module):
    """
    Divergence of the actor's velocity at t in place of its average over [r, t]: the ablation without an ADN.

    The log-probability is then that of an Euler solve with the sampling steps, and d Jacobian-vector products per step
    replace one network.

    :param actor: The actor; it stays a submodule of the policy alone
    """

    def __init__(self, actor: MeanFlowActor):
        super().__init__()
        # Bound, so that the actor does not become a submodule
        self.linearize_velocity: Callable[..., Any] = actor.linearize_velocity

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, length: th.Tensor) -> th.Tensor:
        """
        :param features: State features, shape (..., features_dim)
        :param noisy_actions: a_t, shape (..., d)
        :param t: End of the interval in [0, 1], shape (..., 1)
        :param length: Its length, of which the result is independent
        :return: Divergence at t, shape (..., 1), without gradient
        """
        _, jacobian_product = self.linearize_velocity(features, noisy_actions, t)
        return exact_divergence(jacobian_product, noisy_actions)

    def time_shares(self, times: th.Tensor) -> th.Tensor:
        """
        :param times: Grid from 1 (noise) down to 0 (action), shape (T + 1,)
        :return: The times at which the intervals start, shape (T, 1): here nothing else can be shared
        """
        return times[:-1, None]

    def on_grid(self, features: th.Tensor, time_shares: th.Tensor) -> Callable[[th.Tensor, int], th.Tensor]:
        """
        :param features: State features, shape (..., features_dim)
        :param time_shares: From ``time_shares``
        :return: Function of noisy actions and the number of an interval, see ``FlowMLP.on_grid``
        """

        return lambda noisy_actions, k: self(features, noisy_actions, time_shares[k], th.zeros_like(time_shares[k]))


class MFPOPolicy(BasePolicy):
    """
    Policy class (with actor, average divergence network and critics) for MFPO.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: Widths of the hidden layers, [256, 256, 256] by default, or ``dict(pi=[...], qf=[...])``; the average
        divergence network has those of the actor
    :param activation_fn: Activation function, or anything that makes one; tanh-approximated GELU by default
    :param layer_norm: Whether to use LayerNorm in all hidden layers
    :param time_fourier_dim: Number of learned Fourier features of each time (even)
    :param time_embedding_dim: Size of a time's embedding
    :param actor_type: "mean_flow" (average velocity) or "flow_matching" (instantaneous velocity, Euler steps; an ablation)
    :param divergence_type: "mean_flow" (ADN), "flow_matching" (a network of the instantaneous divergence; an ablation) or
        "exact" (no network: the Jacobian's trace at each sampling step; an ablation)
    :param critic_type: "categorical" (C51) or "scalar" (plain Q-networks, mean squared error)
    :param sampling_steps: Number of steps T from noise to action
    :param n_action_candidates: Number M of candidates of which ``predict(deterministic=True)`` takes the best; 1 takes the
        action that the centre of the noise leads to
    :param n_critics: Number of critic networks
    :param n_atoms: Number of atoms of the value distribution
    :param v_min: Lowest atom, in units of (soft, discounted) return
    :param v_max: Highest atom, in units of (soft, discounted) return
    :param critic_reduction: "min" or "mean" over the critics when candidates are compared; set by the algorithm
    :param features_extractor_class: Features extractor to use; by default one that suits the policy's kind of observations
        (``FlattenExtractor``, ``NatureCNN``, ``CombinedExtractor``)
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to divide images by 255
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer
    :param share_features_extractor: Whether actor and critic share a features extractor, which then learns from the actor's
        loss alone, as in SAC
    :raises ValueError: If an argument is out of range; the message names it
    """

    default_features_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    action_space: spaces.Box
    actor: MeanFlowActor
    divergence: AverageDivergenceNetwork | InstantaneousDivergence
    critic: Critic
    critic_target: Critic
    sampling_times: th.Tensor
    candidate_noise: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: Callable[[], nn.Module] = TanhGELU,
        layer_norm: bool = True,
        time_fourier_dim: int = 128,
        time_embedding_dim: int = 64,
        actor_type: str = "mean_flow",
        divergence_type: str = "mean_flow",
        critic_type: str = "categorical",
        sampling_steps: int = 2,
        n_action_candidates: int = 10,
        n_critics: int = 2,
        n_atoms: int = 101,
        v_min: float = -1600.0,
        v_max: float = 1600.0,
        critic_reduction: str = "min",
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = False,
    ):
        self.check_arguments(
            net_arch=net_arch,
            time_fourier_dim=time_fourier_dim,
            time_embedding_dim=time_embedding_dim,
            actor_type=actor_type,
            divergence_type=divergence_type,
            critic_type=critic_type,
            sampling_steps=sampling_steps,
            n_action_candidates=n_action_candidates,
            n_critics=n_critics,
            n_atoms=n_atoms,
            v_min=v_min,
            v_max=v_max,
            critic_reduction=critic_reduction,
        )
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class or self.default_features_extractor,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        self.net_arch = [256, 256, 256] if net_arch is None else net_arch
        self.activation_fn = activation_fn
        self.layer_norm = layer_norm
        self.time_fourier_dim = time_fourier_dim
        self.time_embedding_dim = time_embedding_dim
        self.actor_type = actor_type
        self.divergence_type = divergence_type
        self.critic_type = critic_type
        self.n_critics = n_critics
        self.n_atoms = n_atoms
        self.v_min = v_min
        self.v_max = v_max
        self.critic_reduction = critic_reduction
        self.share_features_extractor = share_features_extractor
        # Buffers, so that a checkpoint restores how the policy acts whatever it was constructed with
        self.register_buffer("sampling_times", th.empty(0))
        self.register_buffer("candidate_noise", th.empty(0))
        self.sampling_steps = sampling_steps
        self.n_action_candidates = n_action_candidates

        self._build(lr_schedule)

    @staticmethod
    def check_arguments(**kwargs: Any) -> None:
        """
        Check arguments of the constructor, those not given by their defaults.

        :param kwargs: Arguments by name; unknown names are left to the constructor
        :raises ValueError: If one is out of range; the message names it
        """
        parameters = inspect.signature(MFPOPolicy.__init__).parameters
        values = {**{name: parameter.default for name, parameter in parameters.items()}, **kwargs}

        for name in ("sampling_steps", "n_action_candidates", "n_critics", "time_embedding_dim"):
            check_integer(name, values[name], minimum=1)
        for name in ("n_atoms", "time_fourier_dim"):
            check_integer(name, values[name], minimum=2)
        if values["time_fourier_dim"] % 2 == 1:
            raise ValueError(f"`time_fourier_dim` must be even (cosines and sines), not {values['time_fourier_dim']}.")
        check_choice("actor_type", values["actor_type"], ACTOR_TYPES)
        check_choice("divergence_type", values["divergence_type"], DIVERGENCE_TYPES)
        check_choice("critic_type", values["critic_type"], CRITIC_TYPES)
        check_choice("critic_reduction", values["critic_reduction"], CRITIC_REDUCTIONS)
        check_range("v_min", values["v_min"])
        check_range("v_max", values["v_max"])
        if values["v_min"] >= values["v_max"]:
            raise ValueError(
                f"`v_min` must be below `v_max`, not v_min={values['v_min']}, v_max={values['v_max']}. They should enclose "
                "all discounted returns of the task."
            )
        if values["net_arch"] is not None:
            for arch in get_actor_critic_arch(values["net_arch"]):
                if len(arch) == 0:
                    raise ValueError(f"`net_arch` needs a hidden layer for actor and critic, not {values['net_arch']!r}.")
                for width in arch:
                    check_integer("net_arch", width, minimum=1)

    @property
    def sampling_steps(self) -> int:
        """Number of steps from noise to action; may be changed at any time, also on a trained model."""
        return len(self.sampling_times) - 1

    @sampling_steps.setter
    def sampling_steps(self, value: int) -> None:
        check_integer("sampling_steps", value, 1)
        self.sampling_times = th.linspace(1, 0, value + 1, device=self.sampling_times.device)

    @property
    def n_action_candidates(self) -> int:
        """Number of candidates of ``predict(deterministic=True)``; may be changed at any time, also on a trained model."""
        return len(self.candidate_noise)

    @n_action_candidates.setter
    def n_action_candidates(self, value: int) -> None:
        check_integer("n_action_candidates", value, 1)
        self.candidate_noise = spread_noise(value, get_action_dim(self.action_space)).to(self.candidate_noise.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The sizes of these buffers are settings: take those of the checkpoint
        for name in ("sampling_times", "candidate_noise"):
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Create the networks and the optimizers.

        :param lr_schedule: Learning rate schedule; ``lr_schedule(1)`` is the initial learning rate
        """
        actor_arch, critic_arch = get_actor_critic_arch(self.net_arch)
        self.actor = self.make_actor(actor_arch)
        self.actor.optimizer = self._make_optimizer(self.actor.parameters(), lr_schedule)

        if self.divergence_type == "exact":
            self.divergence = InstantaneousDivergence(self.actor)
        else:
            self.divergence = self.make_divergence(actor_arch)
            self.divergence.optimizer = self._make_optimizer(self.divergence.parameters(), lr_schedule)

        shared = self.actor.features_extractor if self.share_features_extractor else None
        self.critic = self.make_critic(critic_arch, shared)
        # A shared features extractor is optimized with the actor
        critic_parameters = [
            parameter
            for name, parameter in self.critic.named_parameters()
            if not (self.share_features_extractor and name.startswith("features_extractor."))
        ]
        self.critic.optimizer = self._make_optimizer(critic_parameters, lr_schedule)
        # The target never shares its features extractor: it lags behind
        self.critic_target = self.make_critic(critic_arch, None)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.set_training_mode(False)

    def _make_optimizer(self, parameters: Any, lr_schedule: Schedule) -> th.optim.Optimizer:
        kwargs = self.optimizer_kwargs
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and not kwargs.keys() & {
            "fused",
            "foreach",
            "differentiable",
        }:
            # All parameters in one operator
            kwargs = {**kwargs, "fused": True}
        return self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _flow_arguments(self, net_arch: Sequence[int], features_dim: int) -> dict[str, Any]:
        return dict(
            features_dim=features_dim,
            action_dim=get_action_dim(self.action_space),
            net_arch=net_arch,
            activation_fn=self.activation_fn,
            layer_norm=self.layer_norm,
            time_fourier_dim=self.time_fourier_dim,
            time_embedding_dim=self.time_embedding_dim,
        )

    def make_actor(self, net_arch: Sequence[int]) -> MeanFlowActor:
        """
        :param net_arch: Widths of the hidden layers
        :return: The actor, with a features extractor of its own
        """
        features_extractor = self.make_features_extractor()
        network = FlowMLP(
            **self._flow_arguments(net_arch, features_extractor.features_dim),
            output_dim=get_action_dim(self.action_space),
            instantaneous=self.actor_type == "flow_matching",
        )
        return MeanFlowActor(
            self.observation_space,
            self.action_space,
            features_extractor,
            network,
            self.normalize_images,
        ).to(self.device)

    def make_divergence(self, net_arch: Sequence[int]) -> AverageDivergenceNetwork:
        """
        :param net_arch: Widths of the hidden layers
        :return: The average divergence network
        """
        return AverageDivergenceNetwork(
            **self._flow_arguments(net_arch, self.actor.features_extractor.features_dim),
            output_dim=1,
            instantaneous=self.divergence_type == "flow_matching",
        ).to(self.device)

    def make_critic(self, net_arch: Sequence[int], features_extractor: BaseFeaturesExtractor | None) -> Critic:
        """
        :param net_arch: Widths of the hidden layers
        :param features_extractor: The actor's features extractor, to share it; None makes one
        :return: The critics
        """
        share = features_extractor is not None
        features_extractor = features_extractor or self.make_features_extractor()
        kwargs = dict(
            observation_space=self.observation_space,
            action_space=self.action_space,
            features_extractor=features_extractor,
            features_dim=features_extractor.features_dim,
            net_arch=net_arch,
            activation_fn=self.activation_fn,
            layer_norm=self.layer_norm,
            n_critics=self.n_critics,
            share_features_extractor=share,
            normalize_images=self.normalize_images,
        )
        if self.critic_type == "scalar":
            return ScalarCritic(**kwargs).to(self.device)
        atoms = th.linspace(self.v_min, self.v_max, self.n_atoms)
        return CategoricalCritic(**kwargs, atoms=atoms).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lr_schedule=self._dummy_schedule,  # not needed for loading the policy alone
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            layer_norm=self.layer_norm,
            time_fourier_dim=self.time_fourier_dim,
            time_embedding_dim=self.time_embedding_dim,
            actor_type=self.actor_type,
            divergence_type=self.divergence_type,
            critic_type=self.critic_type,
            sampling_steps=self.sampling_steps,
            n_action_candidates=self.n_action_candidates,
            n_critics=self.n_critics,
            n_atoms=self.n_atoms,
            v_min=self.v_min,
            v_max=self.v_max,
            critic_reduction=self.critic_reduction,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            share_features_extractor=self.share_features_extractor,
        )
        return data

    def time_shares(self) -> tuple[th.Tensor, th.Tensor]:
        """
        :return: What actor and divergence make of the sampling times, as long as their weights stay the same: it serves all
            calls of ``sample``
        """
        return self.actor.network.time_shares(self.sampling_times), self.divergence.time_shares(self.sampling_times)

    def sample(
        self, features: th.Tensor, noise: th.Tensor, time_shares: tuple[th.Tensor, th.Tensor] | None = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Carry noise to actions in ``sampling_steps`` steps, with the change of log-density.

        :param features: The actor's state features, shape (B, ..., features_dim), broadcast against ``noise``
        :param noise: Standard-normal noise, shape (B, ..., d)
        :param time_shares: From the method of this name, if at hand
        :return: Actions clipped to [-1, 1], shape (B, ..., d); log-density in nats of the actions before the clip (as in the
            authors' code), shape (B, ...)
        """
        actor_shares, divergence_shares = time_shares or self.time_shares()

        def flow(features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, ...]:
            velocity = self.actor.network.on_grid(features, actor_shares)
            divergence = self.divergence.on_grid(features, divergence_shares)
            actions, log_prob = few_step_sample(velocity, noise, self.sampling_times, divergence)
            assert log_prob is not None
            return actions.clamp(-1, 1), log_prob

        return in_chunks(flow, features, noise)

    def solve(self, features: th.Tensor, noise: th.Tensor, n_steps: int) -> tuple[th.Tensor, th.Tensor]:
        """
        Carry noise to actions by an Euler solve of the instantaneous velocity, with its exact divergence: what ``sample``
        approximates in few steps.

        :param features: The actor's state features, shape (B, ..., features_dim), broadcast against ``noise``
        :param noise: Standard-normal noise, shape (B, ..., d)
        :param n_steps: Number of steps
        :return: Actions clipped to [-1, 1], shape (B, ..., d); log-density in nats before the clip, shape (B, ...); the latter
            without gradient
        """
        times = th.linspace(1, 0, n_steps + 1, device=noise.device)
        exact = InstantaneousDivergence(self.actor)

        def velocity(noisy_actions: th.Tensor, k: int) -> th.Tensor:
            return self.actor(features, noisy_actions, times[k, None], th.zeros_like(times[k, None]))

        actions, log_prob = few_step_sample(velocity, noise, times, exact.on_grid(features, exact.time_shares(times)))
        assert log_prob is not None
        return actions.clamp(-1, 1), log_prob

    def act(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        The actions of ``sample`` alone.

        :param features: The actor's state features, shape (B, ..., features_dim), broadcast against ``noise``
        :param noise: Standard-normal noise, shape (B, ..., d)
        :return: Actions clipped to [-1, 1], shape (B, ..., d)
        """
        network = self.actor.network
        velocity = network.on_grid(features, network.remembered_time_shares(self.sampling_times))
        return few_step_sample(velocity, noise, self.sampling_times)[0].clamp(-1, 1)

    def action_log_prob(self, obs: PyTorchObs, noise: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """
        Sample one action per observation, with its log-probability by the divergence network.

        :param obs: Batch of observations as tensors on the policy's device (see ``obs_to_tensor``)
        :param noise: Standard-normal noise to start from, shape (B, d); drawn if not given
        :return: Actions scaled to [-1, 1], shape (B, d); log-probabilities in nats of the scaled actions before they are
            clipped to the bounds, shape (B,)
        """
        features = self.actor.encode(obs)
        return self.sample(features, self._draw_noise(features) if noise is None else noise)

    def _draw_noise(self, features: th.Tensor) -> th.Tensor:
        return th.randn(len(features), self.candidate_noise.shape[1], device=features.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if not deterministic:
            features = self.actor.encode(observation)
            return self.act(features, self._draw_noise(features))
        # One by one: the rounding of a matrix product depends on the number of rows, and where two candidates are nearly
        # equal that could change which one wins. The copy gives every row the same memory alignment.
        if isinstance(observation, dict):
            n = len(next(iter(observation.values())))
            rows: list[PyTorchObs] = [{key: value[i : i + 1].clone() for key, value in observation.items()} for i in range(n)]
        else:
            rows = [observation[i : i + 1].clone() for i in range(len(observation))]
        return th.stack([self._best_candidate(row) for row in rows])

    def _best_candidate(self, observation: PyTorchObs) -> th.Tensor:
        """
        The best, by the target critics, of the actions that ``candidate_noise`` leads to. The authors draw fresh noise; fixed
        noise makes the action a function of the weights and the observation alone.

        :param observation: A single observation, with batch dimension
        :return: Action in [-1, 1], shape (d,)
        """
        candidates = self.act(self.actor.encode(observation), self.candidate_noise)
        if len(candidates) == 1:
            return candidates[0]
        q_values = self.critic_target.q_values(self.critic_target.encode(observation), candidates)
        return candidates[reduce_values(q_values, self.critic_reduction).argmax()]

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode, which affects batch normalisation and dropout. The target
        critics always stay in evaluation mode.

        :param mode: Training mode if true, else evaluation mode
        """
        actor, divergence, critic = self.actor, self.divergence, self.critic
        # Every prediction asks for evaluation mode, and going through all layers costs as much as an action
        if self.training == actor.training == divergence.training == critic.training == mode:
            return
        for module in (actor, divergence, critic):
            module.train(mode)
        self.training = mode


MlpPolicy = MFPOPolicy


class CnnPolicy(MFPOPolicy):
    """``MFPOPolicy`` for images, with ``NatureCNN`` as features extractor."""

    default_features_extractor = NatureCNN


class MultiInputPolicy(MFPOPolicy):
    """``MFPOPolicy`` for Dict observations, with ``CombinedExtractor`` as features extractor."""

    default_features_extractor = CombinedExtractor
