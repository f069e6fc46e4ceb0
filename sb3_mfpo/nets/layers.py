"""Network building blocks: GELU, evaluation in chunks, multilayer perceptrons whose inputs broadcast, initialisation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, cast

import torch as th
from torch import nn
from torch.nn import functional as F

# The authors' networks are written in Flax, whose LayerNorm default this is (PyTorch's is 1e-5)
LAYER_NORM_EPS = 1e-6
# Rows that are evaluated at once without gradient on a CPU: at 256 numbers each, a hidden layer then stays in the cache
CACHED_ROWS = 512
# Numbers from which on the arithmetic of an activation costs more than the calls
MANY_NUMBERS = 2**14


def is_traced() -> bool:
    """
    :return: Whether operators are recorded for inputs to come (``torch.jit.trace``, ``torch.export``, ``torch.compile``).
        Nothing may then depend on how many rows there are.
    """
    return th.jit.is_tracing() or th.compiler.is_compiling()


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
        if th.is_grad_enabled() or is_traced() or x.numel() < MANY_NUMBERS or x.device.type != "cpu":
            return F.gelu(x, approximate="tanh")
        two_c = 2 * math.sqrt(2 / math.pi)
        two_u = th.addcmul(x.new_full((), two_c), x, x, value=0.044715 * two_c).mul_(x)
        return two_u.sigmoid_().mul_(x)


def in_chunks(
    function: Callable[[th.Tensor, th.Tensor], th.Tensor | tuple[th.Tensor, ...]], features: th.Tensor, points: th.Tensor
) -> Any:
    """
    Evaluate a function of states and many points in chunks that stay in a CPU's cache. On other devices and with gradient it
    is evaluated at once: there, more and smaller operators only cost. While it is traced, too: the number of chunks would be
    that of one batch size.

    :param function: Maps features and points, row by row, to tensors whose leading dimension is that of the points
    :param features: State features, shape (B, ..., features_dim), or (1, ..., features_dim) for all points
    :param points: shape (B, ..., d)
    :return: What ``function(features, points)`` returns
    """
    if is_traced() or th.is_grad_enabled() or points.device.type != "cpu":
        return function(features, points)
    n_rows = points.shape[:-1].numel()
    if n_rows <= CACHED_ROWS:
        return function(features, points)
    size = max(1, CACHED_ROWS * len(points) // n_rows)
    point_chunks = points.split(size)
    feature_chunks = features.split(size) if len(features) == len(points) else [features] * len(point_chunks)
    outputs = [function(*chunks) for chunks in zip(feature_chunks, point_chunks, strict=True)]
    if isinstance(outputs[0], th.Tensor):
        return th.cat(outputs)  # type: ignore[arg-type]
    return tuple(th.cat(parts) for parts in zip(*outputs, strict=True))


class BroadcastLinear(nn.Linear):
    """
    Linear layer on the concatenation of several inputs, which may broadcast against each other.

    Where they do, the layer is applied to each input by itself and the results are added: an input that several rows share
    (the state of many candidate actions, the time of a whole batch) is multiplied only once.

    :param input_dims: Size of the last dimension of each input, in the order of ``forward``
    :param bias_input: Index of the input to whose share the bias is added; cheapest is one that many rows share
    :param out_features: Size of the output
    """

    def __init__(self, input_dims: Sequence[int], bias_input: int, out_features: int):
        super().__init__(sum(input_dims), out_features)
        self.input_dims = list(input_dims)
        self.bias_input = bias_input

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: One tensor per entry of ``input_dims``, shapes (..., input_dim) with leading dimensions that broadcast
        :return: shape (..., out_features)
        """
        if not is_traced() and all(value.shape[:-1] == inputs[0].shape[:-1] for value in inputs):
            # Nothing is shared: fewer operators
            return super().forward(th.cat(inputs, dim=-1))
        # The last inputs are shared by the most rows: add those first
        weights = self.weight.split(self.input_dims, dim=1)
        return reduce(
            th.add,
            [
                F.linear(inputs[index], weights[index], self.bias if index == self.bias_input else None)
                for index in reversed(range(len(inputs)))
            ],
        )


class MultiInputMLP(nn.Module):
    """
    MLP on the concatenation of several inputs, which may broadcast against each other.

    :param input_dims: Size of the last dimension of each input, in the order of ``forward``
    :param bias_input: Index of the input whose share of the first layer holds the bias, see ``BroadcastLinear``
    :param output_dim: Size of the output
    :param net_arch: Widths of the hidden layers; without any, the network is linear
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
        widths = [*net_arch, output_dim]
        self.input_layer = BroadcastLinear(input_dims, bias_input, widths[0])
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            if layer_norm:
                layers.append(nn.LayerNorm(width, eps=LAYER_NORM_EPS))
            layers += [activation_fn(), nn.Linear(width, next_width)]
        self.body = nn.Sequential(*layers)
        # As the authors do
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    @property
    def output_layer(self) -> nn.Linear:
        """The last layer, shape of its weight (output_dim, last of ``net_arch``)."""
        return cast(nn.Linear, [self.input_layer, *self.body][-1])

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: One tensor per entry of ``input_dims``, shapes (..., input_dim) with leading dimensions that
            broadcast
        :return: shape (..., output_dim)
        """
        return self.body(self.input_layer(*inputs))

    def hidden_activations(self, *inputs: th.Tensor) -> list[th.Tensor]:
        """
        :param inputs: As those of ``forward``
        :return: The hidden layers' activations, shapes (..., width)
        """
        hidden, activations = self.input_layer(*inputs), []
        for layer in self.body:
            if isinstance(layer, nn.Linear):
                activations.append(hidden)
            hidden = layer(hidden)
        return activations
