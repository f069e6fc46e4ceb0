"""Divergence of a vector field, exact and estimated. Pure functions; randomness is an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch as th

VectorField = Callable[[th.Tensor], th.Tensor]


def jacobian_vector_products(field: VectorField, points: th.Tensor, vectors: th.Tensor) -> th.Tensor:
    """
    Products of a field's Jacobian with several vectors per point.

    :param field: Maps points (..., d) to vectors (..., d), each by itself
    :param points: shape (..., d)
    :param vectors: N vectors for every point, shape (N, ..., d)
    :return: (d field / d point) @ vector, shape (N, ..., d)
    """
    return th.func.vmap(lambda vector: th.func.jvp(field, (points,), (vector,))[1])(vectors)


def hutchinson_divergence(vectors: th.Tensor, products: th.Tensor) -> th.Tensor:
    """
    Skilling-Hutchinson estimate of the divergence, the mean over probes of e^T J e (Eq. 12-18 of
    https://arxiv.org/abs/2604.14698).

    :param vectors: Independent probes e with identity covariance, shape (N, ..., d)
    :param products: Their Jacobian-vector products J e, shape (N, ..., d)
    :return: Unbiased estimate of the trace of J, shape (..., 1)
    """
    return (vectors * products).sum(dim=-1, keepdim=True).mean(dim=0)


def exact_divergence(field: VectorField, points: th.Tensor) -> th.Tensor:
    """
    Trace of the field's Jacobian, at the cost of d Jacobian-vector products.

    :param field: Maps points (..., d) to vectors (..., d), each by itself
    :param points: shape (..., d)
    :return: Divergence, shape (..., 1)
    """
    d = points.shape[-1]
    basis = th.eye(d, dtype=points.dtype, device=points.device).reshape(d, *(1,) * (points.dim() - 1), d)
    basis = basis.expand(d, *points.shape)
    return (basis * jacobian_vector_products(field, points, basis)).sum(dim=-1, keepdim=True).sum(dim=0)
