"""
Start here: MFPO's gradient step with the paper's settings (``MFPO.PAPER``), written straight from the paper's equations
(https://arxiv.org/abs/2604.14698).

``plain_step`` reads from top to bottom, and saves nothing. Every input is expanded and concatenated, derivatives come from
``th.func.jvp`` on all rows, and probabilities are written out. ``MFPO._update`` in ``sb3_mfpo/mfpo/mfpo.py`` takes the same
step, block by block, about 1.7 times as fast. The tests compare the two; ``speed.py`` times them.
"""

from __future__ import annotations

import math
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import polyak_update
from torch.nn import functional as F

from sb3_mfpo import MFPO
from sb3_mfpo.maths import boltzmann, categorical
from sb3_mfpo.maths.paths import linear_path
from sb3_mfpo.mfpo.mfpo import GradientStepDraws
from sb3_mfpo.nets.flow import MeanFlowMLP
from sb3_mfpo.nets.layers import MultiInputMLP, TanhGELU


def plain_step(model: MFPO, batch: ReplayBufferSamples, draws: GradientStepDraws) -> dict[str, float]:
    """
    One gradient step: critics and their targets, actor, divergence network, temperature.

    :param model: With the paper's settings; its networks and optimizers change
    :param batch: Sample of a replay buffer, vector observations
    :param draws: The step's randomness
    :return: Losses and other quantities by name
    """
    observations, next_observations = batch.observations.float(), batch.next_observations.float()
    atoms: th.Tensor = model.critic.atoms  # type: ignore[assignment]
    divergence_network: Any = model.divergence
    assert model.log_ent_coef is not None and model.ent_coef_optimizer is not None
    alpha = model.log_ent_coef.detach().exp()
    metrics = {"ent_coef": alpha.item()}

    # Critics: soft Bellman target of the value distributions, cross-entropy (Eq. 29)
    with th.no_grad():
        next_actions, next_log_prob = sample(model, next_observations, draws.next_noise)
        logits = th.stack([mlp(q, next_observations, next_actions) for q in model.critic_target.q_networks])  # type: ignore[arg-type]
        entropy_bonus = -alpha * next_log_prob.unsqueeze(1)
        positions = batch.rewards + (1 - batch.dones) * model.gamma * (atoms + entropy_bonus)
        projected = categorical.project(logits.softmax(-1), positions, atoms)
        target = categorical.reduce_distributions(projected, atoms, model.policy.critic_reduction)
    logits = th.stack([mlp(q, observations, batch.actions) for q in model.critic.q_networks])  # type: ignore[arg-type]
    loss = -(target * logits.log_softmax(-1)).sum(-1).mean(-1).sum()
    metrics["critic_loss"] = descend(loss, model.critic.optimizer)
    polyak_update(model.critic.parameters(), model.critic_target.parameters(), model.tau)

    # Velocity of the Boltzmann policy exp(Q / alpha), by importance sampling from two proposals (Eq. 19-27)
    t, r, noise = draws.actor.t, draws.actor.r, draws.actor.noise
    with th.no_grad():
        actions, log_prob = sample(model, observations.unsqueeze(1), draws.policy_noise)
        noisy = (1 - t) * actions[:, 0] + t * noise
        gaussian_actions = boltzmann.gaussian_proposal(noisy, *linear_path(t), draws.uniform)
        q = q_values(model, observations.unsqueeze(1), th.cat([actions, gaussian_actions], dim=1))
        k = model.n_policy_samples
        distance = ((noisy.unsqueeze(1) - (1 - t).unsqueeze(1) * actions) / t.unsqueeze(1)).square().sum(-1)
        policy_weights = (q[:, :k] / alpha - 0.5 * distance - log_prob).softmax(dim=1)
        gaussian_weights = (q[:, k:] / alpha).softmax(dim=1)
        estimates, sizes = [], []
        for weights, samples in ((policy_weights, actions), (gaussian_weights, gaussian_actions)):
            estimates.append((weights.unsqueeze(-1) * (noisy.unsqueeze(1) - samples) / t.unsqueeze(1)).sum(1))
            sizes.append(1 / weights.square().sum(1, keepdim=True))
        velocity = (sizes[0] * estimates[0] + sizes[1] * estimates[1]) / (sizes[0] + sizes[1])

    # Actor: the MeanFlow identity around this velocity (Eq. 28)
    def average_velocity(a: th.Tensor, t: th.Tensor, h: th.Tensor) -> th.Tensor:
        return flow(model.actor.network, observations, a, t, h)

    one = th.ones_like(t)
    with th.no_grad():
        derivative = th.func.jvp(average_velocity, (noisy, t, t - r), (velocity, one, one))[1]
    loss = F.mse_loss(average_velocity(noisy, t, t - r), velocity - (t - r) * derivative)
    metrics["actor_loss"] = descend(loss, model.actor.optimizer)
    polyak_update(model.actor.parameters(), model.actor_target.parameters(), model.actor_tau)

    # Divergence network: the MeanFlow identity around the divergence of the actor's velocity (Eq. 12-18)
    t, r, noise = draws.divergence.t, draws.divergence.r, draws.divergence.noise
    noisy = (1 - t) * actions[:, 0] + t * noise

    def average_divergence(a: th.Tensor, t: th.Tensor, h: th.Tensor) -> th.Tensor:
        return flow(divergence_network, observations, a, t, h)

    with th.no_grad():
        velocity = average_velocity(noisy, t, th.zeros_like(t))
        products = [
            th.func.jvp(lambda a: average_velocity(a, t, th.zeros_like(t)), (noisy,), (probe,))[1] for probe in draws.probes
        ]
        divergence = (draws.probes * th.stack(products)).sum(-1, keepdim=True).mean(0)
        derivative = th.func.jvp(average_divergence, (noisy, t, t - r), (velocity, one, one))[1]
    loss = F.mse_loss(average_divergence(noisy, t, t - r), divergence - (t - r) * derivative)
    metrics["divergence_loss"] = descend(loss, divergence_network.optimizer)

    # Temperature: up when the entropy is below its target (Eq. 30)
    entropy = -log_prob.mean()
    loss = (model.log_ent_coef.exp() * (entropy - float(model.target_entropy))).mean()
    metrics["ent_coef_loss"] = descend(loss, model.ent_coef_optimizer)
    return metrics | {"entropy": entropy.item()}


def sample(model: MFPO, features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Actions and log-probabilities."""
    divergence: Any = model.divergence
    times, actions = model.policy.actor.sampling_times, noise
    log_prob = th.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    for t, r in zip(times[:-1, None], times[1:, None], strict=True):
        velocity = flow(model.actor.network, features, actions, t, t - r)
        log_prob = log_prob + ((t - r) * flow(divergence, features, actions, t, t - r)).squeeze(-1)
        actions = actions - (t - r) * velocity
    return actions.clamp(-1, 1), log_prob


def flow(network: MeanFlowMLP, features: th.Tensor, actions: th.Tensor, t: th.Tensor, h: th.Tensor) -> th.Tensor:
    """Average over an interval: every action has its own embedding."""
    t, h = (value.expand(*actions.shape[:-1], 1) for value in (t, h))
    return mlp(network, actions, features, embedding(network, t, h))


def embedding(network: MeanFlowMLP, t: th.Tensor, h: th.Tensor) -> th.Tensor:
    """Of intervals: the sum of an embedding of t (..., 1) and one of h (..., 1)."""
    first, _, last = network.embed.mlp
    embeddings = []
    weights = (*first.parameters(), *last.parameters())
    for time, frequencies, w1, b1, w2, b2 in zip((t, h), network.embed.frequencies, *weights, strict=True):
        angles = 2 * math.pi * time * frequencies.flatten()
        hidden = F.gelu(th.cat([angles.cos(), angles.sin()], dim=-1) @ w1 + b1, approximate="tanh")
        embeddings.append(hidden @ w2 + b2)
    return embeddings[0] + embeddings[1]


def q_values(model: MFPO, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """The reduced value of every action."""
    atoms: th.Tensor = model.critic.atoms  # type: ignore[assignment]
    probs = th.stack([mlp(network, features, actions) for network in model.critic.q_networks]).softmax(dim=-1)  # type: ignore[arg-type]
    return categorical.reduce_values((probs * atoms).sum(-1), model.policy.critic_reduction)


def mlp(network: MultiInputMLP, *inputs: th.Tensor) -> th.Tensor:
    """One layer on the concatenation of the expanded inputs, all rows at once, PyTorch's own GELU."""
    shape = th.broadcast_shapes(*(value.shape[:-1] for value in inputs))
    hidden = network.input_layer(th.cat([value.expand(*shape, value.shape[-1]) for value in inputs], dim=-1))
    for layer in network.body:
        hidden = F.gelu(hidden, approximate="tanh") if isinstance(layer, TanhGELU) else layer(hidden)
    return hidden


def descend(loss: th.Tensor, optimizer: th.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class PlainMFPO(MFPO):
    """MFPO with the plain gradient step, for ``MFPO.PAPER``, vector observations and the default kinds of networks."""

    def _setup_model(self) -> None:
        self.policy_kwargs = {"optimizer_kwargs": dict(foreach=False), **self.policy_kwargs}
        super()._setup_model()

    def _update(
        self,
        batch: ReplayBufferSamples,
        draws: GradientStepDraws,
        update_target: bool = True,
        improve_policy: bool = True,
    ) -> dict[str, th.Tensor]:
        metrics = plain_step(self, batch, draws)
        return {name: th.tensor(value) for name, value in metrics.items()}
