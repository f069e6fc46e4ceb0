"""Networks: the fast paths equal the plain formulation."""

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mfpo.common import torch_layers
from sb3_mfpo.common.torch_layers import FlowMLP, MultiInputMLP, TanhGELU, fourier_features


def plain(mlp: MultiInputMLP, *inputs: th.Tensor) -> th.Tensor:
    """One layer on the concatenation of the expanded inputs, all rows at once, PyTorch's own GELU."""
    shape = th.broadcast_shapes(*(value.shape[:-1] for value in inputs))
    hidden = mlp.input_layer(th.cat([value.expand(*shape, value.shape[-1]) for value in inputs], dim=-1))
    for layer in mlp.body:
        hidden = F.gelu(hidden, approximate="tanh") if isinstance(layer, TanhGELU) else layer(hidden)
    return hidden


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "shapes",
    [[(5,), (5,), (5,)], [(5, 7), (5, 1), (1,)], [(700, 5), (700, 1), (1,)], [(700, 5), (1, 5), ()], [(4000,), (1,), (4000,)]],
    ids=str,
)
def test_inputs_broadcast_like_a_concatenation(shapes: list[tuple[int, ...]], grad: bool) -> None:
    """With fewer and with more rows than fit into the cache; 700 is no multiple of a chunk."""
    th.manual_seed(0)
    mlp = MultiInputMLP([3, 4, 2], 6, [64, 32], TanhGELU, layer_norm=True)
    inputs = [th.randn(*shape, dim) for shape, dim in zip(shapes, [3, 4, 2], strict=True)]
    with th.set_grad_enabled(grad):
        output = mlp(*inputs)
    assert output.requires_grad == grad
    assert output.shape == (*th.broadcast_shapes(*shapes), 6)
    assert th.allclose(output, plain(mlp, *inputs), atol=5e-6)


def test_rows_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = MultiInputMLP([3], 6, [8], TanhGELU, layer_norm=True)
    rows: list[int] = []
    monkeypatch.setattr(mlp, "_forward", lambda value: rows.append(value.shape[:-1].numel()) or value)
    with th.no_grad():
        mlp(th.randn(2000, 3, 3))
    assert sum(rows) == 6000
    assert max(rows) <= torch_layers.CACHED_ROWS and len(rows) == 4


def test_gelu_is_the_same_function_on_both_paths() -> None:
    x = th.linspace(-30, 30, 2 * torch_layers.MANY_NUMBERS)
    expected = F.gelu(x.double(), approximate="tanh")
    with th.no_grad():
        assert (TanhGELU()(x) - expected).abs().max() < 2e-6
        # Derivatives go through the fast path as well
        _, fast = th.func.jvp(TanhGELU(), (x,), (th.ones_like(x),))
    _, slow = th.func.jvp(lambda x: F.gelu(x, approximate="tanh"), (x,), (th.ones_like(x),))
    assert th.allclose(fast, slow, atol=2e-6)
    assert th.isfinite(fast).all()


def test_fourier_features_are_cosines_then_sines() -> None:
    features = fourier_features(th.tensor([[0.25]]), th.tensor([0.0, 1.0]))
    assert th.allclose(features, th.tensor([[1.0, 0.0, 0.0, 1.0]]), atol=1e-6)


def test_initialisation() -> None:
    th.manual_seed(0)
    network = FlowMLP(30, 20, 5, [300, 200], TanhGELU, True, 64, 32, instantaneous=False)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            fan_out, fan_in = layer.weight.shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0).all()
    frequencies = th.cat([network.time_embedding.frequencies, network.length_embedding.frequencies])
    assert 0.1 < frequencies.std() < 0.3
