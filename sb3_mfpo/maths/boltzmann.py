"""
Self-normalised importance sampling (SNIS) of the velocity field of a Boltzmann policy.

The target is pi*(a) proportional to exp(Q(a) / alpha) on [-1, 1]^d. Its velocity at (a_t, t) is E[(a_t - a_0) / t] under
p(a_0 | a_t), proportional to pi*(a_0) N(a_0; a_t / (1 - t), (t / (1 - t))^2 I). Functions of mu_t and sigma_t hold for every
path a_t = mu_t a_0 + sigma_t eps; the paper's is linear, 1 - t and t. Time convention: t = 1 is noise. All functions are
pure; randomness is an argument. Source: Eq. 19-27 of "Mean Flow Policy Optimization", https://arxiv.org/abs/2604.14698.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch as th

from sb3_mfpo.maths.mean_flow import standard_normal_log_prob
from sb3_mfpo.maths.paths import actions_from_noise, truncated_noise_bounds


def normal_cdf(x: th.Tensor) -> th.Tensor:
    """
    Standard-normal distribution function, with full relative precision in the lower tail (``torch.special.ndtr`` goes
    through erf and has none).

    :param x: Any shape
    :return: Probabilities in [0, 1], of the same shape
    """
    return 0.5 * th.erfc(-x / math.sqrt(2))


def truncated_normal(uniform: th.Tensor, lower: th.Tensor, upper: th.Tensor) -> th.Tensor:
    """
    Standard-normal draws truncated to [lower, upper], by inverting the distribution function.

    Where the function is above one half its complement is inverted instead, so that both tails keep their relative
    precision; double precision keeps narrow intervals free of visible rounding. The result is clamped into the interval,
    which turns the infinite quantiles of 0 and 1 into its ends: NaN cannot arise from finite bounds.

    :param uniform: Draws from [0, 1), broadcast against the bounds
    :param lower: Finite lower bounds
    :param upper: Finite upper bounds, lower <= upper
    :return: Draws in [lower, upper], of the broadcast shape and the bounds' type. An interval that lies wholly beyond 37
        standard deviations has no mass in double precision; its end is returned.
    """
    u, low, high = uniform.double(), lower.double(), upper.double()
    below, above = normal_cdf(low), normal_cdf(-high)
    p = below + u * (normal_cdf(high) - below)
    q = above + (1 - u) * (normal_cdf(-low) - above)
    quantile = th.special.ndtri(th.minimum(p, q))
    return th.minimum(th.maximum(th.where(p < q, quantile, -quantile), low), high).to(lower.dtype)


def gaussian_proposal(noisy_actions: th.Tensor, mu: th.Tensor, sigma: th.Tensor, uniform: th.Tensor) -> th.Tensor:
    """
    Actions from N(a_t / mu_t, (sigma_t / mu_t)^2 I) truncated to [-1, 1]^d.

    :param noisy_actions: a_t, shape (..., d)
    :param mu: mu_t > 0, shape (..., 1)
    :param sigma: sigma_t > 0, shape (..., 1)
    :param uniform: Draws from [0, 1), K per a_t, shape (..., K, d)
    :return: Actions in [-1, 1], shape (..., K, d)
    """
    noisy_actions, mu, sigma = noisy_actions.unsqueeze(-2), mu.unsqueeze(-2), sigma.unsqueeze(-2)
    noise = truncated_normal(uniform, *truncated_noise_bounds(noisy_actions, mu, sigma))
    # Rounding only: dividing by a small mu_t can carry an action past a bound by a few units in the last place
    return actions_from_noise(noisy_actions, noise, mu, sigma).clamp(-1, 1)


def latin_hypercube(uniform: th.Tensor, order: th.Tensor) -> th.Tensor:
    """
    Stratified draws: along each coordinate, each of K equal intervals holds one of the K draws. Means over them vary less than
    over independent ones ("A Comparison of Three Methods for Selecting Values of Input Variables", McKay et al. 1979).

    :param uniform: Independent draws from [0, 1), shape (B, K, d)
    :param order: For each coordinate a random permutation of 0 ... K - 1, shape (K, d)
    :return: Draws in [0, 1), each of them uniform, shape (B, K, d)
    """
    # Rounding could carry the last interval's to 1
    return ((order + uniform) / len(order)).clamp_max(1 - th.finfo(uniform.dtype).eps / 2)


def gaussian_log_prob(actions: th.Tensor, noisy_actions: th.Tensor, mu: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """
    Log-density of ``gaussian_proposal``.

    :param actions: In [-1, 1], shape (..., K, d)
    :param noisy_actions: a_t, shape (..., d)
    :param mu: mu_t > 0, shape (..., 1)
    :param sigma: sigma_t > 0, shape (..., 1)
    :return: Log-density in nats, shape (..., K)
    """
    lower, upper = (bound.double() for bound in truncated_noise_bounds(noisy_actions, mu, sigma))
    # Of the two tails, the one that keeps its precision
    mass = th.maximum(normal_cdf(upper) - normal_cdf(lower), normal_cdf(-lower) - normal_cdf(-upper))
    log_mass = mass.clamp_min(th.finfo(mass.dtype).tiny).log().sum(dim=-1, keepdim=True).to(actions.dtype)
    noise = (noisy_actions.unsqueeze(-2) - mu.unsqueeze(-2) * actions) / sigma.unsqueeze(-2)
    return standard_normal_log_prob(noise) + actions.shape[-1] * (mu / sigma).log() - log_mass


def mixture_log_weights(log_probs: Sequence[th.Tensor], counts: Sequence[int]) -> th.Tensor:
    """
    Unnormalised log-weights, but for Q / alpha, of actions of which n_i were drawn from proposal i,
    log p_1 - log sum_i n_i p_i.
    The first proposal is N(a_t / mu_t, (sigma_t / mu_t)^2 I), the other factor of p(a_0 | a_t). Each action is weighed against
    all proposals together, so that none counts for much only because it was unlikely under its own ("Optimally Combining
    Sampling Techniques for Monte Carlo Rendering", Veach & Guibas 1995).

    :param log_probs: Log-densities of all K actions in nats by group of proposals, shape (B, 1, K) of the first proposal,
        shape (B, P_i, K) of further groups
    :param counts: How many of the K actions come from each proposal of a group, above 0
    :return: shape (B, K)
    """
    weighted = [log_prob + math.log(n) for log_prob, n in zip(log_probs, counts, strict=True)]
    return log_probs[0].squeeze(1) - th.cat(weighted, dim=1).logsumexp(dim=1)


def policy_log_weights(
    q_values: th.Tensor,
    log_prob: th.Tensor,
    actions: th.Tensor,
    noisy_actions: th.Tensor,
    t: th.Tensor,
    ent_coef: th.Tensor | float,
) -> th.Tensor:
    """
    Unnormalised log-weights of actions drawn from the policy, Q / alpha - ||a_t - (1 - t) a_0||^2 / (2 t^2) - log pi.

    :param q_values: Q(s, a_0), shape (B, K)
    :param log_prob: log pi(a_0 | s) in nats, shape (B, K)
    :param actions: a_0, shape (B, K, d)
    :param noisy_actions: a_t, shape (B, d)
    :param t: Time in (0, 1), shape (B, 1)
    :param ent_coef: Temperature alpha > 0
    :return: shape (B, K)
    """
    noise = (noisy_actions.unsqueeze(1) - (1 - t).unsqueeze(1) * actions) / t.unsqueeze(1)
    return q_values / ent_coef - 0.5 * noise.square().sum(dim=-1) - log_prob


def snis_mean(weights: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Weighted mean of actions, the estimate of E[a_0 | a_t], and the effective sample size (ESS) 1 / sum w^2 of the weights.

    :param weights: Normalised weights, summing to one over K, shape (B, K)
    :param actions: a_0, shape (B, K, d)
    :return: Mean, shape (B, d); effective sample size in [1, K], shape (B, 1)
    """
    return (weights.unsqueeze(-1) * actions).sum(dim=1), 1 / weights.square().sum(dim=1, keepdim=True)


def combine_by_sample_size(
    estimates: Sequence[th.Tensor], sample_sizes: Sequence[th.Tensor]
) -> tuple[th.Tensor, list[th.Tensor]]:
    """
    Mean of several estimates, each weighted by its effective sample size.

    :param estimates: At least one, each of shape (B, d)
    :param sample_sizes: Their effective sample sizes, each of shape (B, 1)
    :return: Combined estimate, shape (B, d); the share of each estimate in [0, 1], each of shape (B, 1)
    """
    total = th.stack(list(sample_sizes)).sum(dim=0)
    shares = [size / total for size in sample_sizes]
    return th.stack([share * value for share, value in zip(shares, estimates, strict=True)]).sum(dim=0), shares


def score_from_mean_action(mean_action: th.Tensor, noisy_actions: th.Tensor, mu: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """
    Score from the posterior mean (Tweedie's formula), (mu_t E[a_0 | a_t] - a_t) / sigma_t^2.

    :param mean_action: E[a_0 | a_t], shape (..., d)
    :param noisy_actions: a_t, shape (..., d)
    :param mu: mu_t, shape (..., 1)
    :param sigma: sigma_t > 0, shape (..., 1)
    :return: Score, shape (..., d)
    """
    return (mu * mean_action - noisy_actions) / sigma.square()


def mean_action_from_score(score: th.Tensor, noisy_actions: th.Tensor, mu: th.Tensor, sigma: th.Tensor) -> th.Tensor:
    """
    Posterior mean from the score (Tweedie's formula), E[a_0 | a_t] = (a_t + sigma_t^2 score) / mu_t.

    :param score: Gradient of log p_t at a_t, shape (..., d)
    :param noisy_actions: a_t, shape (..., d)
    :param mu: mu_t > 0, shape (..., 1)
    :param sigma: sigma_t, shape (..., 1)
    :return: Mean action, shape (..., d)
    """
    return (noisy_actions + sigma.square() * score) / mu


def score_from_gradients(weights: th.Tensor, gradients: th.Tensor, mu: th.Tensor) -> th.Tensor:
    """
    Score from the gradients of the target's log-density at x_k = (a_t + sigma_t z_k) / mu_t with standard-normal z_k,
    grad log sum_k p(x_k) = sum_k w_k grad log p(x_k) / mu_t with weights w_k proportional to p(x_k): iDEM's estimate (SOM). It
    does not see bounds of the actions.

    :param weights: Normalised weights, summing to one over K, shape (B, K)
    :param gradients: Gradients of log p, shape (B, K, d)
    :param mu: mu_t > 0, shape (B, 1)
    :return: Score, shape (B, d)
    """
    return (weights.unsqueeze(-1) * gradients).sum(dim=1) / mu


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
