"""The scale of a task's discounted returns, as seen so far: values and temperature are learned in units of it."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd


def discounted_returns(rewards: np.ndarray, starts: np.ndarray, gamma: float, before: np.ndarray) -> np.ndarray:
    """
    Discounted returns G so far, ``G <- r + gamma G``, which begin at 0 with every episode.

    :param rewards: Rewards of one step, shape (n_envs,)
    :param starts: Which of the environments have taken the first step of an episode, shape (n_envs,)
    :param gamma: Discount factor in [0, 1]
    :param before: The returns before the step; of another number of environments they count as 0
    :return: Those after it, shape (n_envs,)
    """
    carried = np.zeros(len(rewards)) if len(before) != len(rewards) else np.where(starts, 0.0, before)
    return np.asarray(rewards, np.float64) + gamma * carried


class ReturnScale:
    """
    Running scale of the discounted returns of all environments: their standard deviation, or the largest of them over
    ``value_range`` where that is more, so that all of them are within ``value_range`` scales. 1 as long as all rewards were 0.

    It is proportional to the rewards. A factor that is a power of two changes no other bit of it. (The statistics are those of
    SimbaV2, https://arxiv.org/abs/2502.15280, without its epsilon.)

    Values are learned in a ``unit`` that follows it in steps of a tenth or more.

    :param value_range: Half-width of the values' support, in scales, above 0
    """

    # A change by less is not worth the rounding of the values' distributions
    STEP = 1.1

    def __init__(self, value_range: float):
        self.value_range = value_range
        # In units of return; 0 until there is a reward that is not
        self.unit = 0.0
        self.largest = 0.0
        # Without SB3's pseudo-count, which has a unit
        self.moments = RunningMeanStd(epsilon=0.0)

    @property
    def value(self) -> float:
        """The scale, above 0, in units of return."""
        return max(float(np.sqrt(self.moments.var)), self.largest / self.value_range) or 1.0

    def follow(self) -> float:
        """
        Let the unit follow the scale.

        :return: By which factor the unit has changed; 1 if there was none
        """
        value, before = self.value, self.unit
        if self.largest == 0 or (before > 0 and 1 / self.STEP < value / before < self.STEP):
            return 1.0
        self.unit = value
        return value / before if before > 0 else 1.0

    @property
    def settled(self) -> bool:
        """Whether a hundred returns were seen: until then the scale moves by itself."""
        return self.moments.count >= 100

    def update(self, returns: np.ndarray) -> None:
        """
        :param returns: Discounted returns, shape (n,)
        """
        self.largest = max(self.largest, float(np.abs(returns).max()))
        self.moments.update(returns)

    def state(self) -> list[float]:
        """
        :return: The unit, the largest return in units of return, and the number, mean and variance of the returns, for
            ``restore``
        """
        moments = self.moments
        return [self.unit, self.largest, float(moments.count), float(moments.mean), float(moments.var)]

    def restore(self, state: list[float]) -> None:
        """
        :param state: From ``state``
        """
        self.unit, self.largest, self.moments.count, mean, variance = state
        self.moments.mean, self.moments.var = np.asarray(mean), np.asarray(variance)
