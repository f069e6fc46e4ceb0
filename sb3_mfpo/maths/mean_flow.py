"""
Time pairs, the MeanFlow identity, and the few-step sampler.

Time convention: t = 1 is noise, t = 0 is the action. All functions are pure; randomness is an argument.
Equation numbers are those of "Mean Flow Policy Optimization", https://arxiv.org/abs/2604.14698.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch as th

# Average over the interval that a grid's point k starts, as a function of a_t there and of k
AverageOnGrid = Callable[[th.Tensor, int], th.Tensor]


def logit_normal_times(normal: th.Tensor, mean: float, std: float, n_equal: int) -> tuple[th.Tensor, th.Tensor]:
    """
    Logit-normal time pairs: t and r are the larger and the smaller of ``sigmoid(mean + std * normal)``. The leading rows get
    r = t: they need no derivative. Some paths have no velocity at an end, so both keep 0.001 away from 0 and 1, which a wide
    distribution rounds to.

    :param normal: Two independent standard-normal draws per row, shape (B, 2)
    :param mean: Mean of the normal distribution inside the logit-normal
    :param std: Its standard deviation
    :param n_equal: Number of leading rows with r = t
    :return: t and r in (0, 1), r <= t, each of shape (B, 1)
    """
    times = th.sigmoid(mean + std * normal).clamp(1e-3, 1 - 1e-3)
    t, r = times.amax(dim=1, keepdim=True), times.amin(dim=1, keepdim=True)
    return t, th.cat([t[:n_equal], r[n_equal:]])


def uniform_times(uniform: th.Tensor, n_equal: int) -> tuple[th.Tensor, th.Tensor]:
    """
    Time pairs with t uniform in (0, 1) and r uniform below t (SOM, https://arxiv.org/abs/2605.23365). The leading rows get
    r = t. Some paths have no velocity at an end, so t keeps 0.001 away from both.

    :param uniform: Two independent draws from [0, 1) per row, shape (B, 2)
    :param n_equal: Number of leading rows with r = t
    :return: t and r in [0, 1), r <= t, each of shape (B, 1)
    """
    t = 1e-3 + (1 - 2e-3) * uniform[:, :1]
    return t, th.cat([t[:n_equal], t[n_equal:] * uniform[n_equal:, 1:]])


def sampling_grid(n_steps: int, power: float) -> th.Tensor:
    """
    Times between which the sampler steps, ``(k / T) ** power`` for k from T down to 0. A power of 1 makes all steps equally
    long; a higher one makes the last ones shorter, which lie where modes are told apart.

    :param n_steps: Number of steps T, at least 1
    :param power: Above 0
    :return: From 1 (noise) down to 0 (action), shape (T + 1,)
    """
    return th.linspace(1, 0, n_steps + 1) ** power


def start_on_grid(t: th.Tensor, grid: th.Tensor) -> th.Tensor:
    """
    The point of a grid below a time: where the sampler's step that passes through t ends.

    :param t: In (0, 1], shape (B, 1)
    :param grid: From 1 down to 0, shape (T + 1,)
    :return: r < t, shape (B, 1)
    """
    ascending = grid.flip(0)
    return ascending[th.bucketize(t, ascending) - 1]


def mean_flow_target(instantaneous: th.Tensor, h: th.Tensor, derivative: th.Tensor) -> th.Tensor:
    """
    Regression target of an average over [r, t] by the MeanFlow identity, average = instantaneous - h d/dt average
    (Eq. 28 for the velocity, Eq. 12-18 for the divergence). The derivative is the total one along the flow with r fixed,
    velocity . grad_a + d/dt, so that h grows as fast as t.

    :param instantaneous: Instantaneous value of what is averaged, shape (B, output_dim)
    :param h: Length h = t - r of the interval, shape (B, 1)
    :param derivative: Derivative of the last rows, shape (at most B, output_dim); the rows before have r = t and need none
    :return: Target, shape (B, output_dim)
    """
    n_equal = len(instantaneous) - len(derivative)
    return th.cat([instantaneous[:n_equal], instantaneous[n_equal:] - h[n_equal:] * derivative])


def adaptive_weights(errors: th.Tensor, offset: float = 1e-3) -> th.Tensor:
    """
    Weight of every row in an adaptive regression, 1 / (||error||^2 + c) (SOM, after "Mean Flows for One-step Generative
    Modeling", https://arxiv.org/abs/2505.13447, which has c = 0.001).

    :param errors: Prediction minus target, shape (B, output_dim)
    :param offset: c > 0
    :return: Weights without gradient, shape (B, 1)
    """
    return 1 / (errors.detach().square().sum(dim=1, keepdim=True) + offset)


def standard_normal_log_prob(noise: th.Tensor) -> th.Tensor:
    """
    Log-density of a standard normal distribution.

    :param noise: shape (..., d)
    :return: Log-density in nats, shape (...)
    """
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(dim=-1)


def few_step_sample(
    average_velocity: AverageOnGrid,
    noise: th.Tensor,
    times: th.Tensor,
    average_divergence: AverageOnGrid | None = None,
) -> tuple[th.Tensor, th.Tensor | None]:
    """
    Carry noise to actions in as many steps as the grid has intervals (Eq. 9-11), with the change of log-density along
    the way (Eq. 12-18): a_r = a_t - (t - r) u(a_t, r, t) and log p += (t - r) delta(a_t, r, t).

    :param average_velocity: u, output shape (..., d)
    :param noise: Standard-normal a_1, shape (..., d)
    :param times: Grid from 1 (noise) down to 0 (action), shape (T + 1,)
    :param average_divergence: delta, output shape (..., 1); without it the log-density is not followed
    :return: Actions, not clipped to any bounds, shape (..., d); log-density in nats, shape (...), or None
    """
    actions = noise
    log_prob = None if average_divergence is None else standard_normal_log_prob(noise)
    for k, step in enumerate((times[1:] - times[:-1]).unbind()):
        # The step r - t is negative
        velocity = average_velocity(actions, k)
        if average_divergence is not None and log_prob is not None:
            log_prob = log_prob - step * average_divergence(actions, k).squeeze(-1)
        actions = th.addcmul(actions, step, velocity)
    return actions, log_prob
