"""
Scores of noisy actions and what follows from them: paths from actions to noise, and the velocities of their flows.

A path is a_t = mu_t a_0 + sigma_t eps with t in [0, 1]; t = 1 is noise. The score is the gradient of log p_t(a_t). All
functions are pure; randomness is an argument. Sources: "Score-Based One-step MeanFlow Policy Optimization" (SOM),
https://arxiv.org/abs/2605.23365; the conversions between score, posterior mean and velocity are those of "Score-Based
Generative Modeling through Stochastic Differential Equations", https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

import torch as th

# Noise rate of the variance-preserving path at t = 0 and t = 1 (SOM)
MIN_RATE, MAX_RATE = 0.1, 20.0


def linear_path(t: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    The straight path, mu_t = 1 - t and sigma_t = t.

    :param t: Time in [0, 1], any shape
    :return: mu_t and sigma_t, each in [0, 1] and of the same shape
    """
    return 1 - t, t


def noise_rate(t: th.Tensor) -> th.Tensor:
    """
    Noise rate of the variance-preserving path, beta(t) = 0.1 + 19.9 t (SOM).

    :param t: Time in [0, 1], any shape
    :return: In [0.1, 20], of the same shape
    """
    return MIN_RATE + (MAX_RATE - MIN_RATE) * t


def variance_preserving_path(t: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    The variance-preserving (VP) path, mu_t = exp(-1/2 int_0^t beta) and sigma_t^2 = 1 - mu_t^2 (SOM). It ends at
    mu_1 = 0.0066: nearly, but not wholly, in noise.

    :param t: Time in [0, 1], any shape
    :return: mu_t and sigma_t, each in [0, 1] and of the same shape
    """
    integral = MIN_RATE * t + 0.5 * (MAX_RATE - MIN_RATE) * t.square()
    return (-0.5 * integral).exp(), (-th.expm1(-integral)).sqrt()


def linear_velocity(noisy_actions: th.Tensor, score: th.Tensor, t: th.Tensor) -> th.Tensor:
    """
    Velocity of the linear path's probability flow, v = -(a_t + t score) / (1 - t) = (a_t - E[a_0 | a_t]) / t.

    :param noisy_actions: a_t, shape (..., d)
    :param score: Score there, shape (..., d)
    :param t: Time in [0, 1), shape (..., 1)
    :return: d a_t / dt, shape (..., d)
    """
    return -(noisy_actions + t * score) / (1 - t)


def variance_preserving_velocity(noisy_actions: th.Tensor, score: th.Tensor, t: th.Tensor) -> th.Tensor:
    """
    Velocity of the VP path's probability flow, v = -1/2 beta(t) (a_t + score) (SOM).

    :param noisy_actions: a_t, shape (..., d)
    :param score: Score there, shape (..., d)
    :param t: Time in [0, 1], shape (..., 1)
    :return: d a_t / dt, shape (..., d)
    """
    return -0.5 * noise_rate(t) * (noisy_actions + score)


def score_from_mean_action(mean_action: th.Tensor, noisy_actions: th.Tensor, signal: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """
    Score from the posterior mean (Tweedie's formula), (mu_t E[a_0 | a_t] - a_t) / sigma_t^2.

    :param mean_action: E[a_0 | a_t], shape (..., d)
    :param noisy_actions: a_t, shape (..., d)
    :param signal: mu_t, shape (..., 1)
    :param sigma: sigma_t > 0, shape (..., 1)
    :return: Score, shape (..., d)
    """
    return (signal * mean_action - noisy_actions) / sigma.square()


def score_from_gradients(weights: th.Tensor, gradients: th.Tensor, signal: th.Tensor) -> th.Tensor:
    """
    Score from the gradients of the target's log-density at x_k = (a_t + sigma_t z_k) / mu_t with standard-normal z_k,
    grad log sum_k p(x_k) = sum_k w_k grad log p(x_k) / mu_t with weights w_k proportional to p(x_k): iDEM's estimate (SOM). It
    does not see bounds of the actions.

    :param weights: Normalised weights, summing to one over K, shape (B, K)
    :param gradients: Gradients of log p, shape (B, K, d)
    :param signal: mu_t > 0, shape (B, 1)
    :return: Score, shape (B, d)
    """
    return (weights.unsqueeze(-1) * gradients).sum(dim=1) / signal


def with_length(score: th.Tensor, length: float) -> th.Tensor:
    """
    Vectors of the same direction and a given length (SOM's normalisation of the score and its weight w). A zero vector stays.

    :param score: shape (..., d)
    :param length: New length, above 0
    :return: shape (..., d)
    """
    return length * th.nn.functional.normalize(score, dim=-1)


def spread(values: th.Tensor) -> th.Tensor:
    """
    Standard deviation of all values together, in which SOM measures them (it also subtracts their mean, of which a Boltzmann
    policy is independent).

    :param values: Any shape
    :return: A scalar above zero, tiny (rounding) when all values are equal
    """
    return values.std(correction=0).clamp_min(th.finfo(values.dtype).tiny)
