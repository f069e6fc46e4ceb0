"""
Network building blocks: the time embedding and multilayer perceptrons whose inputs broadcast.

Networks here can be linearised: one forward pass gives the output and a function that multiplies the Jacobian by tangents. The
activations of that pass serve both the gradient and any number of tangents, which carry no gradient themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
JVP = Callable[[th.Tensor, slice], th.Tensor]
ALL_ROWS = slice(None)


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


def is_bare(module: nn.Module) -> bool:
    """
    Whether calling a module does what its class says and nothing else, so that its formula may be differentiated by hand.

    :param module: Any module; its children are not looked at
    :return: Whether it has no hooks (pruning and gradient hooks are some), no parametrizations and no ``forward`` of its own
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooks or "forward" in module.__dict__ or "parametrizations" in module._modules)


def has_global_hooks() -> bool:
    """
    :return: Whether hooks are registered that run at calls of all modules
    """
    module = nn.modules.module
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )


def linearize(layers: Iterable[nn.Module], x: th.Tensor) -> tuple[th.Tensor, JVP]:
    """
    Output of a chain of bare layers, and the product of its Jacobian with tangents.

    :param layers: Layers that act on the last dimension, row by row
    :param x: Input, shape (B, ..., input_dim)
    :return: Output, shape (B, ..., output_dim); the function that carries a tangent of some rows of the input, shape
        (N, rows, ..., input_dim) or (rows, ..., input_dim), to that of the output, without gradient
    """
    jvps = []
    for layer in layers:
        x, jvp = _linearize_layer(layer, x)
        jvps.append(jvp)

    @th.no_grad()
    def jvp_all(tangent: th.Tensor, rows: slice = ALL_ROWS) -> th.Tensor:
        return reduce(lambda value, jvp: jvp(value, rows), jvps, tangent)

    return x, jvp_all


def _linearize_layer(layer: nn.Module, x: th.Tensor) -> tuple[th.Tensor, JVP]:
    point = x.detach()
    if type(layer) is nn.Linear:
        return layer(x), lambda tangent, rows: F.linear(tangent, layer.weight)
    if type(layer) is TanhGELU:
        return layer(x), lambda tangent, rows: th.ops.aten.gelu_backward(tangent, point[rows], approximate="tanh")
    if type(layer) is nn.LayerNorm and layer.elementwise_affine:
        shape: Any = layer.normalized_shape
        output, mean, rstd = th.native_layer_norm(x, shape, layer.weight, layer.bias, layer.eps)

        def jvp(tangent: th.Tensor, rows: slice) -> th.Tensor:
            # The Jacobian of the normalisation itself is symmetric, so that its backward is its forward
            saved = [value.detach()[rows].expand(*tangent.shape[:-1], -1).contiguous() for value in (point, mean, rstd)]
            backward = th.ops.aten.native_layer_norm_backward
            normalised = backward(tangent, saved[0], shape, saved[1], saved[2], None, None, [True, False, False])[0]
            return normalised * layer.weight

        return output, jvp
    # Whatever a user has chosen as activation
    output, jvp_of_points = differentiate(layer, x)
    return output, lambda tangent, rows: jvp_of_points(tangent, rows=rows)


@th.compiler.disable
def differentiate(function: Callable[..., th.Tensor], *points: th.Tensor) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
    """
    Output of any function, and the product of its Jacobian with tangents, both from the same evaluation: hooks run once, and
    random numbers are drawn once. The gradient of ``J^T w`` with respect to ``w`` is J.

    :param function: Any function of the points that autograd can differentiate twice
    :param points: Tensors, of which the leading dimension of the first one counts the rows
    :return: The output; the function that carries tangents of the points (None for those that stay as they are) and the rows
        that they belong to (by keyword, all by default) to the tangent of the output, without gradient
    """
    with_gradient = th.is_grad_enabled()
    with th.enable_grad():
        points = tuple(point if point.requires_grad else point.detach().requires_grad_() for point in points)
        # The function gets copies, as it may work in place
        output = function(*(point.clone() for point in points))
        cotangent = th.zeros_like(output, requires_grad=True)
        if output.requires_grad:
            products = th.autograd.grad(output, points, cotangent, create_graph=True, materialize_grads=True)
        else:
            products = tuple(th.zeros_like(point) for point in points)

    @th.no_grad()
    def jvp_of_points(*tangents: th.Tensor | None, rows: slice = ALL_ROWS) -> th.Tensor:
        given = [(product, tangent) for product, tangent in zip(products, tangents, strict=True) if tangent is not None]
        product, tangent = given[0]
        if tangent.dim() == product.dim():
            return jvp_of_one(given, rows)
        return th.stack([jvp_of_one([(product, vectors[n]) for product, vectors in given], rows) for n in range(len(tangent))])

    def jvp_of_one(given: list[tuple[th.Tensor, th.Tensor]], rows: slice) -> th.Tensor:
        moving = [(product, tangent) for product, tangent in given if product.requires_grad]
        if not moving:
            return th.zeros_like(output[rows])
        # The other rows stay as they are
        vectors = [th.zeros_like(product) for product, _ in moving]
        for vector, (_, tangent) in zip(vectors, moving, strict=True):
            vector[rows] = tangent
        return th.autograd.grad([product for product, _ in moving], cotangent, vectors, retain_graph=True)[0][rows]

    return (output if with_gradient else output.detach()), jvp_of_points


def init_linear_layers(module: nn.Module) -> None:
    """
    Initialise every linear layer as the authors do: Xavier-uniform weights, zero biases.

    :param module: Module whose linear layers are initialised in place
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


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

    def jvp(self, *tangents: th.Tensor | None) -> th.Tensor:
        """
        :param tangents: Of the inputs, None for those that stay as they are
        :return: Tangent of the output
        """
        pairs = zip(tangents, self.weight.split(self.input_dims, dim=1), strict=True)
        return reduce(th.add, [F.linear(tangent, weight) for tangent, weight in pairs if tangent is not None])


class MultiInputMLP(nn.Module):
    """
    MLP on the concatenation of several inputs, which may broadcast against each other.

    :param input_dims: Size of the last dimension of each input, in the order of ``forward``
    :param bias_input: Index of the input whose share of the first layer holds the bias, see ``BroadcastLinear``
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
        self.input_layer = BroadcastLinear(input_dims, bias_input, net_arch[0])
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
        return self.body(self.input_layer(*inputs))

    def linearize(self, *inputs: th.Tensor) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        """
        By hand, for bare modules alone: see ``MeanFlowMLP.linearize``.

        :param inputs: As those of ``forward``
        :return: The output, and the function that carries tangents of the inputs (None for those that stay as they are) and
            the rows that they belong to (by keyword, all by default) to the tangent of the output
        """
        output, jvp = linearize(self.body, self.input_layer(*inputs))

        @th.no_grad()
        def jvp_of_inputs(*tangents: th.Tensor | None, rows: slice = ALL_ROWS) -> th.Tensor:
            return jvp(self.input_layer.jvp(*tangents), rows)

        return output, jvp_of_inputs

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
