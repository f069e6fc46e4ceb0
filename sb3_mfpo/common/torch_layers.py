"""Network building blocks: the time embedding and multilayer perceptrons whose inputs broadcast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch as th
from torch import nn
from torch.nn import functional as F

# The authors' networks are written in Flax, whose LayerNorm default this is (PyTorch's is 1e-5)
LAYER_NORM_EPS = 1e-6
# Rows that are evaluated at once without gradient on a CPU: at 256 numbers each, a hidden layer then stays in the cache
CACHED_ROWS = 1536
# Numbers from which on the arithmetic of an activation costs more than the calls
MANY_NUMBERS = 2**14


class TanhGELU(nn.Module):
    """
    The tanh approximation of GELU, which the authors' networks use.

    For many numbers without gradient it is computed as x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): the same
    function, at half the cost on a CPU.
    """

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Any shape
        :return: The same shape
        """
        if th.is_grad_enabled() or x.numel() < MANY_NUMBERS:
            return F.gelu(x, approximate="tanh")
        two_c = 2 * math.sqrt(2 / math.pi)
        result = (x * x).mul_(0.044715 * two_c).add_(two_c).mul_(x)
        return result.sigmoid_().mul_(x)


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


class MultiInputMLP(nn.Module):
    """
    MLP on the concatenation of several inputs, which may broadcast against each other.

    The first layer is applied to each input by itself and the results are added. This equals a layer on the
    concatenation, but an input that several rows share (the state of many candidate actions, the time of a whole
    batch) is multiplied only once.

    :param input_dims: Size of the last dimension of each input, in the order of ``forward``
    :param output_dim: Size of the output
    :param net_arch: Widths of the hidden layers, at least one
    :param activation_fn: Makes the activation of the hidden layers
    :param layer_norm: Whether to put a LayerNorm between each hidden layer and its activation
    """

    def __init__(
        self,
        input_dims: Sequence[int],
        output_dim: int,
        net_arch: Sequence[int],
        activation_fn: Callable[[], nn.Module],
        layer_norm: bool,
    ):
        super().__init__()
        self.input_dims = list(input_dims)
        self.input_layer = nn.Linear(sum(input_dims), net_arch[0])
        layers: list[nn.Module] = []
        for width, next_width in zip(net_arch, [*net_arch[1:], output_dim], strict=True):
            if layer_norm:
                layers.append(nn.LayerNorm(width, eps=LAYER_NORM_EPS))
            layers += [activation_fn(), nn.Linear(width, next_width)]
        self.body = nn.Sequential(*layers)

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: One tensor per entry of ``input_dims``, shapes (..., input_dim) with leading dimensions that
            broadcast
        :return: shape (..., output_dim)
        """
        n_rows = max(value.numel() // dim for value, dim in zip(inputs, self.input_dims, strict=True))
        if th.is_grad_enabled() or n_rows <= CACHED_ROWS or inputs[0].device.type != "cpu":
            return self._forward(*inputs)
        shape = th.broadcast_shapes(*(value.shape[:-1] for value in inputs))
        size = max(1, CACHED_ROWS * shape[0] // shape.numel())
        n_chunks = -(-shape[0] // size)
        # What has the leading dimension is split along it; the rest serves all chunks
        chunks = [
            value.split(size) if value.dim() == len(shape) + 1 and len(value) == shape[0] else [value] * n_chunks
            for value in inputs
        ]
        return th.cat([self._forward(*chunk) for chunk in zip(*chunks, strict=True)])

    def _forward(self, *inputs: th.Tensor) -> th.Tensor:
        weights = self.input_layer.weight.split(self.input_dims, dim=1)
        hidden = F.linear(inputs[0], weights[0], self.input_layer.bias)
        for value, weight in zip(inputs[1:], weights[1:], strict=True):
            hidden = hidden + F.linear(value, weight)
        return self.body(hidden)


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
        self.mlp = MultiInputMLP(
            [action_dim, features_dim, time_embedding_dim], output_dim, net_arch, activation_fn, layer_norm
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
        if self.instantaneous:
            length = th.zeros_like(length)
        return self.mlp(noisy_actions, features, self.time_embedding(t) + self.length_embedding(length))
