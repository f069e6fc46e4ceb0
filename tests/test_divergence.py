"""Divergences against fields whose divergence is known."""

import torch as th

from sb3_mfpo.common.divergence import exact_divergence, hutchinson_divergence, jacobian_vector_products

D = 4


def test_linear_field_has_its_trace() -> None:
    generator = th.Generator().manual_seed(0)
    matrix = th.randn(D, D, generator=generator)
    points = th.randn(6, D, generator=generator)

    def field(x: th.Tensor) -> th.Tensor:
        return x @ matrix.T

    assert th.allclose(exact_divergence(field, points), matrix.trace().expand(6, 1), atol=1e-5)
    # Probes along the axes, scaled to identity covariance, make Hutchinson's estimate exact
    probes = D**0.5 * th.eye(D).unsqueeze(1).expand(D, 6, D)
    estimate = hutchinson_divergence(probes, jacobian_vector_products(field, points, probes))
    assert th.allclose(estimate, matrix.trace().expand(6, 1), atol=1e-5)


def test_products_are_the_jacobian_times_the_vectors() -> None:
    points = th.randn(6, D, dtype=th.float64)
    vectors = th.randn(3, 6, D, dtype=th.float64)

    def field(x: th.Tensor) -> th.Tensor:
        return th.sin(x) * x.sum(-1, keepdim=True)

    products = jacobian_vector_products(field, points, vectors)
    for i in range(6):
        jacobian = th.autograd.functional.jacobian(field, points[i])
        assert th.allclose(products[:, i], vectors[:, i] @ jacobian.T, atol=1e-10)
        assert th.allclose(exact_divergence(field, points)[i], jacobian.trace(), atol=1e-10)


def test_hutchinson_is_unbiased() -> None:
    generator = th.Generator().manual_seed(0)
    matrix = th.randn(D, D, generator=generator)
    probes = th.randn(40_000, 1, D, generator=generator)
    products = jacobian_vector_products(lambda x: x @ matrix.T, th.zeros(1, D), probes)
    estimate = hutchinson_divergence(probes, products).item()
    # Variance of e^T A e is that of the symmetric part: 2 ||(A + A^T) / 2||^2
    standard_error = (2 * ((matrix + matrix.T) / 2).square().sum() / 40_000).sqrt().item()
    assert abs(estimate - matrix.trace().item()) < 4 * standard_error


def test_samples_of_one_state_are_independent() -> None:
    """Points (B, K, d) are each their own."""
    points = th.randn(2, 3, D)
    assert th.allclose(
        exact_divergence(th.sin, points), exact_divergence(th.sin, points.reshape(6, D)).reshape(2, 3, 1), atol=1e-6
    )
    assert th.allclose(exact_divergence(th.sin, points).squeeze(-1), points.cos().sum(-1), atol=1e-6)
