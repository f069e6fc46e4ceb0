"""Guards around the environments: what they return is checked, and a worker that ended is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import DTypeLike
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv


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


def check_observation(
    what: str,
    rows: Any,
    space: spaces.Space,
    num_timesteps: int,
    first_env: int = 0,
    may_be_non_finite: bool = False,
) -> None:
    """
    Check what will be stored of observations: the entries that the observation space has, as its types.

    :param what: What they are, for the message
    :param rows: One per environment, or a dictionary of such
    :param space: Observation space
    :param num_timesteps: Environment steps so far, for the message
    :param first_env: Index of the environment that the first row comes from
    :param may_be_non_finite: Whether NaN and infinite numbers are meant
    :raises ValueError: If a number is NaN or infinite, or an entry is missing or not of its type
    """
    parts = {what: (rows, space)}
    if isinstance(space, spaces.Dict):
        for key in space:
            if key not in rows:
                raise ValueError(
                    f"Environment {first_env} returned no {key!r} in its {what} at step {num_timesteps}, but only "
                    f"{', '.join(map(repr, rows))}. The observation space has it."
                )
        parts = {f"{what} {key!r}": (rows[key], part) for key, part in space.items()}
    way_out = ", or set `allow_non_finite_observations=True` if the features extractor replaces such numbers"
    for name, (values, part) in parts.items():
        check_finite(name, values, part.dtype, num_timesteps, first_env, may_be_non_finite, way_out)


@contextmanager
def naming_workers_that_ended(env: VecEnv | None) -> Iterator[None]:
    """
    Where a connection broke because a worker process of ``SubprocVecEnv`` has ended, say which one. Connections of others
    (a callback's, a simulator's, standard output) break with the same errors, which pass unchanged.

    :param env: Vectorized environment
    """
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        venv = None if env is None else env.unwrapped
        if not isinstance(venv, SubprocVecEnv):
            raise
        # A worker closes its connection a moment before it ends
        ended = connection.wait([process.sentinel for process in venv.processes], timeout=1)
        if not ended:
            raise
        message = "The connection to the environments broke."
        for index, process in enumerate(venv.processes):
            if process.sentinel in ended:
                # For the exit code
                process.join(timeout=1)
                message += f" The process of environment {index} has ended (exit code {process.exitcode})."
        raise RuntimeError(message + " Its own error, if any, is printed above; the model can still be saved.") from error
