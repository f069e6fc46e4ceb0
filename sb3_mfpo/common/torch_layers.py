"""
Network building blocks: the time embedding and multilayer perceptrons whose inputs broadcast.

Networks here can be linearised: one forward pass gives the output and a function that multiplies the Jacobian by tangents. The
activations of that pass serve both the gradient and any number of tangents, which carry no gradient themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

# The authors' networks are written in Flax, whose LayerNorm default this is (PyTorch's is 1e-5)
LAYER_NORM_EPS = 1e-6
# Rows that are evaluated at once without gradient on a CPU: at 256 numbers each, a hidden layer then stays in the cache
CACHED_ROWS = 1024
# Numbers from which on the arithmetic of an activation costs more than the calls
MANY_NUMBERS = 2**14

# Takes a tangent, and the rows of the leading dimension that it belongs to
PushForward = Callable[[th.Tensor, slice], th.Tensor]
ALL_ROWS = slice(None)


class TanhGELU(nn.Module):
    """
    The tanh approximation of GELU, which the authors' networks use.

    For many numbers without gradient on a CPU it is computed as x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): the
    same function, at half the cost.
    """

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Any shape
        :return: The same shape
        """
        if th.is_grad_enabled() or x.numel() < MANY_NUMBERS or x.device.type != "cpu" or th.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        two_c = 2 * math.sqrt(2 / math.pi)
        two_u = th.addcmul(x.new_full((), two_c), x, x, value=0.044715 * two_c).mul_(x)
        return two_u.sigmoid_().mul_(x)


def in_chunks(
    function: Callable[[th.Tensor, th.Tensor], th.Tensor | tuple[th.Tensor, ...]], features: th.Tensor, points: th.Tensor
) -> Any:
    """
    Evaluate a function of states and many points in chunks that stay in a CPU's cache. On other devices, with gradient and
    within ``torch.compile``, it is evaluated at once: there, more and smaller operators only cost.

    :param function: Maps features and points, row by row, to tensors whose leading dimension is that of the points
    :param features: State features, shape (B, ..., features_dim), or (1, ..., features_dim) for all points
    :param points: shape (B, ..., d)
    :return: What ``function(features, points)`` returns
    """
    n_rows = points.shape[:-1].numel()
    if th.compiler.is_compiling() or th.is_grad_enabled() or n_rows <= CACHED_ROWS or points.device.type != "cpu":
        return function(features, points)
    size = max(1, CACHED_ROWS * len(points) // n_rows)
    point_chunks = points.split(size)
    feature_chunks = features.split(size) if len(features) == len(points) else [features] * len(point_chunks)
    outputs = [function(*chunks) for chunks in zip(feature_chunks, point_chunks, strict=True)]
    if isinstance(outputs[0], th.Tensor):
        return th.cat(outputs)  # type: ignore[arg-type]
    return tuple(th.cat(parts) for parts in zip(*outputs, strict=True))


def call(layer: nn.Module, x: th.Tensor) -> th.Tensor:
    """
    ``layer(x)``, but for layers without hooks past the machinery of module calls, which for a single action takes about as
    long as the arithmetic.

    :param layer: Any layer, or a ``Sequential`` of them
    :param x: Its input
    :return: Its output
    """
    if layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    kind, parameters = type(layer), layer._parameters
    if kind is nn.Linear:
        return F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
    if kind is nn.LayerNorm:
        shape: Any = layer.normalized_shape
        return F.layer_norm(x, shape, parameters["weight"], parameters["bias"], layer.eps)  # type: ignore[arg-type]
    if kind is TanhGELU:
        return layer.forward(x)
    if kind is nn.Sequential:
        return reduce(lambda value, child: call(child, value), layer._modules.values(), x)  # type: ignore[arg-type]
    return layer(x)


def linearize(layers: Iterable[nn.Module], x: th.Tensor) -> tuple[th.Tensor, PushForward]:
    """
    Output of a chain of layers, and the product of its Jacobian with tangents.

    :param layers: Layers that act on the last dimension, row by row
    :param x: Input, shape (B, ..., input_dim)
    :return: Output, shape (B, ..., output_dim); the function that carries a tangent of some rows of the input, shape
        (N, rows, ..., input_dim) or (rows, ..., input_dim), to that of the output, without gradient
    """
    push_forwards = []
    for layer in layers:
        x, push_forward = _linearize_layer(layer, x)
        push_forwards.append(push_forward)

    @th.no_grad()
    def push_all(tangent: th.Tensor, rows: slice = ALL_ROWS) -> th.Tensor:
        return reduce(lambda value, push_forward: push_forward(value, rows), push_forwards, tangent)

    return x, push_all


def _linearize_layer(layer: nn.Module, x: th.Tensor) -> tuple[th.Tensor, PushForward]:
    # An activation that works in place would move its own point
    point = x.detach().clone() if getattr(layer, "inplace", False) else x.detach()
    if isinstance(layer, nn.Linear):
        return layer(x), lambda tangent, rows: F.linear(tangent, layer.weight)
    if isinstance(layer, TanhGELU):
        return layer(x), lambda tangent, rows: th.ops.aten.gelu_backward(tangent, point[rows], approximate="tanh")
    if isinstance(layer, nn.LayerNorm):
        shape = layer.normalized_shape
        output, mean, rstd = th.native_layer_norm(x, shape, layer.weight, layer.bias, layer.eps)

        def push_forward(tangent: th.Tensor, rows: slice) -> th.Tensor:
            # The Jacobian of the normalisation itself is symmetric, so that its backward is its forward
            saved = [value.detach()[rows].expand(*tangent.shape[:-1], -1).contiguous() for value in (point, mean, rstd)]
            backward = th.ops.aten.native_layer_norm_backward
            normalised = backward(tangent, saved[0], shape, saved[1], saved[2], None, None, [True, False, False])[0]
            return normalised * layer.weight

        return output, push_forward
    # Whatever a user has chosen as activation. A Jacobian-vector product needs a point of its own memory
    return layer(x), lambda tangent, rows: th.func.jvp(layer, (point[rows].expand_as(tangent).clone(),), (tangent,))[1]


def fourier_features(time: th.Tensor, frequencies: th.Tensor) -> th.Tensor:
    """
    Cosines, then sines, of ``2 pi time * frequency``.

    :param time: Times or time differences in [0, 1], shape (..., 1)
    :param frequencies: Frequencies in cycles per unit of time, shape (n_frequencies,)
    :return: Features in [-1, 1], shape (..., 2 * n_frequencies)
    """
    angles = 2 * math.pi * time * frequencies
    return th.cat([angles.cos(), angles.sin()], dim=-1)


def init_linear_layers(module: nn.Module) -> None:
    """
    Initialise every linear layer as the authors do: Xavier-uniform weights, zero biases.

    :param module: Module whose linear layers are initialised in place
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class Memo:
    """
    Remembers what was made of some float32 tensors on a CPU, for as long as they stay the same.

    Fused optimizers and writes to ``.data`` leave no trace in a tensor's version counter. Therefore the first number of each
    tensor is compared as well: both change all numbers. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[th.Tensor, int, int, Any, float]] = []
        self._result: th.Tensor | None = None

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return type(self), ()

    def get(self, tensors: Callable[[], Iterable[th.Tensor]], function: Callable[[], th.Tensor]) -> th.Tensor:
        """
        :param tensors: Lists what the result depends on: the same tensors at every call
        :param function: Makes the result
        :return: The result, for reading only
        """
        for tensor, version, address, first_number, value in self._seen:
            if tensor._version != version or tensor.data_ptr() != address or first_number.item() != value:
                self._result = None
                break
        if self._result is None:
            first_numbers = [(tensor, tensor.detach().numpy().reshape(-1)[:1]) for tensor in tensors()]
            self._seen = [(tensor, tensor._version, tensor.data_ptr(), view, view.item()) for tensor, view in first_numbers]
            self._result = function()
        return self._result


class TimeEmbedding(nn.Module):
    """
    Embedding of a time: learned Fourier features followed by a small MLP (paper, App. on implementation details).

    :param fourier_dim: Number of Fourier features, cosines and sines together (even)
    :param embedding_dim: Width of both layers of the MLP, and of its output
    :param activation_fn: Makes the activation between the two layers
    """

    # Standard deviation of the initial frequencies (authors' code)
    FREQUENCY_STD = 0.2

    def __init__(self, fourier_dim: int, embedding_dim: int, activation_fn: Callable[[], nn.Module]):
        super().__init__()
        self.frequencies = nn.Parameter(self.FREQUENCY_STD * th.randn(fourier_dim // 2))
        self.mlp = nn.Sequential(
            nn.Linear(fourier_dim, embedding_dim),
            activation_fn(),
            nn.Linear(embedding_dim, embedding_dim),
        )

    def forward(self, time: th.Tensor) -> th.Tensor:
        """
        :param time: shape (..., 1)
        :return: shape (..., embedding_dim)
        """
        return self.mlp(fourier_features(time, self.frequencies))

    def linearize(self, time: th.Tensor) -> tuple[th.Tensor, PushForward]:
        """
        :param time: shape (B, ..., 1)
        :return: The embedding, and the function that carries a tangent of the time to that of the embedding
        """
        features = fourier_features(time, self.frequencies)
        output, push_forward = linearize(self.mlp, features)

        @th.no_grad()
        def push_time(tangent: th.Tensor, rows: slice = ALL_ROWS) -> th.Tensor:
            cos, sin = features.detach()[rows].chunk(2, dim=-1)
            speed = 2 * math.pi * tangent * self.frequencies
            return push_forward(th.cat([-sin * speed, cos * speed], dim=-1), rows)

        return output, push_time


class MultiInputMLP(nn.Module):
    """
    MLP on the concatenation of several inputs, which may broadcast against each other.

    Where they do, the first layer is applied to each input by itself and the results are added. This equals a layer on the
    concatenation, but an input that several rows share (the state of many candidate actions, the time of a whole batch) is
    multiplied only once.

    :param input_dims: Size of the last dimension of each input, in the order of ``forward``
    :param bias_input: Index of the input whose share of the first layer holds the bias; cheapest is one that many rows share
    :param output_dim: Size of the output
    :param net_arch: Widths of the hidden layers, at least one
    :param activation_fn: Makes the activation of the hidden layers
    :param layer_norm: Whether to put a LayerNorm between each hidden layer and its activation
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        bias_input: int,
        output_dim: int,
        net_arch: Sequence[int],
        activation_fn: Callable[[], nn.Module],
        layer_norm: bool,
    ):
        super().__init__()
        self.input_dims = list(input_dims)
        self.offsets = [sum(input_dims[:index]) for index in range(len(input_dims))]
        self.bias_input = bias_input
        self.input_layer = nn.Linear(sum(input_dims), net_arch[0])
        layers: list[nn.Module] = []
        for width, next_width in zip(net_arch, [*net_arch[1:], output_dim], strict=True):
            if layer_norm:
                layers.append(nn.LayerNorm(width, eps=LAYER_NORM_EPS))
            layers += [activation_fn(), nn.Linear(width, next_width)]
        self.body = nn.Sequential(*layers)

    def share(self, index: int, value: th.Tensor) -> th.Tensor:
        """
        What one input contributes to the first layer.

        :param index: Which input
        :param value: shape (..., input_dim)
        :return: shape (..., width)
        """
        return F.linear(value, self.weight_of(index), self.input_layer.bias if index == self.bias_input else None)

    def weight_of(self, index: int) -> th.Tensor:
        """
        :param index: Which input
        :return: The first layer's weight for it, shape (width, input_dim)
        """
        return self.input_layer.weight.narrow(1, self.offsets[index], self.input_dims[index])

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: One tensor per entry of ``input_dims``, shapes (..., input_dim) with leading dimensions that
            broadcast
        :return: shape (..., output_dim)
        """
        hidden = self._first_layer(inputs)
        return self.body(hidden) if th.is_grad_enabled() else call(self.body, hidden)

    def linearize(self, *inputs: th.Tensor) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        """
        :param inputs: As those of ``forward``
        :return: The output, and the function that carries tangents of the inputs (None for those that stay as they are) and
            the rows that they belong to (by keyword, all by default) to the tangent of the output
        """
        output, push_forward = linearize(self.body, self._first_layer(inputs))

        @th.no_grad()
        def push_inputs(*tangents: th.Tensor | None, rows: slice = ALL_ROWS) -> th.Tensor:
            weights = self.input_layer.weight.split(self.input_dims, dim=1)
            pairs = [(tangent, weight) for tangent, weight in zip(tangents, weights, strict=True) if tangent is not None]
            return push_forward(reduce(th.add, [F.linear(tangent, weight) for tangent, weight in pairs]), rows)

        return output, push_inputs

    def hidden_activations(self, *inputs: th.Tensor) -> list[th.Tensor]:
        """
        :param inputs: As those of ``forward``
        :return: The hidden layers' activations, shapes (..., width)
        """
        hidden, activations = self._first_layer(inputs), []
        for layer in self.body:
            if isinstance(layer, nn.Linear):
                activations.append(hidden)
            hidden = layer(hidden)
        return activations

    def _first_layer(self, inputs: tuple[th.Tensor, ...]) -> th.Tensor:
        if all(value.shape[:-1] == inputs[0].shape[:-1] for value in inputs):
            # Nothing is shared: fewer operators
            return self.input_layer(th.cat(inputs, dim=-1))
        # The last inputs are shared by the most rows: add those first
        return reduce(th.add, [self.share(index, inputs[index]) for index in reversed(range(len(inputs)))])


# The inputs of a FlowMLP's first layer
ACTIONS, FEATURES, TIME = range(3)


class FlowMLP(nn.Module):
    """
    Network of a state, a noisy action and a time interval [r, t]: the mean-flow actor and the average divergence network.

    :param features_dim: Size of the state's features
    :param action_dim: Number of action coordinates
    :param output_dim: Size of the output
    :param net_arch: Widths of the hidden layers
    :param activation_fn: Makes the activations
    :param layer_norm: Whether to use LayerNorm in the hidden layers
    :param time_fourier_dim: Number of Fourier features of each of t and t - r
    :param time_embedding_dim: Size of their embeddings, which are added
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
        instantaneous: bool,
    ):
        super().__init__()
        self.instantaneous = instantaneous
        self.time_embedding = TimeEmbedding(time_fourier_dim, time_embedding_dim, activation_fn)
        self.length_embedding = TimeEmbedding(time_fourier_dim, time_embedding_dim, activation_fn)
        self._times: th.Tensor | None = None
        self._memo = Memo()
        self.mlp = MultiInputMLP(
            [action_dim, features_dim, time_embedding_dim], FEATURES, output_dim, net_arch, activation_fn, layer_norm
        )
        init_linear_layers(self)

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, length: th.Tensor) -> th.Tensor:
        """
        All leading dimensions broadcast: features of shape (B, 1, S) serve K actions each, of shape (B, K, d), and times of
        shape (1,) serve them all.

        :param features: State features, shape (..., features_dim)
        :param noisy_actions: Points on the flow's path, shape (..., action_dim)
        :param t: End of the interval in [0, 1] (t = 1 is noise, t = 0 is the action), shape (..., 1)
        :param length: Length t - r of the interval in [0, t], shape (..., 1)
        :return: Average over the interval, shape (..., output_dim)
        """
        return self.mlp(noisy_actions, features, self.embed(t, length))

    def embed(self, t: th.Tensor, length: th.Tensor) -> th.Tensor:
        """
        :param t: End of the interval in [0, 1], shape (..., 1)
        :param length: Its length, shape (..., 1)
        :return: Embedding of the interval, shape (..., time_embedding_dim)
        """
        return self.time_embedding(t) + self.length_embedding(th.zeros_like(length) if self.instantaneous else length)

    def time_shares(self, times: th.Tensor) -> th.Tensor:
        """
        What the intervals of a grid contribute to the first layer, which is the same for all states and actions.

        :param times: Grid from 1 (noise) down to 0 (action), shape (T + 1,)
        :return: shape (T, width)
        """
        return self.mlp.share(TIME, self.embed(times[:-1, None], (times[:-1] - times[1:])[:, None]))

    def remembered_time_shares(self, times: th.Tensor) -> th.Tensor:
        """
        ``time_shares`` without gradient, computed again only when the weights or the times have changed: one action takes no
        longer than they do. On other devices a look at the weights would cost more.

        :param times: Grid from 1 (noise) down to 0 (action), shape (T + 1,)
        :return: shape (T, width), for reading only
        """
        if th.is_grad_enabled() or times.device.type != "cpu" or self.mlp.input_layer.weight.dtype != th.float32:
            return self.time_shares(times)
        if times is not self._times:
            self._times, self._memo = times, Memo()
        return self._memo.get(self._what_times_depend_on, lambda: self.time_shares(times))

    def _what_times_depend_on(self) -> Iterator[th.Tensor]:
        assert self._times is not None
        yield self._times
        for module in (self.time_embedding, self.length_embedding, self.mlp.input_layer):
            yield from module.parameters()

    def on_grid(self, features: th.Tensor, time_shares: th.Tensor) -> Callable[[th.Tensor, int], th.Tensor]:
        """
        The network at some states along a grid of times.

        :param features: State features, shape (..., features_dim)
        :param time_shares: From ``time_shares``
        :return: Function of noisy actions, shape (..., action_dim), and the number of the interval that they start from, which
            returns the average over that interval, shape (..., output_dim)
        """
        mlp = self.mlp
        state_share, action_weight, body = mlp.share(FEATURES, features), mlp.weight_of(ACTIONS), mlp.body
        shares = [state_share + time_share for time_share in time_shares]
        return lambda noisy_actions, k: call(body, F.linear(noisy_actions, action_weight).add_(shares[k]))

    def linearize(
        self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, length: th.Tensor
    ) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        """
        :param features: State features, shape (B, ..., features_dim)
        :param noisy_actions: Points on the flow's path, shape (B, ..., action_dim)
        :param t: End of the interval in [0, 1], shape (B, ..., 1)
        :param length: Length t - r of the interval in [0, t], shape (B, ..., 1)
        :return: What ``forward`` returns, and the function that carries tangents to that of the output, without gradient:
            ``(action_tangent, time_tangent=None, rows=slice(None))``, the time tangent being that of t and, as r is fixed, of
            the length
        """
        t_embedding, push_t = self.time_embedding.linearize(t)
        length_embedding, push_length = self.length_embedding.linearize(
            th.zeros_like(length) if self.instantaneous else length
        )
        output, push_forward = self.mlp.linearize(noisy_actions, features, t_embedding + length_embedding)

        def push_all(action_tangent: th.Tensor, time_tangent: th.Tensor | None = None, rows: slice = ALL_ROWS) -> th.Tensor:
            if time_tangent is None:
                return push_forward(action_tangent, None, None, rows=rows)
            embedding_tangent = push_t(time_tangent, rows)
            if not self.instantaneous:
                embedding_tangent = embedding_tangent + push_length(time_tangent, rows)
            return push_forward(action_tangent, None, embedding_tangent, rows=rows)

        return output, push_all
