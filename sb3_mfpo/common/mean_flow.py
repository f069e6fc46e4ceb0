"""
Mean-flow maths: the linear path, time pairs, the MeanFlow identity and the few-step sampler.

Time convention: t = 1 is noise, t = 0 is the action. All functions are pure; randomness is an argument.
Equation numbers are those of "Mean Flow Policy Optimization", https://arxiv.org/abs/2604.14698.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch as th

# network(features, noisy_actions, t, t - r) -> average over [r, t]
FlowFunction = Callable[[th.Tensor, th.Tensor, th.Tensor, th.Tensor], th.Tensor]


def sample_times(normal: th.Tensor, mean: float, std: float, n_equal: int) -> tuple[th.Tensor, th.Tensor]:
    """
    Logit-normal time pairs: t and r are the larger and the smaller of ``sigmoid(mean + std * normal)``; the leading rows
    get r = t, so that which rows need no derivative is known in advance.

    :param normal: Two independent standard-normal draws per row, shape (B, 2)
    :param mean: Mean of the normal distribution inside the logit-normal
    :param std: Its standard deviation
    :param n_equal: Number of leading rows with r = t
    :return: t and r in (0, 1), r <= t, each of shape (B, 1)
    """
    times = th.sigmoid(mean + std * normal)
    t, r = times.amax(dim=1, keepdim=True), times.amin(dim=1, keepdim=True)
    return t, th.cat([t[:n_equal], r[n_equal:]])


def interpolate(actions: th.Tensor, noise: th.Tensor, t: th.Tensor) -> th.Tensor:
    """
    Point on the linear path from an action to noise, a_t = (1 - t) a_0 + t eps.

    :param actions: Actions a_0, shape (..., d)
    :param noise: Standard-normal noise eps, shape (..., d)
    :param t: Time in [0, 1], shape (..., 1)
    :return: Noisy actions a_t, shape (..., d)
    """
    return (1 - t) * actions + t * noise


def total_derivative(
    network: FlowFunction, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, r: th.Tensor, velocity: th.Tensor
) -> th.Tensor:
    """
    Derivative of an average over [r, t] along the flow, d/dt = velocity . grad_a + d/dt with r fixed (Eq. 12-18, 28).

    :param network: Average over an interval
    :param features: State features, shape (B, S)
    :param noisy_actions: a_t, shape (B, d)
    :param t: End of the interval, shape (B, 1)
    :param r: Start of the interval, shape (B, 1)
    :param velocity: Instantaneous velocity d a_t / dt, shape (B, d)
    :return: The derivative, of the shape of the network's output; carries no gradient when gradients are disabled
    """

    def average(a: th.Tensor, time: th.Tensor, length: th.Tensor) -> th.Tensor:
        return network(features, a, time, length)

    # r is fixed, therefore the length t - r grows as fast as t
    one = th.ones_like(t)
    return th.func.jvp(average, (noisy_actions, t, t - r), (velocity, one, one))[1]


@th.no_grad()
def mean_flow_target(
    network: FlowFunction,
    features: th.Tensor,
    noisy_actions: th.Tensor,
    t: th.Tensor,
    r: th.Tensor,
    velocity: th.Tensor,
    instantaneous: th.Tensor,
    n_equal: int = 0,
) -> th.Tensor:
    """
    Regression target of an average by the MeanFlow identity, average = instantaneous - (t - r) d/dt average (Eq. 28 for
    the velocity, Eq. 12-18 for the divergence). No gradient flows into it.

    :param network: The average being learned
    :param features: State features, shape (B, S)
    :param noisy_actions: a_t, shape (B, d)
    :param t: End of the interval, shape (B, 1)
    :param r: Start of the interval, shape (B, 1)
    :param velocity: Instantaneous velocity d a_t / dt, shape (B, d)
    :param instantaneous: Instantaneous value of what is averaged, shape (B, output_dim)
    :param n_equal: Number of leading rows known to have r = t, whose derivative is not needed
    :return: Target, shape (B, output_dim)
    """
    if n_equal >= len(t):
        return instantaneous
    rest = slice(n_equal, None)
    derivative = total_derivative(network, features[rest], noisy_actions[rest], t[rest], r[rest], velocity[rest])
    return th.cat([instantaneous[:n_equal], instantaneous[rest] - (t - r)[rest] * derivative])


def standard_normal_log_prob(noise: th.Tensor) -> th.Tensor:
    """
    Log-density of a standard normal distribution.

    :param noise: shape (..., d)
    :return: Log-density in nats, shape (...)
    """
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(dim=-1)


def few_step_sample(
    average_velocity: FlowFunction,
    features: th.Tensor,
    noise: th.Tensor,
    times: th.Tensor,
    average_divergence: FlowFunction | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """
    Carry noise to actions in as many steps as the grid has intervals (Eq. 9-11), with the change of log-density along
    the way (Eq. 12-18): a_r = a_t - (t - r) u(a_t, r, t) and log p += (t - r) delta(a_t, r, t).

    :param average_velocity: u, output shape (..., d)
    :param features: State features, shape (..., S), broadcast against ``noise``
    :param noise: Standard-normal a_1, shape (..., d)
    :param times: Grid from 1 (noise) down to 0 (action), shape (T + 1,)
    :param average_divergence: delta, output shape (..., 1); without it the log-density stays that of the noise
    :return: Actions, not clipped to any bounds, shape (..., d); log-density in nats, shape (...)
    """
    actions, log_prob = noise, standard_normal_log_prob(noise)
    for t, length in zip(times[:-1, None], (times[:-1] - times[1:])[:, None], strict=True):
        velocity = average_velocity(features, actions, t, length)
        if average_divergence is not None:
            log_prob = log_prob + length * average_divergence(features, actions, t, length).squeeze(-1)
        actions = actions - length * velocity
    return actions, log_prob
