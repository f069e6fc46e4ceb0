"""Callbacks for long training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mfpo.checks import check_integer, check_range
from sb3_mfpo.nets.critics import CategoricalCritic
from sb3_mfpo.nets.layers import MultiInputMLP
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm


class HealthCallback(BaseCallback):
    """
    Check now and then, on a small batch of the replay buffer, whether the training of MFPO or SOM is healthy. Nothing is
    changed, and training draws the same random numbers as without. (The effective sample sizes are logged by the training
    itself.)

    Logged under ``health/``:

    - ``log_prob_bias``, ``log_prob_error``: mean difference and mean absolute difference, in nats, between the log-probability
      by the divergence network and the exact one, that of a fine Euler solve from the same noise with the trace of the full
      Jacobian. The temperature is steered by the former: a bias shifts the entropy by as much. (MFPO alone.)
    - ``actions_at_bounds``: share of action coordinates at a bound
    - ``dead_units_actor``, ``dead_units_critic``: share of hidden units that give the same for the whole batch
    - ``critic_saturation``: probability that the critics put on the two ends of the value range (categorical critics)

    :param check_freq: Check every so many calls of ``env.step()``, as in SB3's callbacks
    :param n_states: Number of states of a check, at least 2
    :param solver_steps: Number of Euler steps of the exact log-probability
    :param max_bias: Warn when the bias exceeds so many nats per action coordinate
    :param verbose: Verbosity level
    :raises ValueError: If an argument is out of range, or the model is of another algorithm
    """

    # Standard deviation below which a unit counts as dead; behind a LayerNorm activations are of the order of 1
    DEAD_STD = 1e-3

    def __init__(
        self, check_freq: int = 10_000, n_states: int = 64, solver_steps: int = 100, max_bias: float = 0.25, verbose: int = 0
    ):
        super().__init__(verbose)
        for name, value in (("check_freq", check_freq), ("solver_steps", solver_steps)):
            check_integer(name, value, minimum=1)
        # With a single state every unit would be constant
        check_integer("n_states", n_states, minimum=2)
        check_range("max_bias", max_bias, low=0)
        self.check_freq = check_freq
        self.n_states = n_states
        self.solver_steps = solver_steps
        self.max_bias = max_bias

    def _init_callback(self) -> None:
        if not isinstance(self.model, MeanFlowAlgorithm):
            raise ValueError(
                f"`HealthCallback` looks into the networks of MFPO or SOM, which {type(self.model).__name__} does not have. "
                "Remove the callback."
            )

    def _on_step(self) -> bool:
        model: Any = self.model
        if self.n_calls % self.check_freq == 0 and model._n_updates > 0 and _can_be_sampled(model.replay_buffer):
            for name, value in self.check().items():
                self.logger.record(f"health/{name}", value)
        return True

    @th.no_grad()
    def check(self) -> dict[str, float]:
        """
        :return: The quantities above by name, without their prefix
        """
        model: Any = self.model
        policy, training = model.policy, model.policy.training
        # The buffer draws from NumPy's generator, which belongs to the training
        state = np.random.get_state()
        observations = model.replay_buffer.sample(self.n_states, env=model._vec_normalize_env).observations
        np.random.set_state(state)
        generator = th.Generator().manual_seed(model.num_timesteps)
        noise = th.randn(self.n_states, policy.candidate_noise.shape[1], generator=generator).to(model.device)

        policy.set_training_mode(False)
        features = policy.actor_target.encode(observations)
        actions, result = policy.act(features, noise), {}
        # SOM has no log-probabilities
        if hasattr(policy, "divergence"):
            _, log_prob = policy.sample(features, noise)
            difference = log_prob - policy.solve(features, noise, self.solver_steps)[1]
            result["log_prob_bias"] = difference.mean().item()
            result["log_prob_error"] = difference.abs().mean().item()
            self._warn_of_bias(result["log_prob_bias"], noise.shape[1])
        critic_features = policy.critic.encode(observations)
        actor_inputs = (noise, features, policy.actor_target.network.embed(*th.ones(2, 1, device=model.device)))
        result |= {
            "actions_at_bounds": (actions.abs() == 1).float().mean().item(),
            "dead_units_actor": self._dead_units([policy.actor_target.network], actor_inputs),
            "dead_units_critic": self._dead_units(policy.critic.q_networks, (critic_features, actions)),
        }
        if isinstance(policy.critic, CategoricalCritic):
            probs = policy.critic.outputs(critic_features, actions).softmax(dim=-1)
            result["critic_saturation"] = (probs[..., 0] + probs[..., -1]).mean().item()
        policy.set_training_mode(training)
        return result

    def _dead_units(self, networks: Sequence[MultiInputMLP], inputs: tuple[th.Tensor, ...]) -> float:
        """
        :param networks: Networks of the same inputs
        :param inputs: Of a batch
        :return: Share of their hidden units whose activation is constant over the batch
        """
        dead = [
            activation.std(dim=0) < self.DEAD_STD for network in networks for activation in network.hidden_activations(*inputs)
        ]
        # Linear networks have no hidden units
        return th.cat(dead).float().mean().item() if dead else 0.0

    def _warn_of_bias(self, bias: float, action_dim: int) -> None:
        # Also when it is NaN
        if not abs(bias) <= self.max_bias * action_dim:
            warnings.warn(
                f"At step {self.model.num_timesteps} the divergence network's log-probabilities are off by {bias:.2f} nats on "
                f"average, more than `max_bias` = {self.max_bias:g} per action coordinate: the policy's entropy is then not "
                "what its target asks for. More `n_probes` or a lower learning rate may help.",
                stacklevel=2,
            )


def _can_be_sampled(buffer: ReplayBuffer | None) -> bool:
    """
    :param buffer: A replay buffer, which is empty at first when a trained model was loaded
    :return: Whether it has something to give: a transition, or for ``HerReplayBuffer`` a whole episode
    """
    if isinstance(buffer, HerReplayBuffer):
        return bool(buffer.ep_length.any())
    return buffer is not None and buffer.size() > 0
