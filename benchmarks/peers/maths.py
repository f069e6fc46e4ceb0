"""
The peers' equations, as pure functions: randomness is an argument.

Time convention: t = 1 is noise, t = 0 is the action; level k of a chain of T steps is t = k / T. ``powers`` are the powers A_k
of the signal at the levels 0 ... T of a variance-preserving path x_k = sqrt(A_k) a + sqrt(1 - A_k) e. Sources: DIME,
https://arxiv.org/abs/2502.02316; MaxEntDP, https://arxiv.org/abs/2502.11612; DACER, https://arxiv.org/abs/2405.15177;
SAC-Flow, https://arxiv.org/abs/2509.25756; FlowRL, https://arxiv.org/abs/2506.12811.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch as th
from torch.nn import functional as F

from sb3_mfpo.maths.mean_flow import standard_normal_log_prob

# A network on a chain, as a function of the point there and of the index of the step, counted from the noise
OnChain = Callable[[th.Tensor, int], th.Tensor]


# DIME: a controlled Langevin diffusion


def langevin_schedule(n_steps: int) -> th.Tensor:
    """
    How the step sizes of DIME fall along its path, ``0.999 cos^2(pi/2 (1.008 - t) / 1.008) + 0.001`` at t = 1 - k / N.

    :param n_steps: Number N of steps, at least 1
    :return: Factors in (0, 1] for k = 0 (noise) to N - 1, shape (N,)
    """
    t = 1 - th.arange(n_steps, dtype=th.float64) / n_steps
    return (0.999 * (0.5 * math.pi * (1.008 - t) / 1.008).cos().square() + 0.001).float()


def langevin_path(drift: OnChain, noise: Sequence[th.Tensor], steps: th.Tensor, prior_std: float) -> list[th.Tensor]:
    """
    Path of DIME's diffusion, from x_0 = S z by x_{k+1} = x_k - h_k x_k / S^2 + h_k f(x_k, k) + sqrt(2 h_k) e_k.

    :param drift: f, output shape (..., d)
    :param noise: Standard-normal z, e_0 ... e_{N-1}, each of shape (..., d)
    :param steps: Step sizes h_k > 0, shape (N, d)
    :param prior_std: S > 0
    :return: x_0 (noise) to x_N, unbounded, each of shape (..., d)
    """
    path = [prior_std * noise[0]]
    factors = zip(1 - steps / prior_std**2, steps, (2 * steps).sqrt(), noise[1:], strict=True)
    for k, (keep, step, spread, draw) in enumerate(factors):
        controlled = th.addcmul(keep * path[k], step, drift(path[k], k))
        path.append(th.addcmul(controlled, spread, draw))
    return path


def langevin_cost(path: Sequence[th.Tensor], noise: Sequence[th.Tensor], steps: th.Tensor, prior_std: float) -> th.Tensor:
    """
    Log-ratio of a path's kernels to those of the uncontrolled diffusion that runs backwards, with means
    n_k = x_{k+1} - h_k x_{k+1} / S^2. All have the variance 2 h_k, so that their constants cancel:
    sum_k sum_j (x_k - n_k)_j^2 / (4 h_kj) - e_kj^2 / 2.

    :param path: x_0 to x_N, each of shape (..., d)
    :param noise: The standard-normal draws that led there, z and e_0 to e_{N-1}, each of shape (..., d)
    :param steps: Step sizes h_k > 0, shape (N, d)
    :param prior_std: S > 0
    :return: In nats, shape (...)
    """
    points, draws = th.stack(list(path), dim=-2), th.stack(list(noise[1:]), dim=-2)
    errors = points[..., :-1, :] - (1 - steps / prior_std**2) * points[..., 1:, :]
    return (errors.square() / (4 * steps) - 0.5 * draws.square()).sum(dim=(-2, -1))


def log_tanh_derivative(x: th.Tensor) -> th.Tensor:
    """
    ln(1 - tanh(x)^2), by 2 (ln 2 - x - softplus(-2 x)): no difference of numbers that round to the same.

    :param x: Any shape
    :return: At most 0, of the same shape
    """
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


# SAC-Flow: a flow with noise in its steps


def gated_velocity(x: th.Tensor, gate: th.Tensor, candidate: th.Tensor) -> th.Tensor:
    """
    Velocity of SAC-Flow's Flow-G, sigmoid(g) (h - x).

    :param x: shape (..., d)
    :param gate: g, before the sigmoid, shape (..., d)
    :param candidate: h, shape (..., d)
    :return: shape (..., d)
    """
    return gate.sigmoid() * (candidate - x)


def bounded_log_std(x: th.Tensor) -> th.Tensor:
    """
    ln sigma of SAC-Flow's noise, -5 + 3.5 (1 + tanh(x)).

    :param x: Any shape
    :return: In [-5, 2], of the same shape
    """
    return -5 + 3.5 * (1 + x.tanh())


def noisy_flow(velocity: OnChain, noise: Sequence[th.Tensor], std: th.Tensor) -> th.Tensor:
    """
    End of SAC-Flow's path, from x_0 = z by T Euler steps x_{k+1} = x_k + u(x_k, k) / T + sigma e_k.

    :param velocity: u, output shape (..., d)
    :param noise: Standard-normal z, e_0 ... e_{T-1}, each of shape (..., d)
    :param std: sigma > 0, shape (..., d), broadcast against ``noise``
    :return: x_T, unbounded, shape (..., d)
    """
    x, n_steps = noise[0], len(noise) - 1
    for k, draw in enumerate(noise[1:]):
        x = th.addcmul(th.add(x, velocity(x, k), alpha=1 / n_steps), std, draw)
    return x


def noisy_flow_log_prob(noise: Sequence[th.Tensor], log_std: th.Tensor) -> th.Tensor:
    """
    Log-density of a whole path of ``noisy_flow``, over all of its points,
    ln N(z; 0, I) + sum_k ln N(x_{k+1}; x_k + u(x_k, k) / T, sigma^2 I). The velocity cancels: what a point deviates from its
    mean by is sigma e_k.

    :param noise: The standard-normal draws that led there, z and e_0 to e_{T-1}, each of shape (..., d)
    :param log_std: ln sigma, shape (..., d), broadcast against ``noise``
    :return: In nats, shape (...)
    """
    return standard_normal_log_prob(th.cat(list(noise), dim=-1)) - (len(noise) - 1) * log_std.sum(dim=-1)


# FlowRL: a flow in midpoint steps, and what holds it near the replay buffer


def midpoint_flow(velocity: OnChain, noise: th.Tensor, n_steps: int) -> th.Tensor:
    """
    Carry noise from t = 1 to t = 0 in midpoint steps of length h = 1 / T, x <- x - h v(x - h/2 v(x, t), t - h/2).

    :param velocity: v at t = 1 - step / (2 T), output shape (..., d)
    :param noise: Where the path starts, shape (..., d)
    :param n_steps: Number T of steps, of two evaluations each
    :return: Where it ends, unbounded, shape (..., d)
    """
    x = noise
    for k in range(n_steps):
        middle = th.sub(x, velocity(x, 2 * k), alpha=0.5 / n_steps)
        x = th.sub(x, velocity(middle, 2 * k + 1), alpha=1 / n_steps)
    return x


def expectile_loss(errors: th.Tensor, expectile: float) -> th.Tensor:
    """
    Mean squared error in which what is too low counts ``expectile``, and what is too high 1 - ``expectile``.

    :param errors: What is to be predicted minus the prediction, any shape
    :param expectile: In (0, 1); with 1/2 the prediction is the mean
    :return: A scalar
    """
    return ((expectile - (errors < 0).float()).abs() * errors.square()).mean()


def constraint_weights(advantages: th.Tensor, factor: float) -> th.Tensor:
    """
    How strongly FlowRL's policy is held near the actions of the replay buffer, clip(f exp(u - mean u), 0.001, 1) with
    u = relu(advantage).

    :param advantages: By how much they are better than the policy's own, shape (B,)
    :param factor: f, the weight where all of them are equally good
    :return: In [0.001, 1], shape (B,)
    """
    u = advantages.relu()
    return (factor * (u - u.mean()).exp()).clamp(0.001, 1)


# MaxEntDP and DACER: denoising diffusion


def cosine_power(t: th.Tensor) -> th.Tensor:
    """
    Power of the signal in MaxEntDP's continuous cosine schedule, sqrt(A(t)) = cos(pi/2 (t + 0.008) / 1.008), scaled to 1 at
    t = 0.

    :param t: Time in [0, 1), any shape
    :return: In (0, 1], of the same shape
    """
    return ((0.5 * math.pi * (t + 0.008) / 1.008).cos() / math.cos(0.5 * math.pi * 0.008 / 1.008)).square()


def variance_preserving_powers(n_steps: int) -> list[float]:
    """
    DACER's schedule, A_k / A_{k-1} = exp(-0.1 / T - 4.95 (2 k - 1) / T^2).

    :param n_steps: Number T of steps, at least 1
    :return: A_0 = 1 to A_T
    """
    powers = [1.0]
    for k in range(1, n_steps + 1):
        powers.append(powers[-1] * math.exp(-0.1 / n_steps - 4.95 * (2 * k - 1) / n_steps**2))
    return powers


def forward_variances(powers: Sequence[float]) -> list[float]:
    """
    :param powers: A_0 to A_T, falling
    :return: Variances 1 - A_k / A_{k-1} that the steps from action to noise add, for k = 1 to T
    """
    return [1 - power / lower for lower, power in itertools.pairwise(powers)]


def posterior_variances(powers: Sequence[float]) -> list[float]:
    """
    :param powers: A_0 to A_T, falling, A_T below 1
    :return: Variances of x_{k-1} given x_k and the action, for k = 1 to T
    """
    levels = zip(forward_variances(powers), powers[:-1], powers[1:], strict=True)
    return [added * (1 - lower) / (1 - power) for added, lower, power in levels]


def clean_action(x: th.Tensor, noise: th.Tensor, power: th.Tensor | float) -> th.Tensor:
    """
    The action that a noise would lead to a point from, (x - sqrt(1 - A) e) / sqrt(A), within the bounds.

    :param x: Point at a level, shape (..., d)
    :param noise: e, shape (..., d)
    :param power: A in (0, 1], a number or shape (..., 1)
    :return: In [-1, 1], shape (..., d)
    """
    return ((x - (1 - power) ** 0.5 * noise) / power**0.5).clamp(-1, 1)


def ancestral_mean(x: th.Tensor, action: th.Tensor, power: float, lower: float) -> th.Tensor:
    """
    Mean of x_{k-1} given x_k and the action ("Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239),
    [sqrt(A_{k-1}) b_k a + sqrt(1 - b_k) (1 - A_{k-1}) x_k] / (1 - A_k) with b_k = 1 - A_k / A_{k-1}.

    :param x: x_k, shape (..., d)
    :param action: a, shape (..., d)
    :param power: A_k, below 1
    :param lower: A_{k-1}, above A_k
    :return: shape (..., d)
    """
    kept = power / lower
    return (lower**0.5 * (1 - kept) * action + kept**0.5 * (1 - lower) * x) / (1 - power)


def ancestral_chain(
    predicted_noise: OnChain, noise: Sequence[th.Tensor], powers: Sequence[float], variances: Sequence[float]
) -> th.Tensor:
    """
    Carry noise to actions level by level: the noise that is predicted, the action within the bounds that it means, the level
    below, and fresh noise there but at the last one.

    :param predicted_noise: eps(x_k) at the steps k = T - step, output shape (..., d)
    :param noise: T standard-normal draws, the first of which starts the chain, each of shape (..., d)
    :param powers: A_0 to A_T, falling
    :param variances: Of the fresh noise, for k = 1 to T
    :return: Actions in [-1, 1], shape (..., d)
    """
    x, n_steps = noise[0], len(variances)
    for step in range(n_steps):
        k = n_steps - step
        action = clean_action(x, predicted_noise(x, step), powers[k])
        x = ancestral_mean(x, action, powers[k], powers[k - 1])
        if k > 1:
            x = th.add(x, noise[step + 1], alpha=variances[k - 1] ** 0.5)
    # Where A_0 is below 1 the last point is not the action itself
    return x.clamp(-1, 1)


def log_prob_from_errors(squared_errors: th.Tensor, powers: Sequence[float], d: int) -> th.Tensor:
    """
    Log-density of an action from how well the noise of noisy versions of it is predicted (MaxEntDP),
    -d/2 ln(2 pi e) + sum_k w_k (A_k d - error_k) with w_k = (A_{k-1} - A_k) / (2 A_k (1 - A_k)): an integral over levels of
    signal to noise, which ends at the first level and so errs downwards for sharp densities.

    :param squared_errors: Mean over noises of ||eps(x_k) - e||^2 for k = 1 to T, shape (..., T)
    :param powers: A_0 to A_T, falling, A_T below 1
    :param d: Number of action coordinates
    :return: In nats, shape (...)
    """
    power = squared_errors.new_tensor(powers)
    weights = (power[:-1] - power[1:]) / (2 * power[1:] * (1 - power[1:]))
    return -0.5 * d * math.log(2 * math.pi * math.e) + (weights * (d * power[1:] - squared_errors)).sum(dim=-1)


# DACER: the entropy that its noise follows


def mixture_entropy(samples: th.Tensor, n_components: int = 3, n_iterations: int = 50) -> th.Tensor:
    """
    Entropy of a Gaussian mixture fitted to samples by expectation maximisation, as if the components did not overlap:
    -sum w ln w + sum w (d/2 (1 + ln 2 pi) + ln det S / 2). Where they do it is too high, by ln n_components at most.

    :param samples: Independent samples of each row's distribution, of which the first ones are where the components start,
        shape (B, n, d)
    :param n_components: Number of Gaussians with full covariance, at most n
    :param n_iterations: Number of iterations
    :return: In nats, shape (B,)
    """
    (n, d), dtype = samples.shape[-2:], samples.dtype
    # Single precision cannot tell the covariance of a few samples from a singular one, even with the floor that those on a
    # bound need
    samples = samples.double()
    floor = 1e-6 * th.eye(d, dtype=samples.dtype, device=samples.device)
    distances = th.cdist(samples, samples[:, :n_components])
    shares = F.one_hot(distances.argmin(dim=-1), n_components).to(samples.dtype)
    for iteration in range(n_iterations + 1):
        counts = shares.sum(dim=1).clamp_min(1e-6)
        weights = counts / n
        means = shares.mT @ samples / counts.unsqueeze(-1)
        deviations = samples.unsqueeze(1) - means.unsqueeze(2)
        covariances = (shares.mT.unsqueeze(-1) * deviations).mT @ deviations / counts[..., None, None] + floor
        roots = th.linalg.cholesky(covariances)
        log_roots = roots.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        if iteration == n_iterations:
            break
        scaled = th.linalg.solve_triangular(roots, deviations.mT, upper=False)
        log_probs = (weights.log() - log_roots).unsqueeze(1) - 0.5 * scaled.square().sum(dim=-2).mT
        shares = log_probs.softmax(dim=-1)
    of_components = 0.5 * d * (1 + math.log(2 * math.pi)) + log_roots
    return (weights * (of_components - weights.log())).sum(dim=-1).to(dtype)
