"""
The network of a state, a noisy action and a time interval, its tangents, and the mean-flow actor on top of it.

The network can be linearised: one forward pass gives the output and a function that multiplies the Jacobian by tangents. The
activations of that pass serve both the gradient and any number of tangents, which carry no gradient themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn import functional as F

from sb3_mfpo.maths.mean_flow import few_step_sample, sampling_grid
from sb3_mfpo.nets.actor import GenerativeActor
from sb3_mfpo.nets.layers import BroadcastLinear, MultiInputMLP, TanhGELU, in_chunks

# Carries a tangent of some rows of a point to the tangent of the output, without gradient. The rows index the point.
JVP = Callable[[th.Tensor, Any], th.Tensor]
ALL_ROWS = slice(None)


class PairLinear(nn.Module):
    """
    Two linear layers side by side, as one batched product.

    :param in_features: Size of the input
    :param out_features: Size of the output
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        # The authors' initialisation, as that of all linear layers
        bound = math.sqrt(6 / (in_features + out_features))
        self.weight = nn.Parameter(th.empty(2, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(th.zeros(2, 1, out_features))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape (2, B, in_features)
        :return: shape (2, B, out_features)
        """
        return th.baddbmm(self.bias, x, self.weight)


class IntervalEmbedding(nn.Module):
    """
    Embedding of a time interval [r, t]: the sum of one of t and one of h = t - r, each of them learned Fourier features
    followed by a small MLP (paper, App. on implementation details).

    :param fourier_dim: Number of Fourier features of each, cosines and sines together (even)
    :param embedding_dim: Width of both layers of the MLPs, and of the embedding
    :param activation_fn: Makes the activation between the two layers
    :param instantaneous: Ignore the length of the interval
    """

    # Standard deviation of the initial frequencies (authors' code)
    FREQUENCY_STD = 0.2

    phases: th.Tensor

    def __init__(
        self, fourier_dim: int, embedding_dim: int, activation_fn: Callable[[], nn.Module], instantaneous: bool = False
    ):
        super().__init__()
        self.instantaneous = instantaneous
        self.frequencies = nn.Parameter(self.FREQUENCY_STD * th.randn(2, 1, 1, fourier_dim // 2))
        # A cosine is a sine a quarter of a turn later
        self.register_buffer("phases", th.tensor([[math.pi / 2], [0.0]]), persistent=False)
        self.mlp = nn.Sequential(
            PairLinear(fourier_dim, embedding_dim), activation_fn(), PairLinear(embedding_dim, embedding_dim)
        )

    def forward(self, t: th.Tensor, h: th.Tensor) -> th.Tensor:
        """
        :param t: End of the interval in [0, 1], shape (..., 1)
        :param h: Its length in [0, t], shape (..., 1)
        :return: shape (..., embedding_dim)
        """
        return self.mlp(self.fourier_features(t, h)).sum(dim=0).view(*t.shape[:-1], -1)

    def fourier_features(self, t: th.Tensor, h: th.Tensor) -> th.Tensor:
        """
        Cosines, then sines, of ``2 pi time * frequency``.

        :param t: End of the interval in [0, 1], shape (..., 1)
        :param h: Its length in [0, t], shape (..., 1)
        :return: Features of t and of h in [-1, 1], shape (2, B, fourier_dim)
        """
        return self._angles(t, h).sin().flatten(-2)

    def _times(self, t: th.Tensor, h: th.Tensor) -> th.Tensor:
        return th.stack([t, th.zeros_like(h) if self.instantaneous else h]).view(2, -1, 1, 1)

    def _angles(self, t: th.Tensor, h: th.Tensor) -> th.Tensor:
        return th.addcmul(self.phases, self._times(t, h), self.frequencies, value=2 * math.pi)

    def linearize(self, t: th.Tensor, h: th.Tensor) -> tuple[th.Tensor, JVP]:
        """
        By hand, for networks that ``is_bare`` alone.

        :param t: End of the interval in [0, 1], shape (B, ..., 1)
        :param h: Its length in [0, t], shape (B, ..., 1)
        :return: The embedding; the function that carries a tangent of t, which as r is fixed is that of h, too
        """
        angles = self._angles(t, h)
        output, jvp = linearize_layers(self.mlp, angles.sin().flatten(-2))

        def jvp_of_time(tangent: th.Tensor, rows: Any) -> th.Tensor:
            speed = 2 * math.pi * self._times(tangent, tangent) * self.frequencies
            return jvp((angles[:, rows].cos() * speed).flatten(-2), (ALL_ROWS, rows)).sum(dim=0)

        return output.sum(dim=0).view(*t.shape[:-1], -1), jvp_of_time


class ActionFeatures(nn.Module):
    """
    A noisy action beside its random Fourier features, cosines and sines of ``2 pi frequency . action``. An MLP learns smooth
    functions of its inputs first; a flow towards several modes is a saw, which these make smooth ("Fourier Features Let
    Networks Learn High Frequency Functions in Low Dimensional Domains", https://arxiv.org/abs/2006.10739).

    :param action_dim: Number of action coordinates d
    :param fourier_dim: Number of features, cosines and sines together (even)
    :param std: Standard deviation of the frequencies over all coordinates together, in turns per unit of action; in each it
        is ``std / sqrt(d)``
    """

    frequencies: th.Tensor
    phases: th.Tensor

    def __init__(self, action_dim: int, fourier_dim: int, std: float):
        super().__init__()
        frequencies = 2 * math.pi * std / math.sqrt(action_dim) * th.randn(fourier_dim // 2, action_dim)
        # A cosine is a sine a quarter of a turn later
        self.register_buffer("frequencies", frequencies.repeat(2, 1))
        self.register_buffer("phases", th.tensor([math.pi / 2, 0.0]).repeat_interleave(fourier_dim // 2), persistent=False)

    def forward(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: shape (..., d)
        :return: The action, then its features in [-1, 1], shape (..., d + fourier_dim)
        """
        return th.cat([actions, F.linear(actions, self.frequencies, self.phases).sin()], dim=-1)

    def linearize(self, actions: th.Tensor) -> tuple[th.Tensor, JVP]:
        """
        :param actions: shape (B, ..., d)
        :return: What ``forward`` returns; the function that carries a tangent of the action, without gradient
        """
        angles = F.linear(actions, self.frequencies, self.phases)
        slopes = angles.detach().cos()

        def jvp(tangent: th.Tensor, rows: Any) -> th.Tensor:
            return th.cat([tangent, slopes[rows] * F.linear(tangent, self.frequencies)], dim=-1)

        return th.cat([actions, angles.sin()], dim=-1), jvp


class MeanFlowMLP(MultiInputMLP):
    """
    Network of a state, a noisy action and a time interval [r, t]: the mean-flow actor and the average divergence network.

    :param features_dim: Size of the state's features
    :param action_dim: Number of action coordinates
    :param output_dim: Size of the output
    :param net_arch: Widths of the hidden layers
    :param activation_fn: Makes the activations
    :param layer_norm: Whether to use LayerNorm in the hidden layers
    :param time_fourier_dim: Number of Fourier features of each of t and t - r
    :param time_embedding_dim: Size of the interval's embedding
    :param action_fourier_dim: Number of Fourier features of the noisy action, see ``ActionFeatures``; 0 leaves it alone
    :param action_fourier_std: Standard deviation of their frequencies
    :param instantaneous: Ignore the interval's length and return the value at t, as in flow matching (an ablation)
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        output_dim: int,
        net_arch: Sequence[int],
        activation_fn: Callable[[], nn.Module],
        layer_norm: bool,
        time_fourier_dim: int,
        time_embedding_dim: int,
        action_fourier_dim: int,
        action_fourier_std: float,
        instantaneous: bool,
    ):
        input_dims = [action_dim + action_fourier_dim, features_dim, time_embedding_dim]
        # The bias goes with the state's features
        super().__init__(input_dims, 1, output_dim, net_arch, activation_fn, layer_norm)
        self.lift: ActionFeatures | None = None
        if action_fourier_dim > 0:
            self.lift = ActionFeatures(action_dim, action_fourier_dim, action_fourier_std)
            # A policy starts smooth: random functions of the features would be noise that it has to unlearn
            with th.no_grad():
                self.input_layer.weight[:, action_dim : action_dim + action_fourier_dim] = 0
        self.embed = IntervalEmbedding(time_fourier_dim, time_embedding_dim, activation_fn, instantaneous)

    def forward(  # type: ignore[override]
        self, features: th.Tensor, noisy_actions: th.Tensor, interval: th.Tensor
    ) -> th.Tensor:
        """
        All leading dimensions broadcast: features of shape (B, 1, S) serve K actions each, of shape (B, K, d), and an interval
        of shape (1, E) serves them all.

        :param features: State features, shape (..., features_dim)
        :param noisy_actions: Points on the flow's path, shape (..., action_dim)
        :param interval: Embedding of the time interval, from ``embed``, shape (..., time_embedding_dim)
        :return: Average over the interval, shape (..., output_dim)
        """
        # Within `autocast` layers return fewer digits
        return super().forward(self._lifted(noisy_actions), features, interval).to(noisy_actions.dtype)

    def hidden_activations(  # type: ignore[override]
        self, noisy_actions: th.Tensor, *inputs: th.Tensor
    ) -> list[th.Tensor]:
        return super().hidden_activations(self._lifted(noisy_actions), *inputs)

    def _lifted(self, noisy_actions: th.Tensor) -> th.Tensor:
        return noisy_actions if self.lift is None else self.lift(noisy_actions)

    def linearize(
        self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, h: th.Tensor
    ) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        """
        :param features: State features, shape (B, ..., features_dim)
        :param noisy_actions: Points on the flow's path, shape (B, ..., action_dim)
        :param t: End of the interval in [0, 1], shape (B, ..., 1)
        :param h: Length h = t - r of the interval in [0, t], shape (B, ..., 1)
        :return: What ``forward`` returns, and the function that carries tangents to that of the output, without gradient:
            ``(action_tangent, time_tangent=None, rows=slice(None))``, the time tangent being that of t and, as r is fixed, of
            h
        """
        if not is_bare(self):
            return self._linearize_calls(features, noisy_actions, t, h)
        interval, jvp_of_interval = self.embed.linearize(t, h)
        lifted, jvp_of_lift = (noisy_actions, None) if self.lift is None else self.lift.linearize(noisy_actions)
        output, jvp_of_hidden = linearize_layers(self.body, self.input_layer(lifted, features, interval))
        action_weight, _, interval_weight = self.input_layer.weight.split(self.input_layer.input_dims, dim=1)

        @th.no_grad()
        def jvp(action_tangent: th.Tensor, time_tangent: th.Tensor | None = None, rows: slice = ALL_ROWS) -> th.Tensor:
            lifted_tangent = action_tangent if jvp_of_lift is None else jvp_of_lift(action_tangent, rows)
            tangent = F.linear(lifted_tangent, action_weight)
            if time_tangent is not None:
                tangent = tangent + F.linear(jvp_of_interval(time_tangent, rows), interval_weight)
            return jvp_of_hidden(tangent, rows)

        return output, jvp

    def _linearize_calls(
        self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, h: th.Tensor
    ) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        # One point of all that moves
        times = [time.expand(*noisy_actions.shape[:-1], 1) for time in (t, h)]
        point = th.cat([noisy_actions, *times], dim=-1)

        def call(point: th.Tensor) -> th.Tensor:
            noisy_actions, t, h = point.split([point.shape[-1] - 2, 1, 1], dim=-1)
            return self(features, noisy_actions, self.embed(t, h))

        output, jvp_of_point = linearize_function(call, point)

        def jvp(action_tangent: th.Tensor, time_tangent: th.Tensor | None = None, rows: slice = ALL_ROWS) -> th.Tensor:
            if time_tangent is None:
                time_tangent = th.zeros_like(action_tangent[..., :1])
            return jvp_of_point(th.cat([action_tangent, time_tangent, time_tangent], dim=-1), rows)

        return output, jvp


def is_bare(network: nn.Module) -> bool:
    """
    Whether calling a network does what the classes of its modules say and nothing else, so that it may be differentiated by
    hand. Pruning and gradient hooks are hooks, too.

    :param network: Any module
    :return: Whether none of its modules has hooks, parametrizations or a ``forward`` of its own, and nothing is cast
    """
    kinds = (MeanFlowMLP, ActionFeatures, IntervalEmbedding, PairLinear, BroadcastLinear, nn.Sequential)
    formulas = {kind: kind.forward for kind in kinds}
    for module in network.modules():
        hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        if hooks or "forward" in module.__dict__ or "parametrizations" in module._modules:
            return False
        if any(type(module).forward is not forward for kind, forward in formulas.items() if isinstance(module, kind)):
            return False
    device = next(network.parameters()).device.type
    return not (nn.modules.module._has_any_global_hook() or th.is_autocast_enabled(device))


def linearize_layers(layers: Iterable[nn.Module], x: th.Tensor) -> tuple[th.Tensor, JVP]:
    """
    Output of a chain of bare layers, and the product of its Jacobian with tangents.

    :param layers: Layers that act on the last dimension, row by row
    :param x: Input, shape (B, ..., input_dim)
    :return: Output, shape (B, ..., output_dim); the function that carries a tangent, shape (rows, ..., input_dim) or
        (N, rows, ..., input_dim)
    """
    jvps = []
    for layer in layers:
        x, jvp = _linearize_layer(layer, x)
        jvps.append(jvp)

    @th.no_grad()
    def jvp_of_all(tangent: th.Tensor, rows: Any) -> th.Tensor:
        return reduce(lambda value, jvp: jvp(value, rows), jvps, tangent)

    return x, jvp_of_all


def _linearize_layer(layer: nn.Module, x: th.Tensor) -> tuple[th.Tensor, JVP]:
    point = x.detach()
    if type(layer) is nn.Linear:
        return layer(x), lambda tangent, rows: F.linear(tangent, layer.weight)
    if type(layer) is PairLinear:
        return layer(x), lambda tangent, rows: tangent @ layer.weight
    if type(layer) is TanhGELU:
        return layer(x), lambda tangent, rows: th.ops.aten.gelu_backward(tangent, point[rows], approximate="tanh")
    if type(layer) is nn.LayerNorm and layer.elementwise_affine:
        output, mean, scale = th.native_layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)

        def jvp(tangent: th.Tensor, rows: Any) -> th.Tensor:
            normalised = (point[rows] - mean[rows]) * scale[rows]
            centred = tangent - tangent.mean(dim=-1, keepdim=True)
            along = (centred * normalised).mean(dim=-1, keepdim=True)
            return th.addcmul(centred, normalised, along, value=-1) * (scale[rows] * layer.weight)

        return output, jvp
    # Whatever a user has chosen as activation
    return linearize_function(layer, x)


@th.compiler.disable
def linearize_function(function: Callable[[th.Tensor], th.Tensor], x: th.Tensor) -> tuple[th.Tensor, JVP]:
    """
    Output of any function, and the product of its Jacobian with tangents, both from the same evaluation: hooks run once, and
    random numbers are drawn once. The gradient of ``J^T w`` with respect to ``w`` is J.

    :param function: Any function that works row by row and that autograd can differentiate twice
    :param x: Its argument, shape (B, ..., input_dim)
    :return: As ``linearize_layers``
    """
    with_gradient = th.is_grad_enabled()
    with th.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        # The function gets a copy, as it may work in place
        output = function(x.clone())
        cotangent = th.zeros_like(output, requires_grad=True)
        # What is added has derivative 0, which a constant lacks
        (product,) = th.autograd.grad(output + 0 * x.sum(), x, cotangent, create_graph=True)

    def jvp_of_one(tangent: th.Tensor, rows: Any) -> th.Tensor:
        # The other rows stay as they are
        vector = th.zeros_like(product)
        vector[rows] = tangent
        return th.autograd.grad(product, cotangent, vector, retain_graph=True)[0][rows]

    @th.no_grad()
    def jvp(tangent: th.Tensor, rows: Any) -> th.Tensor:
        if tangent.dim() == x.dim():
            return jvp_of_one(tangent, rows)
        return th.stack([jvp_of_one(one, rows) for one in tangent])

    return (output if with_gradient else output.detach()), jvp


class MeanFlowActor(GenerativeActor):
    """
    Average velocity u(s, a_t, r, t) of the flow that carries noise (t = 1) to actions (t = 0), and the steps along it.

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Network to extract features
    :param net_arch: Widths of the hidden layers
    :param activation_fn: Makes the activations
    :param layer_norm: Whether to use LayerNorm in the hidden layers
    :param time_fourier_dim: Number of Fourier features of each of t and t - r
    :param time_embedding_dim: Size of their embeddings, which are added
    :param action_fourier_dim: Number of Fourier features of the noisy action; 0 leaves it alone
    :param action_fourier_std: Standard deviation of their frequencies, in turns per unit of action
    :param sampling_steps: Number of steps T from noise to action
    :param sampling_power: Where they end, see :func:`sb3_mfpo.maths.mean_flow.sampling_grid`
    :param instantaneous: Ignore the interval's length and return the velocity at t, as in flow matching (an ablation)
    :param normalize_images: Whether to divide images by 255
    """

    sampling_times: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        net_arch: Sequence[int],
        activation_fn: Callable[[], nn.Module],
        layer_norm: bool,
        time_fourier_dim: int,
        time_embedding_dim: int,
        action_fourier_dim: int,
        action_fourier_std: float,
        sampling_steps: int,
        sampling_power: float,
        instantaneous: bool,
        normalize_images: bool = True,
    ):
        super().__init__(observation_space, action_space, features_extractor, normalize_images)
        self.network_arguments: dict[str, Any] = dict(
            net_arch=net_arch,
            activation_fn=activation_fn,
            layer_norm=layer_norm,
            time_fourier_dim=time_fourier_dim,
            time_embedding_dim=time_embedding_dim,
            action_fourier_dim=action_fourier_dim,
            action_fourier_std=action_fourier_std,
            instantaneous=instantaneous,
        )
        action_dim = get_action_dim(action_space)
        self.network = MeanFlowMLP(features_extractor.features_dim, action_dim, action_dim, **self.network_arguments)
        self.sampling_power = sampling_power
        # A buffer, so that a checkpoint restores how the actor acts whatever it was constructed with
        self.register_buffer("sampling_times", sampling_grid(sampling_steps, sampling_power))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = dict(sampling_steps=self.sampling_steps, sampling_power=self.sampling_power)
        return super()._get_constructor_parameters() | self.network_arguments | own

    @property
    def sampling_steps(self) -> int:
        """Number of steps from noise to action; may be changed at any time, also on a trained actor."""
        return len(self.sampling_times) - 1

    @sampling_steps.setter
    def sampling_steps(self, value: int) -> None:
        self.sampling_times = sampling_grid(value, self.sampling_power).to(self.sampling_times.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The number of steps is a setting: take that of the checkpoint
        if (times := state_dict.get(prefix + "sampling_times")) is not None:
            self.sampling_times = self.sampling_times.new_empty(times.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def act(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        return self.flow(features, noise).clamp(-1, 1)

    def flow(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        Carry noise to actions, without clipping them to the bounds.

        :param features: State features, shape (B, ..., features_dim), broadcast against ``noise``
        :param noise: Standard-normal noise, shape (B, ..., d)
        :return: Actions, shape (B, ..., d)
        """
        intervals = embed_grid(self.network, self.sampling_times)

        def sample(features: th.Tensor, noise: th.Tensor) -> th.Tensor:
            def velocity(noisy_actions: th.Tensor, k: int) -> th.Tensor:
                return self.network(features, noisy_actions, intervals[k])

            return few_step_sample(velocity, noise, self.sampling_times)[0]

        return in_chunks(sample, features, noise)

    def linearize(
        self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, h: th.Tensor
    ) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        """
        Average velocity over [r, t], and its derivatives with respect to a_t and t: see ``MeanFlowMLP.linearize``.

        :param features: State features, shape (B, ..., features_dim)
        :param noisy_actions: a_t, shape (B, ..., d)
        :param t: End of the interval in [0, 1], shape (..., 1)
        :param h: Its length h = t - r in [0, t], shape (..., 1)
        :return: Average velocity, shape (B, ..., d); the function that multiplies the Jacobian by tangents, without gradient
        """
        return self.network.linearize(features, noisy_actions, t, h)

    def linearize_velocity(
        self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        """
        Instantaneous velocity v(s, a_t, t) = u(s, a_t, t, t), and its Jacobian with respect to a_t.

        :param features: State features, shape (B, ..., features_dim)
        :param noisy_actions: a_t, shape (B, ..., d)
        :param t: Time in [0, 1], shape (..., 1)
        :return: d a_t / dt, shape (B, ..., d); the function that multiplies the Jacobian by vectors, shape (N, B, ..., d),
            without gradient
        """
        return self.linearize(features, noisy_actions, t, th.zeros_like(t))


def embed_grid(network: nn.Module, times: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    Embed all intervals of a grid at once.

    :param network: Has the ``embed`` of ``MeanFlowMLP``
    :param times: Grid from 1 (noise) down to 0 (action), shape (T + 1,)
    :return: Embeddings of the T intervals, shape (1, time_embedding_dim) each
    """
    embed: Any = network.embed
    return embed(times[:-1, None], (times[:-1] - times[1:])[:, None]).split(1)
