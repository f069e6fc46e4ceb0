"""
Paths from actions to noise, a_t = mu_t a_0 + sigma_t eps with t in [0, 1]: t = 1 is noise, t = 0 is the action.

All functions are pure; randomness is an argument. Sources: "Mean Flow Policy Optimization" (MFPO),
https://arxiv.org/abs/2604.14698; "Score-Based One-step MeanFlow Policy Optimization" (SOM), https://arxiv.org/abs/2605.23365.
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


def interpolate(actions: th.Tensor, noise: th.Tensor, mu: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """
    Point on the path from an action to noise, a_t = mu_t a_0 + sigma_t eps; the linear path has 1 - t and t.

    :param actions: Actions a_0, shape (..., d)
    :param noise: Standard-normal noise eps, shape (..., d)
    :param mu: mu_t in [0, 1], shape (..., 1)
    :param sigma: sigma_t in [0, 1], shape (..., 1)
    :return: Noisy actions a_t, shape (..., d)
    """
    return mu * actions + sigma * noise


def actions_from_noise(noisy_actions: th.Tensor, noise: th.Tensor, mu: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """
    The action from which a given noise leads to a_t, a_0 = (a_t - sigma_t e) / mu_t.

    :param noisy_actions: a_t, shape (..., d)
    :param noise: e, shape (..., d)
    :param mu: mu_t > 0, shape (..., 1)
    :param sigma: sigma_t, shape (..., 1)
    :return: Actions, shape (..., d)
    """
    return (noisy_actions - sigma * noise) / mu


def truncated_noise_bounds(noisy_actions: th.Tensor, mu: th.Tensor, sigma: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Bounds on the noise e for which the action (a_t - sigma_t e) / mu_t lies in [-1, 1].

    :param noisy_actions: a_t, shape (..., d)
    :param mu: mu_t, shape (..., 1)
    :param sigma: sigma_t > 0, shape (..., 1)
    :return: Lower and upper bound, shapes (..., d)
    """
    return (noisy_actions - mu) / sigma, (noisy_actions + mu) / sigma


def linear_velocity(noisy_actions: th.Tensor, mean_action: th.Tensor, t: th.Tensor) -> th.Tensor:
    """
    Velocity of the linear path's flow, v = (a_t - E[a_0 | a_t]) / t.

    :param noisy_actions: a_t, shape (..., d)
    :param mean_action: E[a_0 | a_t], shape (..., d)
    :param t: Time in (0, 1], shape (..., 1)
    :return: d a_t / dt, shape (..., d)
    """
    return (noisy_actions - mean_action) / t


def variance_preserving_velocity(noisy_actions: th.Tensor, mean_action: th.Tensor, t: th.Tensor) -> th.Tensor:
    """
    Velocity of the VP path's probability flow, v = -1/2 beta(t) (a_t + score) (SOM), with the score by Tweedie's formula:
    v = 1/2 beta(t) mu_t (mu_t a_t - E[a_0 | a_t]) / sigma_t^2.

    :param noisy_actions: a_t, shape (..., d)
    :param mean_action: E[a_0 | a_t], shape (..., d)
    :param t: Time in (0, 1], shape (..., 1)
    :return: d a_t / dt, shape (..., d)
    """
    mu, sigma = variance_preserving_path(t)
    return 0.5 * noise_rate(t) * mu * (mu * noisy_actions - mean_action) / sigma.square()
