"""What MFPO and SOM share beyond an actor-critic: times of a regression, its draws, and the regression itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.utils import update_learning_rate

from sb3_mfpo.checks import check_choice, check_range
from sb3_mfpo.maths.boltzmann import latin_hypercube
from sb3_mfpo.maths.mean_flow import logit_normal_times, mean_flow_target, start_on_grid, uniform_times
from sb3_mfpo.nets.flow import MeanFlowActor, MeanFlowMLP
from sb3_mfpo.training.actor_critic import ActorCriticAlgorithm
from sb3_mfpo.training.mean_flow_policy import MeanFlowPolicy

INTERVALS = ("grid", "any")


class MeanFlowDraws(NamedTuple):
    """
    Random draws of a regression on the flow.

    ``t`` and ``r``: time pairs in (0, 1) and [0, 1), shape (B, 1); ``n_equal``: number of leading rows with r = t; ``noise``:
    standard normal, shape (B, d).
    """

    t: th.Tensor
    r: th.Tensor
    n_equal: int
    noise: th.Tensor


class MeanFlowAlgorithm(ActorCriticAlgorithm):
    """
    Off-policy actor-critic with a mean-flow policy.

    :param args: Those of ``ActorCriticAlgorithm``
    :param actor_rate: By how many times ``learning_rate`` the actor learns, above 0
    :param intervals: "grid" (r is the end of the sampler's step through t) or "any" (r is drawn)
    :param equal_time_share: Share in [0, 1] of a batch with r = t, that is of plain flow matching
    :param uniform_time_share: Share in [0, 1] of times that are uniform; the others are logit-normal
    :param time_mean: Mean of the normal distribution inside the logit-normal distribution of times
    :param time_std: Its standard deviation
    :param kwargs: Those of ``ActorCriticAlgorithm``
    :raises ValueError: If an argument is out of range; the message names it
    """

    policy: MeanFlowPolicy

    def __init__(
        self,
        *args: Any,
        actor_rate: float,
        intervals: str,
        equal_time_share: float,
        uniform_time_share: float,
        time_mean: float,
        time_std: float,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.actor_rate = actor_rate
        self.intervals = intervals
        self.equal_time_share = equal_time_share
        self.uniform_time_share = uniform_time_share
        self.time_mean = time_mean
        self.time_std = time_std

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_range("actor_rate", self.actor_rate, above=0)
        check_choice("intervals", self.intervals, INTERVALS)
        for name in ("equal_time_share", "uniform_time_share"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("time_mean", self.time_mean)
        check_range("time_std", self.time_std, low=0)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        self._set_rate(self.actor.optimizer, self.actor_rate)

    def _set_rate(self, optimizer: th.optim.Optimizer, rate: float) -> None:
        """
        :param optimizer: An optimizer
        :param rate: By how many times ``learning_rate`` it learns
        """
        update_learning_rate(optimizer, rate * self.lr_schedule(self._current_progress_remaining))

    def _normal(self, *shape: int) -> th.Tensor:
        return th.randn(*shape, device=self.device)

    def _stratified(self, batch_size: int, n: int, d: int) -> th.Tensor:
        """
        :param batch_size: Minibatch size B
        :param n: Number K of draws per state
        :param d: Number of action coordinates
        :return: Draws from [0, 1), stratified over K, shape (B, K, d)
        """
        order = th.rand(n, d, device=self.device).argsort(dim=0)
        return latin_hypercube(th.rand(batch_size, n, d, device=self.device), order)

    def _draw_regression(self, batch_size: int, network_type: str) -> MeanFlowDraws:
        """
        :param batch_size: Minibatch size B
        :param network_type: "mean_flow" or "flow_matching", of which the latter learns from r = t alone
        :return: Draws of a regression on the flow
        """
        n_equal = batch_size if network_type == "flow_matching" else int(self.equal_time_share * batch_size)
        t, r = self._draw_times(batch_size, n_equal)
        return MeanFlowDraws(t, r, n_equal, self._normal(batch_size, get_action_dim(self.action_space)))

    def _draw_times(self, batch_size: int, n_equal: int) -> tuple[th.Tensor, th.Tensor]:
        """
        :param batch_size: Minibatch size B
        :param n_equal: Number of leading rows with r = t
        :return: t and r in [0, 1), r <= t, each of shape (B, 1)
        """
        uniform = th.rand(batch_size, 3, device=self.device)
        pairs = logit_normal_times(self._normal(batch_size, 2), self.time_mean, self.time_std, n_equal)
        chosen = uniform[:, 2:] < self.uniform_time_share
        t, r = (th.where(chosen, *times) for times in zip(uniform_times(uniform[:, :2], n_equal), pairs, strict=True))
        if self.intervals == "grid":
            r = th.cat([t[:n_equal], start_on_grid(t[n_equal:], self.actor.sampling_times)])
        return t, r

    @staticmethod
    def _regression_errors(
        network: MeanFlowActor | MeanFlowMLP,
        features: th.Tensor,
        noisy_actions: th.Tensor,
        draws: MeanFlowDraws,
        velocity: th.Tensor,
        instantaneous: th.Tensor,
    ) -> th.Tensor:
        """
        By how much a network's average over [r, t] misses the target of the MeanFlow identity (Eq. 28 for the velocity,
        Eq. 12-18 for the divergence, of https://arxiv.org/abs/2604.14698).

        :param network: The actor, or the divergence network
        :param features: State features, shape (B, features_dim)
        :param noisy_actions: a_t, shape (B, d)
        :param draws: Times
        :param velocity: Velocity at a_t, shape (B, d)
        :param instantaneous: Value at t of what is averaged, shape (B, output_dim)
        :return: Average minus target, shape (B, output_dim)
        """
        t, h = draws.t, draws.t - draws.r
        average, jvp = network.linearize(features, noisy_actions, t, h)
        # Rows with r = t need no derivative
        rows = slice(draws.n_equal, None)
        derivative = jvp(velocity[rows], th.ones_like(t[rows]), rows=rows)
        return average - mean_flow_target(instantaneous, h, derivative)
