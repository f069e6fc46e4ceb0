"""Entropy of a distribution from samples of it. Pure."""

from __future__ import annotations

import math

import torch as th


def nearest_neighbour_entropy(samples: th.Tensor) -> th.Tensor:
    """
    Differential entropy from the distances between samples and their nearest neighbours (Kozachenko & Leonenko 1987),
    log V_d + psi(n) - psi(1) + d mean log distance, with the volume V_d of the unit ball. It needs no density, so it also
    holds for a map from noise that folds.

    :param samples: n >= 2 independent samples per row, shape (..., n, d). Distances are taken to be at least 1e-7, the
        resolution of numbers around 1: samples that coincide then give a low entropy, not minus infinity.
    :return: Entropy in nats, shape (...)
    :raises ValueError: If there is only one sample
    """
    n, d = samples.shape[-2:]
    if n < 2:
        raise ValueError(f"The entropy needs at least two samples per row, not {n}.")
    distances = th.cdist(samples, samples, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.topk(2, dim=-1, largest=False).values[..., 1].clamp_min(1e-7)
    log_volume = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)
    # psi(n) - psi(1)
    harmonic = sum(1 / k for k in range(1, n))
    return log_volume + harmonic + d * nearest.log().mean(dim=-1)
