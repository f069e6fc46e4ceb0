"""Transitions that are there before the first step: a replay buffer filled from Minari's datasets or plain arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mfpo.runs.state import end_episodes
from sb3_mfpo.training.return_scale import discounted_returns

FIELDS = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")


def load_transitions(model: OffPolicyAlgorithm, dataset: Any) -> int:
    """
    Add the transitions of a dataset to a model's replay buffer, as if the model had collected them: the scale of the returns
    follows them, and so do the statistics of the observations in a ``VecNormalize`` that is in training. ``num_timesteps``
    stays. Then ``model.learn(...)`` goes on from them, or ``model.train(...)`` learns from them alone.

    :param model: MFPO, SOM or any other off-policy algorithm of SB3's
    :param dataset: A ``minari.MinariDataset``, or n transitions in the order in which they were collected, as a mapping of
        arrays: ``observations`` and ``next_observations``, shape (n, ...) (for Dict spaces a mapping of such), ``actions`` in
        the bounds of the action space, shape (n, ...), ``rewards``, ``terminations`` and ``truncations``, shape (n,). A last
        transition that ends no episode counts as truncated.
    :return: Number of transitions n. Several environments get equal pieces; where these do not add up to n, they overlap by a
        few transitions.
    :raises ValueError: If the buffer is too small, or the data do not fit the spaces, leave the bounds, are not finite or not
        in order; the message says which. The model is then as it was.
    """
    buffer = model.replay_buffer
    if buffer is None:
        raise ValueError("`model` has no replay buffer: give it an environment first.")
    data = _of_episodes(dataset.iterate_episodes()) if hasattr(dataset, "iterate_episodes") else dataset
    data = _checked(data, model)
    n, n_envs = len(data["rewards"]), model.n_envs
    length = -(-n // n_envs)
    if length > buffer.buffer_size:
        raise ValueError(
            f"`dataset` has {n} transitions, of which the model keeps {buffer.buffer_size * n_envs}: give the model a higher "
            "`buffer_size`, or fewer transitions."
        )

    end_episodes(buffer)
    scale, returns = getattr(model, "return_scale", None), np.zeros(0)
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None and normalizer.training and normalizer.norm_obs:
        _follow_observations(normalizer, data["observations"])
    ends = data["terminations"] | data["truncations"]
    pieces = np.linspace(0, n - length, n_envs).astype(int)
    starts = np.ones(n_envs, dtype=bool)
    for step in range(length):
        rows = pieces + step
        reward, terminated = data["rewards"][rows], data["terminations"][rows]
        done = ends[rows] | (step == length - 1)
        if scale is not None:
            scaled = reward if normalizer is None else normalizer.normalize_reward(reward)
            returns = discounted_returns(scaled, starts, model.gamma, returns)
            scale.update(returns)
        buffer.add(
            _take(data["observations"], rows),
            _take(data["next_observations"], rows),
            data["actions"][rows],
            reward,
            done,
            [{"TimeLimit.truncated": bool(truncated)} for truncated in done & ~terminated],
        )
        starts = done
    return n


def _of_episodes(episodes: Iterable[Any]) -> dict[str, Any]:
    """
    :param episodes: Minari's episodes, whose observations are one more than their actions
    :return: Their transitions, one episode after the other
    :raises ValueError: If there are no episodes
    """
    parts: dict[str, list[Any]] = {name: [] for name in FIELDS}
    for episode in episodes:
        truncations = np.array(episode.truncations, dtype=bool)
        # An episode may have been cut
        truncations[-1] |= not episode.terminations[-1]
        parts["observations"].append(_take(episode.observations, slice(None, -1)))
        parts["next_observations"].append(_take(episode.observations, slice(1, None)))
        for name in ("actions", "rewards", "terminations"):
            parts[name].append(getattr(episode, name))
        parts["truncations"].append(truncations)
    if not parts["rewards"]:
        raise ValueError("`dataset` has no episodes.")
    return {name: _concatenate(rows) for name, rows in parts.items()}


def _take(observations: Any, rows: Any) -> Any:
    if isinstance(observations, Mapping):
        return {key: values[rows] for key, values in observations.items()}
    return observations[rows]


def _concatenate(rows: list[Any]) -> Any:
    if isinstance(rows[0], Mapping):
        return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    return np.concatenate(rows)


def _follow_observations(normalizer: VecNormalize, observations: Any) -> None:
    if isinstance(normalizer.obs_rms, dict):
        for key, moments in normalizer.obs_rms.items():
            moments.update(observations[key])
    else:
        normalizer.obs_rms.update(observations)


def _checked(data: Mapping[str, Any], model: OffPolicyAlgorithm) -> dict[str, Any]:
    """
    :param data: The dataset's arrays
    :param model: The model that they are for
    :return: The same as they are stored, actions scaled to [-1, 1]
    :raises ValueError: If something does not fit
    """
    if not isinstance(data, Mapping) or set(data) != set(FIELDS):
        given = f"one of {', '.join(map(repr, data))}" if isinstance(data, Mapping) else repr(type(data))
        raise ValueError(f"`dataset` must be a `MinariDataset` or a mapping of {', '.join(map(repr, FIELDS))}, not {given}.")
    rewards = np.asarray(data["rewards"])
    if rewards.ndim != 1 or len(rewards) == 0:
        raise ValueError(f"`rewards` must have the shape (n,) with n of at least 1, not {rewards.shape}.")
    n, non_finite = len(rewards), getattr(model, "allow_non_finite_observations", False)
    checked: dict[str, Any] = {"rewards": _numbers("rewards", rewards, (n,), np.dtype(np.float32))}
    for name in ("terminations", "truncations"):
        flags = np.asarray(data[name])
        if flags.shape != (n,) or not np.isin(flags, (0, 1)).all():
            raise ValueError(f"`{name}` must be {n} times True or False, as there are {n} rewards, not {flags}.")
        checked[name] = flags.astype(bool)
    for name in ("observations", "next_observations"):
        space = model.observation_space
        if not isinstance(space, spaces.Dict):
            checked[name] = _numbers(name, data[name], (n, *(space.shape or ())), space.dtype, non_finite)
            continue
        if not isinstance(data[name], Mapping) or set(data[name]) != set(space):
            raise ValueError(f"`{name}` must be a mapping of {', '.join(map(repr, space))}, as the observation space is.")
        checked[name] = {
            key: _numbers(f"{name}[{key!r}]", data[name][key], (n, *(part.shape or ())), part.dtype, non_finite)
            for key, part in space.items()
        }
    checked["actions"] = _scaled_actions(data["actions"], n, model)
    _check_order(checked)
    return checked


def _numbers(name: str, values: Any, shape: tuple[int, ...], dtype: Any, may_be_non_finite: bool = False) -> np.ndarray:
    """
    :param name: What the values are, for the message
    :param values: An array
    :param shape: Its shape
    :param dtype: Type that it is stored as
    :param may_be_non_finite: Whether NaN and infinite numbers are meant
    :return: The values as that type
    :raises ValueError: If they have another shape or kind, or are not finite
    """
    given = np.asarray(values)
    if given.shape != shape:
        hint = " Images have their channels first in the model." if sorted(given.shape) == sorted(shape) else ""
        raise ValueError(
            f"`{name}` must have the shape {shape}, as the model's spaces and the rewards are, not {given.shape}.{hint}"
        )
    if not np.can_cast(given.dtype, dtype, "same_kind"):
        raise ValueError(
            f"`{name}` must be stored as {np.dtype(dtype)}, which loses too much of {given.dtype}: convert it first."
        )
    with np.errstate(over="ignore"):
        numbers = given.astype(dtype)
    if not may_be_non_finite and not (finite := np.isfinite(numbers)).all():
        row = int(np.argwhere(~finite)[0][0])
        raise ValueError(f"`{name}` must be finite, which row {row} is not: {given[row]}.")
    return numbers


def _scaled_actions(actions: Any, n: int, model: OffPolicyAlgorithm) -> np.ndarray:
    space: Any = model.action_space
    scaled = model.policy.scale_action(_numbers("actions", actions, (n, *space.shape), space.dtype))
    # Rounding may leave the bounds
    outside = (np.abs(scaled) > 1 + 1e-5).reshape(n, -1).any(axis=1)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"`actions` must be in the bounds of the action space, {space}, as the environment takes them, which row {row} is "
            f"not: {np.asarray(actions)[row]}. Clip or rescale them first."
        )
    return scaled.clip(-1, 1)


def _check_order(data: dict[str, Any]) -> None:
    """
    :param data: Checked arrays
    :raises ValueError: If a transition neither ends an episode nor goes on in the next row
    """
    goes_on = ~(data["terminations"] | data["truncations"])[:-1]
    before, after = data["next_observations"], data["observations"]
    for earlier, later in zip(before.values(), after.values(), strict=True) if isinstance(before, dict) else [(before, after)]:
        same = (earlier[:-1] == later[1:]) | ((earlier[:-1] != earlier[:-1]) & (later[1:] != later[1:]))
        broken = goes_on & ~same.reshape(len(same), -1).all(axis=1)
        if broken.any():
            raise ValueError(
                f"Row {int(broken.argmax())} ends no episode, but its `next_observations` are not the `observations` of the "
                f"next row ({int(broken.sum())} of {len(broken) + 1} rows are like it). Returns are counted along episodes: "
                "give the rows in the order in which they were collected, and set `truncations` where some were left out."
            )
