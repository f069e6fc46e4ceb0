"""Networks: the fast paths equal the plain formulation."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import plain
import pytest
import torch as th
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from sb3_mfpo.nets import layers
from sb3_mfpo.nets.flow import ActionFeatures, IntervalEmbedding, MeanFlowMLP, embed_grid
from sb3_mfpo.nets.layers import MultiInputMLP, TanhGELU, in_chunks


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias_input", [0, 1, 2])
@pytest.mark.parametrize(
    "shapes",
    [[(5,), (5,), (5,)], [(5, 7), (5, 1), (1,)], [(700, 5), (700, 1), (1,)], [(700, 5), (1, 5), ()]],
    ids=str,
)
def test_inputs_broadcast_like_a_concatenation(shapes: list[tuple[int, ...]], bias_input: int, grad: bool) -> None:
    th.manual_seed(0)
    mlp = MultiInputMLP([3, 4, 2], bias_input, 6, [64, 32], TanhGELU, layer_norm=True)
    nn.init.normal_(mlp.input_layer.bias)
    inputs = [th.randn(*shape, dim) for shape, dim in zip(shapes, [3, 4, 2], strict=True)]
    with th.set_grad_enabled(grad):
        output = mlp(*inputs)
    assert output.requires_grad == grad
    assert output.shape == (*th.broadcast_shapes(*shapes), 6)
    assert th.allclose(output, plain.mlp(mlp, *inputs), atol=5e-6)


@pytest.mark.parametrize("n_points", [1, 3, 60])
@pytest.mark.parametrize("shared", [False, True])
def test_chunks_change_nothing(n_points: int, shared: bool) -> None:
    """50 states, or one, with few and with many points each; 60 x 50 is no multiple of a chunk."""
    features, points = th.randn(1 if shared else 50, 1, 3), th.randn(50, n_points, 2)
    rows: list[int] = []

    def function(features: th.Tensor, points: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        rows.append(points.shape[:-1].numel())
        return features.sum(-1) * points[..., 0], points * 2

    with th.no_grad():
        first, second = in_chunks(function, features, points)
        assert th.equal(in_chunks(lambda *chunk: function(*chunk)[0], features, points), first)
    assert th.equal(first, features.sum(-1) * points[..., 0]) and th.equal(second, points * 2)
    assert max(rows) <= layers.CACHED_ROWS
    assert len(rows) == 2 * -(-50 // (layers.CACHED_ROWS // n_points))


def test_chunks_are_not_cut_where_a_gradient_is_needed() -> None:
    points = th.randn(5000, 2, requires_grad=True)
    in_chunks(lambda features, points: points.square(), th.zeros(1, 1), points).sum().backward()
    assert th.allclose(points.grad, 2 * points)


def make_network(
    activation_fn: Callable[[], nn.Module] = TanhGELU,
    layer_norm: bool = True,
    action_fourier_dim: int = 6,
    instantaneous: bool = False,
    output_dim: int = 2,
) -> MeanFlowMLP:
    """A small one, whose features of the action count from the start."""
    network = MeanFlowMLP(4, 3, output_dim, [16, 12], activation_fn, layer_norm, 8, 6, action_fourier_dim, 0.5, instantaneous)
    nn.init.normal_(network.input_layer.weight, std=0.3)
    return network


def plain_call(network: MeanFlowMLP, features: th.Tensor, actions: th.Tensor, t: th.Tensor, length: th.Tensor) -> th.Tensor:
    return network(features, actions, network.embed(t, length))


ACTIVATIONS = [TanhGELU, nn.Tanh, nn.PReLU, lambda: nn.GELU(approximate="tanh"), lambda: nn.ELU(inplace=True)]


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("activation_fn", ACTIVATIONS, ids=["TanhGELU", "Tanh", "PReLU", "GELU", "ELU in place"])
@pytest.mark.parametrize("instantaneous", [True, False])
@pytest.mark.parametrize("action_fourier_dim", [0, 6])
def test_tangents_are_those_of_forward_mode(
    activation_fn: Callable[[], nn.Module], layer_norm: bool, instantaneous: bool, action_fourier_dim: int
) -> None:
    """Along the flow for the last rows, and for several vectors per point; double precision."""
    th.manual_seed(0)
    network = make_network(activation_fn, layer_norm, action_fourier_dim, instantaneous).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    features, actions, t = th.randn(9, 4).double(), th.randn(9, 3).double(), th.rand(9, 1).double()
    length, one = t * th.rand(9, 1).double(), th.ones(4, 1).double()
    velocity, probes = th.randn(4, 3).double(), th.randn(2, 9, 3).double()

    output, jvp = network.linearize(features, actions, t, length)
    assert output.requires_grad and th.allclose(output, plain_call(network, features, actions, t, length), atol=1e-12)
    rows = slice(5, None)
    along = jvp(velocity, one, rows=rows)
    _, expected = th.func.jvp(
        lambda a, t, length: plain_call(network, features[rows], a, t, length),
        (actions[rows], t[rows], length[rows]),
        (velocity, one, one),
    )
    assert not along.requires_grad and th.allclose(along, expected, atol=1e-12)
    products = jvp(probes)
    for probe, product in zip(probes, products, strict=True):
        _, expected = th.func.jvp(lambda a: plain_call(network, features, a, t, length), (actions,), (probe,))
        assert th.allclose(product, expected, atol=1e-12)


def double_output(network: MeanFlowMLP, name: str) -> None:
    network.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)


def prune_first_layer(network: MeanFlowMLP) -> None:
    prune.l1_unstructured(network.input_layer, "weight", 0.5)


def replace_forward(network: MeanFlowMLP) -> None:
    def tripled(*inputs: th.Tensor) -> th.Tensor:
        return 3 * MeanFlowMLP.forward(network, *inputs)

    network.forward = tripled


def own_layer(network: MeanFlowMLP) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: th.Tensor) -> th.Tensor:
            return 2 * super().forward(x)

    network.body[1] = Doubled(16, 12).double()


CHANGES: dict[str, Callable[[MeanFlowMLP], Any]] = {
    **{
        f"hook on {name or 'network'}": partial(double_output, name=name)
        for name in (
            "",
            "input_layer",
            "body",
            "body.0",
            "body.1",
            "lift",
            "embed",
            "embed.mlp.0",
        )
    },
    "backward hook": lambda network: network.register_full_backward_hook(lambda *args: None),
    "pruned first layer": prune_first_layer,
    "weight norm": lambda network: parametrizations.weight_norm(network.input_layer),
    "old weight norm": lambda network: nn.utils.weight_norm(network.body[1]),
    "spectral norm": lambda network: parametrizations.spectral_norm(network.body[1]),
    "forward of the instance": replace_forward,
    "own layer": own_layer,
    "constant": lambda network: network.register_forward_hook(lambda *args: th.ones(9, 2).double()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("change", CHANGES)
def test_tangents_of_a_changed_network_are_those_of_its_calls(change: str) -> None:
    """Hooks, pruning and parametrizations act on the output and on its derivatives."""
    networks = []
    for _ in range(2):
        th.manual_seed(0)
        networks.append(make_network(layer_norm=False).double())
        CHANGES[change](networks[-1])
    # Norms are iterated in a call
    network, twin = networks
    inputs = [th.randn(9, 4).double(), th.randn(9, 3).double(), th.rand(9, 1).double(), th.rand(9, 1).double()]
    vector, one = th.randn(9, 3).double(), th.ones(9, 1).double()
    expected, derivative = th.func.jvp(partial(plain_call, twin, inputs[0]), tuple(inputs[1:]), (vector, one, one))
    output, jvp = network.linearize(*inputs)
    assert th.allclose(output, expected, atol=1e-12)
    assert th.allclose(jvp(vector, one), derivative, atol=1e-12)
    rows = slice(6, None)
    assert th.allclose(jvp(vector[rows], one[rows], rows=rows), derivative[rows], atol=1e-12)
    both = jvp(th.stack([vector, 2 * vector]))
    assert both.shape == (2, 9, 2) and th.allclose(both[1], 2 * both[0], atol=1e-12)
    with th.no_grad():
        assert not network.linearize(*inputs)[0].requires_grad


@pytest.mark.parametrize("activation_fn", [nn.RReLU, lambda: nn.Dropout(0.5)], ids=["RReLU", "Dropout"])
def test_tangents_share_the_random_numbers_of_the_output(activation_fn: Callable[[], nn.Module]) -> None:
    network = make_network(activation_fn).double()
    inputs = [th.randn(9, 4).double(), th.randn(9, 3).double(), th.rand(9, 1).double(), th.rand(9, 1).double()]
    output, jvp = network.linearize(*inputs)
    vector, one, small = th.randn(9, 3).double(), th.ones(9, 1).double(), 1e-6
    # The output is linear in a small step, unless other units are dropped
    state = th.get_rng_state()
    th.manual_seed(0)
    output, jvp = network.linearize(*inputs)
    th.manual_seed(0)
    moved = network.linearize(
        inputs[0], *(point + small * tangent for point, tangent in zip(inputs[1:], (vector, one, one), strict=True))
    )[0]
    th.set_rng_state(state)
    assert th.allclose((moved - output) / small, jvp(vector, one), atol=1e-4)


def test_global_hooks_see_every_module_of_a_network() -> None:
    network = make_network()
    inputs = th.randn(9, 4), th.randn(9, 3), th.rand(9, 1), th.rand(9, 1)
    seen = []
    handle = register_module_forward_hook(lambda module, *args: seen.append(module))
    network.linearize(*inputs)
    handle.remove()
    assert set(seen) == set(network.modules()) and len(seen) == len(set(seen))


def test_the_linearised_output_has_the_gradient_of_forward() -> None:
    """The tangents read the activations and leave them as they are."""
    th.manual_seed(0)
    network = make_network()
    inputs = th.randn(9, 4), th.randn(9, 3), th.rand(9, 1), th.rand(9, 1)
    plain_call(network, *inputs).square().sum().backward()
    expected = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    output, jvp = network.linearize(*inputs)
    jvp(th.randn(9, 3), th.ones(9, 1))
    output.square().sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert th.allclose(parameter.grad, gradient, atol=1e-5)


def test_points_of_one_state_have_tangents_of_their_own() -> None:
    """Features (B, 1, S) and one time serve K points each."""
    network = make_network(output_dim=3)
    features, actions, t, vectors = th.randn(5, 1, 4), th.randn(5, 7, 3), th.rand(1), th.randn(2, 5, 7, 3)
    products = network.linearize(features, actions, t, t)[1](vectors)
    flat = network.linearize(features.expand(5, 7, 4).flatten(0, 1), actions.flatten(0, 1), t.expand(35, 1), t.expand(35, 1))
    assert th.allclose(products.flatten(1, 2), flat[1](vectors.flatten(1, 2)), atol=1e-5)


def test_a_grid_of_times_is_the_network_step_by_step() -> None:
    network = make_network()
    features, actions, times = th.randn(5, 1, 4), th.randn(5, 7, 3), th.tensor([1.0, 0.7, 0.3, 0.0])
    intervals = embed_grid(network, times)
    for interval, t, r in zip(intervals, times[:-1], times[1:], strict=True):
        expected = network(features, actions, network.embed(t.reshape(1), (t - r).reshape(1)))
        assert th.allclose(network(features, actions, interval), expected, atol=1e-5)


def test_gelu_is_the_same_function_on_both_paths() -> None:
    x = th.linspace(-30, 30, 2 * layers.MANY_NUMBERS)
    expected = F.gelu(x.double(), approximate="tanh")
    with th.no_grad():
        assert (TanhGELU()(x) - expected).abs().max() < 2e-6
        assert th.isfinite(TanhGELU()(1e4 * x)).all()


def test_fourier_features_are_cosines_then_sines() -> None:
    """Of t and of h, each with frequencies of its own."""
    embedding = IntervalEmbedding(4, 3, nn.Tanh)
    with th.no_grad():
        embedding.frequencies.copy_(th.tensor([[0.0, 1.0], [0.5, 2.0]])[:, None, None])
    features = embedding.fourier_features(th.tensor([[0.25], [0.0]]), th.tensor([[1.0], [0.0]]))
    assert th.allclose(features[:, 0], th.tensor([[1.0, 0.0, 0.0, 1.0], [-1.0, 1.0, 0.0, 0.0]]), atol=1e-6)
    assert th.equal(features[:, 1], th.tensor([[1.0, 1.0, 0.0, 0.0]] * 2))


def test_an_action_stands_before_its_features_which_are_cosines_then_sines() -> None:
    lift = ActionFeatures(2, 4, std=0.5)
    lift.frequencies.copy_(2 * math.pi * th.tensor([[1.0, 0.0], [0.0, 0.25]]).repeat(2, 1))
    lifted = lift(th.tensor([[0.25, 0.0], [0.5, 1.0]]))
    assert th.allclose(lifted, th.tensor([[0.25, 0.0, 0.0, 1.0, 1.0, 0.0], [0.5, 1.0, -1.0, 0.0, 0.0, 1.0]]), atol=1e-6)


@pytest.mark.parametrize("action_dim", [1, 20])
def test_features_turn_as_often_whatever_the_number_of_coordinates(action_dim: int) -> None:
    frequencies = ActionFeatures(action_dim, 10_000, std=0.5).frequencies / (2 * math.pi)
    assert frequencies.square().sum(dim=1).mean().sqrt().item() == pytest.approx(0.5, rel=0.05)
    # A cosine and a sine of each
    assert th.equal(*frequencies.chunk(2))


def test_an_interval_is_embedded_as_the_sum_of_two_embeddings() -> None:
    network = make_network()
    t, h = th.rand(2, 5, 7, 1)
    for parameter in network.embed.parameters():
        nn.init.normal_(parameter)
    assert th.allclose(network.embed(t, h), plain.embedding(network, t, h), atol=1e-5)


def test_initialisation() -> None:
    th.manual_seed(0)
    network = MeanFlowMLP(30, 20, 5, [300, 200], TanhGELU, True, 64, 32, 10, 0.5, instantaneous=False)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            fan_out, fan_in = layer.weight.shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0).all()
    # Without the action's features at first
    start_at_zero = (network.input_layer.weight == 0).all(dim=0)
    assert start_at_zero.nonzero().flatten().tolist() == list(range(20, 30))
    assert ((0.1 < network.embed.frequencies.std(dim=-1)) & (network.embed.frequencies.std(dim=-1) < 0.3)).all()
    for layer, fan_in in ((network.embed.mlp[0], 64), (network.embed.mlp[2], 32)):
        bound = (6 / (fan_in + 32)) ** 0.5
        assert ((0.9 * bound < layer.weight.abs().amax(dim=(1, 2))) & (layer.weight.abs().amax(dim=(1, 2)) <= bound)).all()
        assert (layer.bias == 0).all()


def test_tangents_through_the_features_are_finite_differences() -> None:
    """Along the flow: the noisy action moves with a velocity, t and h at rate 1."""
    th.manual_seed(0)
    network, step = make_network().double(), 1e-5
    features, actions, velocity = (th.randn(20, n, dtype=th.float64) for n in (4, 3, 3))
    t = 0.2 + 0.6 * th.rand(20, 1, dtype=th.float64)
    h = t / 2
    _, jvp = network.linearize(features, actions, t, h)
    ahead, behind = (plain_call(network, features, actions + s * velocity, t + s, h + s) for s in (step, -step))
    assert th.allclose(jvp(velocity, th.ones_like(t)), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
