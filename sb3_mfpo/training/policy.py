"""The policy of any off-policy algorithm whose actor carries noise to actions: actor and critics, and how they act."""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_mfpo.checks import check_choice, check_integer, check_range
from sb3_mfpo.maths.categorical import reduce_values
from sb3_mfpo.nets.actor import GenerativeActor
from sb3_mfpo.nets.critics import CategoricalCritic, Critic, ScalarCritic
from sb3_mfpo.nets.layers import TanhGELU
from sb3_mfpo.runs.files import replacing
from sb3_mfpo.training.export import export_policy
from sb3_mfpo.training.return_scale import ReturnScale

CRITIC_REDUCTIONS = ("min", "mean")
CHOICES = {
    "critic_type": ("categorical", "scalar"),
    "value_init": ("uniform", "narrow"),
    "critic_reduction": CRITIC_REDUCTIONS,
}
MINIMA = {"n_action_candidates": 1, "n_critics": 1, "n_atoms": 2}
# What a policy is constructed with, besides its spaces
ARGUMENTS = (
    "net_arch",
    "activation_fn",
    "layer_norm",
    "critic_type",
    "n_action_candidates",
    "n_critics",
    "n_atoms",
    "v_min",
    "v_max",
    "value_range",
    "value_init",
    "critic_reduction",
    "features_extractor_class",
    "features_extractor_kwargs",
    "optimizer_class",
    "optimizer_kwargs",
    "share_features_extractor",
)


def _check_activation(activation_fn: Any) -> None:
    """
    :param activation_fn: Makes an activation
    :raises ValueError: If it makes none, or one that changes the number of units
    """
    activation = activation_fn()
    if not isinstance(activation, nn.Module):
        raise ValueError(f"`activation_fn` must make a `torch.nn.Module`, as `torch.nn.Tanh` does, not {activation!r}.")
    units = th.zeros(1, 8)
    if activation.eval()(units).shape != units.shape:
        raise ValueError(f"`activation_fn` must keep the number of units, which {activation} does not.")


def _check_optimizer(optimizer_class: Any, optimizer_kwargs: dict[str, Any]) -> None:
    """
    :param optimizer_class: Makes an optimizer
    :param optimizer_kwargs: Its further arguments
    :raises ValueError: If steps cannot be taken with it
    """
    if "lr" in optimizer_kwargs:
        raise ValueError("`optimizer_kwargs` must not hold `lr`: give `learning_rate` to the algorithm.")
    step = getattr(optimizer_class, "step", None)
    closure = None if step is None else inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"`optimizer_class` must take steps without a `closure`, which evaluates the loss again and which "
            f"{optimizer_class.__name__} needs: a gradient step sees its batch once. Choose another, such as Adam."
        )


def latin_hypercube_noise(n_points: int, dim: int) -> th.Tensor:
    """
    A fixed, well-spread set of standard-normal points: a Latin hypercube, so that every coordinate takes the quantiles
    (i + 1/2) / n_points once each. The same arguments give the same points on every machine (NumPy guarantees the stream of
    ``RandomState``). A single point is the origin.

    :param n_points: Number of points, at least 1
    :param dim: Number of coordinates
    :return: shape (n_points, dim)
    """
    random = np.random.RandomState(0)
    ranks = np.stack([random.permutation(n_points) for _ in range(dim)], axis=1)
    return th.special.ndtri(th.as_tensor((ranks + 0.5) / n_points)).float()


class GenerativePolicy(BasePolicy):
    """
    Policy with critics and an actor that carries noise to actions, whatever the actor is. A subclass makes the actor
    (``make_actor``) and ends its constructor with ``_build``. What is trained is ``actor`` and ``critic``; ``actor_target``,
    which acts, and ``critic_target`` follow them.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Widths of the hidden layers, [256, 256] by default, as SB3's SAC, or ``dict(pi=[...], qf=[...])``
    :param activation_fn: Activation function, or anything that makes one; tanh-approximated GELU by default
    :param layer_norm: Whether to use LayerNorm in all hidden layers
    :param critic_type: "categorical" (C51) or "scalar" (plain Q-networks, mean squared error)
    :param n_action_candidates: Number M of candidates of which ``predict(deterministic=True)`` takes the best; 1 takes the
        action that the centre of the noise leads to
    :param n_critics: Number of critic networks
    :param n_atoms: Number of atoms of the value distribution
    :param v_min: Lowest atom, in units of (soft, discounted) return; with ``v_max``, fixes the range of the values. By default
        it follows the returns.
    :param v_max: Highest atom
    :param value_range: Half-width of a range that follows the returns, in units of their scale, see
        :class:`sb3_mfpo.training.return_scale.ReturnScale`
    :param value_init: What the value distributions start as: "narrow" (around 0) or "uniform" (nearly so, as in MFPO's paper),
        which waits for them to narrow, see :func:`sb3_mfpo.maths.categorical.narrow_logits`
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
    actor: GenerativeActor
    actor_target: GenerativeActor
    critic: Critic
    critic_target: Critic
    candidate_noise: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: Callable[[], nn.Module] = TanhGELU,
        layer_norm: bool = True,
        *,
        critic_type: str = "categorical",
        n_action_candidates: int = 10,
        n_critics: int = 2,
        n_atoms: int = 101,
        v_min: float | None = None,
        v_max: float | None = None,
        value_range: float = 20.0,
        value_init: str = "narrow",
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
            activation_fn=activation_fn,
            critic_type=critic_type,
            n_action_candidates=n_action_candidates,
            n_critics=n_critics,
            n_atoms=n_atoms,
            v_min=v_min,
            v_max=v_max,
            value_range=value_range,
            value_init=value_init,
            critic_reduction=critic_reduction,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
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
        self.net_arch = [256, 256] if net_arch is None else net_arch
        self.activation_fn = activation_fn
        self.layer_norm = layer_norm
        self.critic_type = critic_type
        self.n_critics = n_critics
        self.n_atoms = n_atoms
        self.v_min = v_min
        self.v_max = v_max
        self.value_range = value_range
        self.value_init = value_init
        self.critic_reduction = critic_reduction
        self.share_features_extractor = share_features_extractor
        # A buffer, so that a checkpoint restores how the policy acts whatever it was constructed with; the actor, which comes
        # later, says how many coordinates the noise has
        self.register_buffer("candidate_noise", th.empty(n_action_candidates, 0))
        # Without it the critics' weights mean something else
        self.return_scale = ReturnScale(value_range) if v_min is None else None

    def get_extra_state(self) -> th.Tensor:
        """
        :return: What goes with the weights wherever they go: the state of the scale of the returns, float64, shape (5,), or
            (0,) with a fixed range of the values
        """
        return th.tensor([] if self.return_scale is None else self.return_scale.state(), dtype=th.float64)

    def set_extra_state(self, state: th.Tensor) -> None:
        """
        :param state: From ``get_extra_state``
        """
        if self.return_scale is not None and len(state):
            # Older ones begin with two more numbers
            self.return_scale.restore(state.tolist()[-5:])

    @classmethod
    def check_arguments(cls, **kwargs: Any) -> None:
        """
        Check arguments of this class's constructor. Those of a subclass may mean something else: its constructor is what calls
        this one.

        :param kwargs: Arguments by name; unknown names are left to the constructor
        :raises ValueError: If one is out of range; the message names it
        """
        for name, minimum in MINIMA.items():
            if name in kwargs:
                check_integer(name, kwargs[name], minimum)
        for name, choices in CHOICES.items():
            if name in kwargs:
                check_choice(name, kwargs[name], choices)
        if "value_range" in kwargs:
            check_range("value_range", kwargs["value_range"], above=0)
        cls._check_fixed_range(kwargs.get("v_min"), kwargs.get("v_max"))
        if kwargs.get("net_arch") is not None:
            for arch in get_actor_critic_arch(kwargs["net_arch"]):
                for width in arch:
                    check_integer("net_arch", width, minimum=1)
        if "activation_fn" in kwargs:
            _check_activation(kwargs["activation_fn"])
        _check_optimizer(kwargs.get("optimizer_class", th.optim.Adam), kwargs.get("optimizer_kwargs") or {})

    @staticmethod
    def _check_fixed_range(v_min: Any, v_max: Any) -> None:
        if v_min is None and v_max is None:
            return
        if v_min is None or v_max is None:
            raise ValueError(
                f"`v_min` and `v_max` go together, not v_min={v_min}, v_max={v_max}: give both for a fixed range of the "
                "values, or neither for one that follows the returns."
            )
        check_range("v_min", v_min)
        check_range("v_max", v_max)
        if v_min >= v_max:
            raise ValueError(
                f"`v_min` must be below `v_max`, not v_min={v_min}, v_max={v_max}. They should enclose all discounted returns "
                "of the task."
            )

    @property
    def device(self) -> th.device:
        """Where the policy is; SB3 looks through the parameters, which takes a tenth of the time of a single action."""
        return self.candidate_noise.device

    @property
    def n_action_candidates(self) -> int:
        """Number of candidates of ``predict(deterministic=True)``; may be changed at any time, also on a trained model."""
        return len(self.candidate_noise)

    @n_action_candidates.setter
    def n_action_candidates(self, value: int) -> None:
        check_integer("n_action_candidates", value, 1)
        self.candidate_noise = latin_hypercube_noise(value, self.actor_target.noise_dim).to(self.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The number of candidates is a setting: take that of the checkpoint
        if (noise := state_dict.get(prefix + "candidate_noise")) is not None:
            self.candidate_noise = self.candidate_noise.new_empty(noise.shape)
        # Weights of before there was an extra state
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _build(self, lr_schedule: Schedule) -> None:
        """
        Create networks and optimizers.

        :param lr_schedule: Learning rate schedule; ``lr_schedule(1)`` is the initial learning rate
        """
        actor_arch, critic_arch = get_actor_critic_arch(self.net_arch)
        self.actor = self.make_actor(actor_arch).to(self.device)
        self.actor_target = copy.deepcopy(self.actor)
        self.actor_target.set_training_mode(False)
        self.actor.optimizer = self._make_optimizer(self.actor.parameters(), lr_schedule)
        self.n_action_candidates = len(self.candidate_noise)

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

    @abstractmethod
    def make_actor(self, net_arch: Sequence[int]) -> GenerativeActor:
        """
        :param net_arch: Widths of the hidden layers
        :return: The actor, with a features extractor of its own
        """

    def make_critic(self, net_arch: Sequence[int], features_extractor: BaseFeaturesExtractor | None) -> Critic:
        """
        :param net_arch: Widths of the hidden layers
        :param features_extractor: The actor's features extractor, to share it; None makes one
        :return: The critics
        """
        kwargs = self.critic_arguments(net_arch, features_extractor)
        if self.critic_type == "scalar":
            return ScalarCritic(**kwargs).to(self.device)
        fixed = self.v_min is not None and self.v_max is not None
        ends = (self.v_min, self.v_max) if fixed else (-self.value_range, self.value_range)
        grid = th.linspace(*ends, self.n_atoms)  # type: ignore[arg-type]
        return CategoricalCritic(**kwargs, grid=grid, value_init=self.value_init).to(self.device)

    def critic_arguments(self, net_arch: Sequence[int], features_extractor: BaseFeaturesExtractor | None) -> dict[str, Any]:
        """
        :param net_arch: Widths of the hidden layers
        :param features_extractor: The actor's features extractor, to share it; None makes one
        :return: Arguments of every ``Critic`` but ``output_dim``
        """
        share = features_extractor is not None
        features_extractor = features_extractor or self.make_features_extractor()
        return dict(
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

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {name: getattr(self, name) for name in ARGUMENTS}

    def act(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        Carry noise to actions.

        :param features: The target actor's state features, shape (B, ..., features_dim), broadcast against ``noise``
        :param noise: Standard-normal noise, shape (B, ..., noise_dim)
        :return: Actions in [-1, 1], shape (B, ..., d)
        """
        return self.actor_target.act(features, noise)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        return self.actor.unscale_action(scaled_action)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._best_candidates(observation) if deterministic else self.actor_target(observation)

    def _best_candidates(self, observation: PyTorchObs) -> th.Tensor:
        """
        The best, by the target critics, of the actions that ``candidate_noise`` leads to. The authors draw fresh noise; fixed
        noise makes the action a function of the weights and the observation alone.

        :param observation: Batch of observations
        :return: Actions in [-1, 1], shape (B, d)
        """
        candidates = self.actor_target(observation, noise=self.candidate_noise)
        # Sizes are no plain numbers in `torch.jit.trace`
        if not th.jit.is_tracing() and candidates.shape[1] == 1:
            return candidates.squeeze(1)
        q_values = self.critic_target.q_values(self.critic_target.encode(observation).unsqueeze(1), candidates)
        best = reduce_values(q_values, self.critic_reduction).argmax(dim=1)
        return candidates.gather(1, best[:, None, None].expand(-1, -1, candidates.shape[2])).squeeze(1)

    def save_weights(self, path: str | Path) -> None:
        """
        Save the weights alone, in a file that holds nothing but tensors and names.

        :param path: The file's path
        """
        with replacing(Path(path)) as file:
            th.save(self.state_dict(), file)

    def load_weights(self, path: str | Path) -> None:
        """
        Load weights into a policy of the same architecture. Nothing is unpickled but tensors: a file from elsewhere cannot run
        code (PyTorch's ``weights_only``).

        :param path: A file from ``save_weights``
        :raises pickle.UnpicklingError: If the file holds anything else
        :raises RuntimeError: If the architecture is another one
        """
        self.load_state_dict(th.load(path, map_location=self.device, weights_only=True))

    def export(self, path: str | Path, deterministic: bool = True, vec_normalize: VecNormalize | None = None) -> None:
        """
        Write how the policy acts now to a file that needs neither this package nor, in ONNX, PyTorch. It holds all from the
        observation to the action: preprocessing, features extractor, candidates and their values, scaling to the bounds.

        Its inputs, for any batch size B, are ``observation`` of shape (B, ...) in the type of the observation space (for Dict
        spaces one input per key; images have their channels first) and, if not deterministic, ``noise``, standard-normal
        float32 of shape (B, noise_dim), where ``noise_dim`` is ``actor_target.noise_dim``. Its output is ``action``, of shape
        (B, ...), within the bounds of the action space. See docs/export.md.

        :param path: The file's path, in a folder that exists; ".onnx" writes ONNX, ".pt2" what ``torch.export.load`` reads
        :param deterministic: Whether to act as ``predict(deterministic=True)`` does, which takes the best candidate; else
            carry the given noise to an action
        :param vec_normalize: Normalise observations first, with its statistics of now
        :raises ValueError: If the suffix is another one, ``vec_normalize`` has another observation space, or a key of the
            observations is a name that the ONNX file has for something else
        :raises FileNotFoundError: If the folder does not exist
        :raises ImportError: If a package that ONNX needs is missing
        """
        export_policy(self, Path(path), deterministic, vec_normalize)

    def _networks(self) -> list[nn.Module]:
        """
        :return: What training trains
        """
        return [self.actor, self.critic]

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode, which affects batch normalisation and dropout. The targets
        always stay in evaluation mode.

        :param mode: Training mode if true, else evaluation mode
        """
        for network in self._networks():
            _set_mode(network, mode)
        for target in (self.actor_target, self.critic_target):
            _set_mode(target, False)
        if self.training != mode:
            self.training = mode


def _set_mode(network: nn.Module, mode: bool) -> None:
    """
    ``network.train(mode)``, which takes as long as an action, where any of its modules is in the other mode.

    :param network: Any module
    :param mode: Training mode if true, else evaluation mode
    """
    modules: list[nn.Module | None] = [network]
    # The list grows while it is read
    for module in modules:
        if module is not None:
            if module.training != mode:
                network.train(mode)
                return
            if module._modules:
                modules += module._modules.values()
