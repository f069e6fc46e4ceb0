"""Replay storage."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer


def store_as_float32(buffer: ReplayBuffer) -> None:
    """
    Let an empty replay buffer store float64 observations as float32, in half the memory. The networks read float32 in any
    case; MuJoCo's environments give float64.

    :param buffer: A replay buffer of SB3 or a subclass
    """
    for name in ("observations", "next_observations"):
        arrays = getattr(buffer, name, None)
        if isinstance(arrays, dict):
            setattr(buffer, name, {key: _as_float32(array) for key, array in arrays.items()})
        elif arrays is not None:
            setattr(buffer, name, _as_float32(arrays))


def _as_float32(array: np.ndarray) -> np.ndarray:
    # New zeros, not a conversion: the system gives them memory only when it is written to
    return np.zeros(array.shape, np.float32) if array.dtype == np.float64 else array
