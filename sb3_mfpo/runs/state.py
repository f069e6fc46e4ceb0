"""The state of a run that SB3's model file does not hold: saved, and restored."""

from __future__ import annotations

import hashlib
import io
import pickle
import random
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    Logger,
    TensorBoardOutputFormat,
)
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mfpo.runs import environments
from sb3_mfpo.runs.environments import UnknownState

# A callback's attribute with digests of its plain attributes when its first training began
START = "_data_at_start"
# Types of what a callback may count or collect
PLAIN = (bool, int, float, str, np.number, np.ndarray, list, tuple, dict, type(None))


def run_state(model: Any, callback: BaseCallback) -> dict[str, Any]:
    """
    Everything of a run that SB3's model file does not hold. Call it between rollouts.

    :param model: An algorithm in training
    :param callback: The callbacks of the training, as one
    :return: For ``write_run``; arrays are those in use, not copies
    """
    environment_states = environments.capture(model.env)
    # Where the training was ended within a rollout, its environments are one step ahead of what was stored
    within_rollout = model._stored_timesteps != model.num_timesteps
    if within_rollout:
        environment_states["unknown"] = "the training was ended within a rollout, when the environments were one step ahead"
    return {
        "run_id": model._run_id,
        "replay_buffer": model.replay_buffer,
        "random": random_states(model),
        "last_obs": model._last_obs,
        "last_original_obs": model._last_original_obs,
        "episode_starts": model._episode_starts & (not within_rollout),
        "environments": environment_states,
        "has_normalizer": model.get_vec_normalize_env() is not None,
        "logger": _logger_state(model.logger),
        "callbacks": [(type(part).__name__, _callback_state(part)) for part in parts_of(callback)],
    }


def random_states(model: Any) -> dict[str, Any]:
    """
    :param model: An algorithm
    :return: The states of all generators that its training draws from
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if model.device.type == "cuda" else [],
        "action_space": model.action_space.np_random.bit_generator.state,
    }


def restore_random_states(model: Any, states: dict[str, Any]) -> None:
    """
    :param model: An algorithm
    :param states: From ``random_states``
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    if model.device.type == "cuda" and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(states["cuda"])
    model.action_space.np_random.bit_generator.state = states["action_space"]


def restore_buffer(model: Any, state: dict[str, Any]) -> None:
    """
    Put a replay buffer back.

    :param model: A model with an environment
    :param state: From ``read_run``
    :raises ValueError: If the number of environments is another one
    """
    buffer: ReplayBuffer = state["replay_buffer"]
    if buffer.n_envs != model.n_envs:
        raise ValueError(f"`env` has {model.n_envs} environments, but the run was saved with {buffer.n_envs}.")
    buffer.device = model.device
    if isinstance(buffer, HerReplayBuffer):
        buffer.set_env(model.env)
    model.replay_buffer = buffer


def restore_run(model: Any, state: dict[str, Any], callback: BaseCallback) -> None:
    """
    Restore everything but the replay buffer. Call it after the environments were reset and the logger was made. Where the
    episodes cannot continue, they end in the replay buffer as if by a time limit, and new ones begin.

    :param model: A model whose training is about to begin
    :param state: From ``read_run``
    :param callback: The callbacks of the training, as one
    :raises ValueError: If the environments are wrapped in ``VecNormalize`` now and were not before, or the reverse
    """
    normalizer = model.get_vec_normalize_env()
    if (normalizer is not None) != state["has_normalizer"]:
        how = "with `VecNormalize`: wrap `env` in one" if state["has_normalizer"] else "without `VecNormalize`: unwrap `env`"
        raise ValueError(f"The run was saved {how}.")
    reason = _restore_environments(model, state["environments"])
    if reason is None:
        for name in ("last_obs", "last_original_obs", "episode_starts"):
            setattr(model, f"_{name}", state[name])
    else:
        end_episodes(model.replay_buffer)
        warnings.warn(f"The environments begin new episodes, as they cannot go on where they were: {reason}.", stacklevel=7)
    _restore_logger(model.logger, state["logger"], model.num_timesteps)
    _restore_callbacks(callback, state["callbacks"])
    restore_random_states(model, state["random"])


def _restore_environments(model: Any, saved: dict[str, Any]) -> str | None:
    """
    :param model: A model whose environments were reset
    :param saved: From ``environments.capture``
    :return: Why the environments have begun new episodes; None if the episodes continue
    """
    reason = saved["unknown"]
    if reason is None:
        try:
            environments.restore(model.env, saved, within_episode=True)
            return None
        except UnknownState as error:
            reason = str(error)
            # Some of the environments may have been restored
            model._last_obs = model.env.reset()
    with suppress(UnknownState):
        environments.restore(model.env, saved, within_episode=False)
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        # The reset has normalised before the statistics were restored
        model._last_original_obs = normalizer.get_original_obs()
        model._last_obs = normalizer.normalize_obs(model._last_original_obs)
    return reason


def end_episodes(buffer: ReplayBuffer) -> None:
    """
    Let the last transitions in a buffer end their episodes: what follows is not the rest of them.

    :param buffer: Where its last transitions end no episode, they count as truncated; as terminated in a buffer that keeps
        every observation once, where the next one will be overwritten
    """
    if isinstance(buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            # Truncating is what is wanted here
            warnings.filterwarnings("ignore", message="The last trajectory in the replay buffer will be truncated")
            buffer.truncate_last_trajectory()
    elif buffer.size() > 0:
        last = buffer.pos - 1
        if buffer.optimize_memory_usage:
            buffer.dones[last] = 1
        else:
            buffer.timeouts[last] = np.maximum(buffer.timeouts[last], 1 - buffer.dones[last])


# The logger: what it has not yet written, and its files, which a new logger empties


def _logger_state(logger: Logger) -> dict[str, Any]:
    return {
        "values": {name: dict(getattr(logger, name)) for name in ("name_to_value", "name_to_count", "name_to_excluded")},
        "files": [_log_file(output) for output in _outputs_to_files(logger)],
    }


def _restore_logger(logger: Logger, state: dict[str, Any], steps: int) -> None:
    for name, values in state["values"].items():
        getattr(logger, name).update(values)
    files = list(state["files"])
    for output in _outputs_to_files(logger):
        saved = next((file for file in files if file["kind"] == type(output).__name__), None)
        if saved is not None:
            files.remove(saved)
            environments.rewrite(output.file, saved["content"])
            if isinstance(output, CSVOutputFormat):
                output.keys = saved["keys"]
    for output in logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat):
            _forget_later_events(output, steps)


def _forget_later_events(output: TensorBoardOutputFormat, steps: int) -> None:
    # Tells TensorBoard to ignore what was logged after the checkpoint, as ``SummaryWriter(purge_step=...)`` does
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer = output.writer.file_writer
    assert writer is not None
    writer.add_event(Event(step=steps + 1, session_log=SessionLog(status=SessionLog.START)))


def _outputs_to_files(logger: Logger) -> list[Any]:
    # A human-readable output may be the console
    return [
        output
        for output in logger.output_formats
        if isinstance(output, (CSVOutputFormat, JSONOutputFormat))
        or (isinstance(output, HumanOutputFormat) and output.own_file)
    ]


def _log_file(output: Any) -> dict[str, Any]:
    output.file.flush()
    with open(output.file.name, newline="") as file:
        return {"kind": type(output).__name__, "content": file.read(), "keys": list(getattr(output, "keys", []))}


# Callbacks


def parts_of(callback: BaseCallback) -> list[BaseCallback]:
    """
    :param callback: A callback
    :return: It and all callbacks within it, each once, always in the same order
    """
    parts = [callback]
    for part in parts:
        for value in vars(part).values():
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, BaseCallback) and all(child is not known for known in parts):
                    parts.append(child)
    return parts


def remember_start(callback: BaseCallback) -> None:
    """
    Remember what callbacks hold, so that checkpoints save what has changed since. Later calls keep the first memory.

    :param callback: The callbacks of a training that begins, as one
    """
    for part in parts_of(callback):
        vars(part).setdefault(START, {name: _digest(data) for name, data in _plain_attributes(part).items()})


def _callback_state(callback: BaseCallback) -> dict[str, Any]:
    # Public attributes of plain types that have changed since the start, and the environments that it evaluates in
    start = vars(callback).get(START, {})
    changed = {name: data for name, data in _plain_attributes(callback).items() if _digest(data) != start.get(name)}
    evaluation = environments.capture(callback.eval_env) if isinstance(callback, EvalCallback) else None
    return {"data": changed, "environments": evaluation}


def _restore_callbacks(callback: BaseCallback, states: list[tuple[str, dict[str, Any]]]) -> None:
    # The first of a type gets the first state of that type, and so on: SB3 adds callbacks of its own (`progress_bar=True`)
    left = list(states)
    for part in parts_of(callback):
        state = next((one for one in left if one[0] == type(part).__name__), None)
        if state is not None:
            left.remove(state)
            _restore_callback(part, state[1])
    # All count their calls
    lost = [kind for kind, saved in left if saved["data"].keys() - {"n_calls", "num_timesteps"}]
    if lost:
        warnings.warn(
            f"What {', '.join(lost)} had collected is lost, as `callback` holds none to go on with it: resume with the "
            "callbacks that the run was begun with.",
            stacklevel=8,
        )


def _restore_callback(callback: BaseCallback, state: dict[str, Any]) -> None:
    vars(callback).update({name: pickle.loads(data) for name, data in state["data"].items()})
    saved = state["environments"]
    if isinstance(callback, EvalCallback) and saved is not None:
        with suppress(UnknownState):
            environments.restore(callback.eval_env, saved, within_episode=saved["unknown"] is None)


class _DataPickler(pickle.Pickler):
    """Refuses models, environments and other objects that a callback works on."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (BaseCallback, BaseAlgorithm, VecEnv, th.nn.Module, ReplayBuffer)):
            raise pickle.PicklingError
        return NotImplemented


def _plain_attributes(callback: BaseCallback) -> dict[str, bytes]:
    attributes = {}
    for name, value in vars(callback).items():
        if isinstance(value, PLAIN) and not name.startswith("_") and name not in ("locals", "globals", "callbacks"):
            data = io.BytesIO()
            # A list may hold what cannot be pickled
            with suppress(Exception):
                _DataPickler(data).dump(value)
                attributes[name] = data.getvalue()
    return attributes


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
