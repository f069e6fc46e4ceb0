"""Divergence of a vector field, exact and estimated. Pure functions; randomness is an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch as th

# Multiplies a field's Jacobian at some points, shape (..., d), by vectors there, shape (N, ..., d)
JacobianProduct = Callable[[th.Tensor], th.Tensor]


def hutchinson_divergence(vectors: th.Tensor, products: th.Tensor) -> th.Tensor:
    """
    Skilling-Hutchinson estimate of the divergence, the mean over probes of e^T J e (Eq. 12-18 of
    https://arxiv.org/abs/2604.14698).

    :param vectors: Independent probes e with identity covariance, shape (N, ..., d)
    :param products: Their Jacobian-vector products J e, shape (N, ..., d)
    :return: Unbiased estimate of the trace of J, shape (..., 1)
    """
    return (vectors * products).sum(dim=-1, keepdim=True).mean(dim=0)


def exact_divergence(jacobian_product: JacobianProduct, points: th.Tensor) -> th.Tensor:
    """
    Trace of a field's Jacobian, at the cost of d Jacobian-vector products.

    :param jacobian_product: Product of the Jacobian at ``points`` with N vectors for every point, (N, ..., d) to (N, ..., d)
    :param points: shape (..., d)
    :return: Divergence, shape (..., 1)
    """
    d = points.shape[-1]
    basis = th.eye(d, dtype=points.dtype, device=points.device).reshape(d, *(1,) * (points.dim() - 1), d)
    basis = basis.expand(d, *points.shape)
    return (basis * jacobian_product(basis)).sum(dim=-1, keepdim=True).sum(dim=0)
