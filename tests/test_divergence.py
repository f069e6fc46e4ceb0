"""Divergences against fields whose divergence is known."""

from collections.abc import Callable

import torch as th

from sb3_mfpo.maths.divergence import exact_divergence, hutchinson_divergence

D = 4


def jacobian_product(field: Callable[[th.Tensor], th.Tensor], points: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
    """By PyTorch's forward mode, one vector at a time."""
    return lambda vectors: th.stack([th.func.jvp(field, (points,), (vector.clone(),))[1] for vector in vectors])


def test_linear_field_has_its_trace() -> None:
    generator = th.Generator().manual_seed(0)
    matrix = th.randn(D, D, generator=generator)
    points = th.randn(6, D, generator=generator)

    product = jacobian_product(lambda x: x @ matrix.T, points)
    assert th.allclose(exact_divergence(product, points), matrix.trace().expand(6, 1), atol=1e-5)
    # Probes along the axes, scaled to identity covariance, make Hutchinson's estimate exact
    probes = D**0.5 * th.eye(D).unsqueeze(1).expand(D, 6, D)
    assert th.allclose(hutchinson_divergence(probes, product(probes)), matrix.trace().expand(6, 1), atol=1e-5)


def test_exact_divergence_is_the_jacobians_trace() -> None:
    points = th.randn(6, D, dtype=th.float64)

    def field(x: th.Tensor) -> th.Tensor:
        return th.sin(x) * x.sum(-1, keepdim=True)

    divergence = exact_divergence(jacobian_product(field, points), points)
    for i in range(6):
        assert th.allclose(divergence[i], th.autograd.functional.jacobian(field, points[i]).trace(), atol=1e-10)


def test_hutchinson_is_unbiased() -> None:
    generator = th.Generator().manual_seed(0)
    matrix = th.randn(D, D, generator=generator)
    probes = th.randn(40_000, 1, D, generator=generator)
    estimate = hutchinson_divergence(probes, probes @ matrix.T).item()
    # Variance of e^T A e is that of the symmetric part: 2 ||(A + A^T) / 2||^2
    standard_error = (2 * ((matrix + matrix.T) / 2).square().sum() / 40_000).sqrt().item()
    assert abs(estimate - matrix.trace().item()) < 4 * standard_error


def test_samples_of_one_state_are_independent() -> None:
    """Points (B, K, d) are each their own."""
    points = th.randn(2, 3, D)
    divergence = exact_divergence(jacobian_product(th.sin, points), points)
    assert th.allclose(divergence.squeeze(-1), points.cos().sum(-1), atol=1e-6)
