"""
Categorical value distributions (C51): Bellman backup, projection onto the atoms, reduction over critics, loss.

Pure functions. Sources: "A Distributional Perspective on Reinforcement Learning", https://arxiv.org/abs/1707.06887, and
Eq. 29 of https://arxiv.org/abs/2604.14698.
"""

from __future__ import annotations

import torch as th


def expected_value(probs: th.Tensor, atoms: th.Tensor) -> th.Tensor:
    """
    Mean of categorical distributions.

    :param probs: Probabilities, shape (..., n_atoms)
    :param atoms: Support, in units of return, shape (n_atoms,)
    :return: shape (...)
    """
    return (probs * atoms).sum(dim=-1)


def reduce_values(values: th.Tensor, reduction: str) -> th.Tensor:
    """
    One value from those of several critics.

    :param values: shape (n_critics, ...)
    :param reduction: "min" or "mean"
    :return: shape (...)
    :raises ValueError: If the reduction is another one
    """
    if reduction == "mean":
        return values.mean(dim=0)
    if reduction == "min":
        return values.amin(dim=0)
    raise ValueError(f'`reduction` must be "min" or "mean", not {reduction!r}.')


def narrow_logits(atoms: th.Tensor) -> th.Tensor:
    """
    A normal distribution around 0, or what of the support is next to it, with the distance of two atoms as standard deviation,
    and a thousandth of the mass spread evenly, so that learning can raise every atom within some hundred steps.

    Where value distributions start so, values start as 0. One that starts uniform narrows by the factor gamma each time that
    the target critics have followed, to half its width in about ln 2 / ((1 - gamma) tau) gradient steps (14 000 with gamma
    0.99 and tau 0.005), and hides differences between values meanwhile. (Ours; the paper's start nearly uniform.)

    :param atoms: Evenly spaced support, in units of return, shape (n_atoms,)
    :return: Logits, shape (n_atoms,)
    """
    centre = atoms.new_zeros(()).clamp(atoms[0], atoms[-1])
    normal = (-0.5 * ((atoms - centre) / (atoms[1] - atoms[0])).square()).softmax(dim=0)
    return (0.999 * normal + 0.001 / len(atoms)).log()


def stretch_support(logits: th.Tensor, factor: float) -> th.Tensor:
    """
    Logits of distributions that stay where they are while their support, evenly spaced around 0, becomes wider or narrower:
    those at an atom's new place on the old support, linearly between its atoms, and beyond it those of its ends. (Linear in
    the logits, so that it can be applied to the parameters of the layer that gives them. Ours, after PopArt,
    https://arxiv.org/abs/1602.07714, which does this for values that are no distributions.)

    :param logits: shape (n_atoms, ...)
    :param factor: By which the support is stretched, above 0
    :return: shape (n_atoms, ...)
    """
    last = len(logits) - 1
    atoms = th.arange(last + 1, dtype=logits.dtype, device=logits.device)
    index = (last / 2 + factor * (atoms - last / 2)).clamp(0, last)
    below = index.floor().long().clamp(0, last - 1)
    return th.lerp(logits[below], logits[below + 1], (index - below).view(-1, *[1] * (logits.ndim - 1)))


def bellman_atoms(rewards: th.Tensor, discounts: th.Tensor | float, entropy_bonus: th.Tensor, atoms: th.Tensor) -> th.Tensor:
    """
    Where a soft Bellman backup carries the atoms, reward + discount (z + entropy bonus), before clipping to the support.

    :param rewards: shape (B, 1)
    :param discounts: Discount factor, zero where the episode terminated, shape (B, 1)
    :param entropy_bonus: Entropy bonus -alpha log pi(a' | s'), shape (B, 1) or a scalar
    :param atoms: Support z, shape (n_atoms,)
    :return: Positions in units of return, shape (B, n_atoms)
    """
    return rewards + discounts * (atoms + entropy_bonus)


def project(probs: th.Tensor, positions: th.Tensor, atoms: th.Tensor) -> th.Tensor:
    """
    Clip positions to the support and split their mass linearly between the two neighbouring atoms. Keeps the mass, and
    keeps the mean where nothing is clipped; a position on an atom gives it everything.

    :param probs: Mass at each position, shape (..., n_atoms)
    :param positions: shape (..., n_atoms), broadcast against ``probs``
    :param atoms: Evenly spaced support, shape (n_atoms,)
    :return: Mass at each atom, shape (..., n_atoms)
    """
    last = len(atoms) - 1
    spacing = (atoms[-1] - atoms[0]) / last
    index = ((positions.clamp(atoms[0], atoms[-1]) - atoms[0]) / spacing).expand_as(probs)
    # At most the last but one, so that the atom above exists; a position on the last atom then has fraction 1
    below = index.floor().long().clamp(0, last - 1)
    fraction = index - below
    projected = th.zeros_like(probs).scatter_add_(-1, below, probs * (1 - fraction))
    return projected.scatter_add_(-1, below + 1, probs * fraction)


def clipped_mass(probs: th.Tensor, positions: th.Tensor, atoms: th.Tensor) -> th.Tensor:
    """
    Mass that lies outside the support and that ``project`` moves to its ends.

    :param probs: Mass at each position, shape (..., n_atoms)
    :param positions: shape (..., n_atoms), broadcast against ``probs``
    :param atoms: Support, shape (n_atoms,)
    :return: Share in [0, 1], shape (...)
    """
    return (probs * ((positions < atoms[0]) | (positions > atoms[-1]))).sum(dim=-1)


def reduce_distributions(probs: th.Tensor, atoms: th.Tensor, reduction: str) -> th.Tensor:
    """
    One distribution from those of several critics: for "min", row by row, the one of smallest mean; for "mean", the
    mixture.

    :param probs: shape (n_critics, B, n_atoms)
    :param atoms: Support, shape (n_atoms,)
    :param reduction: "min" or "mean"
    :return: shape (B, n_atoms)
    """
    if reduction == "mean":
        return probs.mean(dim=0)
    smallest = expected_value(probs, atoms).argmin(dim=0)
    return probs[smallest, th.arange(probs.shape[1], device=probs.device)]


def cross_entropy(logits: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    Cross-entropy of predicted distributions against a target distribution, averaged over the batch.

    :param logits: Unnormalised log-probabilities, shape (..., B, n_atoms)
    :param target: Target probabilities, shape (B, n_atoms)
    :return: Loss in nats, shape (...)
    """
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean(dim=-1)
