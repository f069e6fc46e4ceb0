"""Checks of arguments: a clear ``ValueError`` before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


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
