"""Checks of arguments and of what environments return: a clear ``ValueError`` before anything is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


def check_integer(name: str, value: Any, minimum: int) -> None:
    """
    :param name: Name of the argument, for the message
    :param value: Its value
    :param minimum: Smallest value allowed
    :raises ValueError: If the value is not an integer of at least ``minimum``
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, not {value!r}.")


def check_range(name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> None:
    """
    :param name: Name of the argument, for the message
    :param value: Its value
    :param low: Smallest value allowed
    :param high: Largest value allowed
    :param above: What the value must exceed
    :raises ValueError: If the value is not a finite number in [low, high] above ``above``
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not low <= value <= high:
        raise ValueError(f"`{name}` must be a number in [{low:g}, {high:g}], not {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, not {value!r}.")
    if not value > above:
        raise ValueError(f"`{name}` must be above {above:g}, not {value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """
    :param name: Name of the argument, for the message
    :param value: Its value
    :param choices: The values allowed
    :raises ValueError: If the value is not one of ``choices``
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, not {value!r}.")


def check_finite(
    what: str,
    rows: Any,
    dtype: DTypeLike | None,
    num_timesteps: int,
    first_env: int = 0,
    may_be_non_finite: bool = False,
    way_out: str = "",
) -> None:
    """
    Check numbers that come from an environment, as they will be stored.

    :param what: What the numbers are, for the message
    :param rows: One row per environment: an array, or anything that NumPy makes one of
    :param dtype: Type that they are stored as
    :param num_timesteps: Environment steps so far, for the message
    :param first_env: Index of the environment that the first row comes from
    :param may_be_non_finite: Whether NaN and infinite numbers are meant
    :param way_out: What a user may do about them, for the message
    :raises ValueError: If a number is NaN or infinite, or something is not a number of this type
    """
    try:
        given = np.asarray(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = given.astype(dtype, copy=False)
    except (TypeError, ValueError, OverflowError) as error:
        if len(rows) > 1:
            # Which of them was it?
            for index in range(len(rows)):
                row = rows[index : index + 1]
                check_finite(what, row, dtype, num_timesteps, first_env + index, may_be_non_finite, way_out)
        raise ValueError(
            f"Environment {first_env} returned, at step {num_timesteps}, as {what} what cannot be stored as "
            f"{np.dtype(dtype).name}: {rows[0]!r} ({error}). It must fit the observation space, and rewards must be numbers."
        ) from error
    if may_be_non_finite:
        return
    finite = np.isfinite(numbers)
    if given.dtype.kind == "f":
        # Stored as integers, NaN would be some number
        finite &= np.isfinite(given)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise ValueError(
            f"Environment {first_env + row} returned a non-finite {what} at step {num_timesteps}: {given[row]}. It was not "
            "stored and the networks were not updated: saving the model now gives a clean checkpoint. Correct the "
            f"environment{way_out}. `stable_baselines3.common.vec_env.VecCheckNan` helps to find the cause."
        )
