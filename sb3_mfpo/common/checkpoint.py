"""
Checkpoints that hold all of a run, and going on from them.

A checkpoint is a model file of SB3 (``load`` reads it as any other) with what else a run consists of in further entries:
replay buffer, random states, normalisation, environments, callbacks. It appears under its name only when it is whole.
"""

from __future__ import annotations

import pickle
import random
import re
import signal
import threading
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mfpo.common.checks import check_integer
from sb3_mfpo.common.files import replacing

# Entries of the zip file. Those that end with ".pth" would be taken for parameters of the model
STATE, ARRAY = "run/state.pickle", "run/array_{}.bin"
# Bytes that are written at once, and that are looked at for zeros at once
CHUNK, BLOCK = 2**24, 2**20
# Attribute of a callback that holds its plain attributes, pickled, as they were when its first training began
START = "_data_at_start"
# What VecNormalize has learned, and the discounted returns of the episodes so far
NORMALIZER = ("obs_rms", "ret_rms", "returns")
# What a callback may count or collect
PLAIN = (bool, int, float, str, np.number, np.ndarray, list, tuple, dict, type(None))


def write_run(model: OffPolicyAlgorithm, state: dict[str, Any], path: Path) -> None:
    """
    Write a model and the rest of its run. Arrays go to the file as they lie in memory, without copies; zeros at their ends,
    such as the unused part of a replay buffer, are left out.

    :param model: The model
    :param state: The rest, anything that can be pickled
    :param path: The file's path
    :raises OSError: If it cannot be written; an older file of this name is then still there
    """
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(state, protocol=5, buffer_callback=arrays.append)
    views = [np.frombuffer(array.raw(), np.uint8) for array in arrays]
    with replacing(path) as file:
        model.save(file)  # type: ignore[arg-type]
        with zipfile.ZipFile(file, mode="a") as archive:
            archive.writestr(STATE, pickle.dumps((pickled, [len(view) for view in views])))
            for index, view in enumerate(views):
                used = _used_length(view)
                with archive.open(ARRAY.format(index), mode="w", force_zip64=True) as entry:
                    for start in range(0, used, CHUNK):
                        entry.write(view[start : min(start + CHUNK, used)].data)


def _used_length(view: np.ndarray) -> int:
    """Number of bytes up to the last block that holds something."""
    end = len(view)
    while end > 0 and not view[max(end - BLOCK, 0) : end].any():
        end -= BLOCK
    return max(end, 0)


def read_run(path: Path) -> dict[str, Any]:
    """
    Read the rest of a run. It is unpickled, which can run code: read only files that you trust.

    :param path: A checkpoint
    :return: What ``write_run`` was given as state
    :raises ValueError: If the file is damaged (checksums of all entries are compared) or not a checkpoint of a run
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"checksum of {damaged}")
            if "data" not in archive.namelist():
                # The end of a cut file can look like the end of one of the files within it
                raise zipfile.BadZipFile("it is cut")
            if STATE not in archive.namelist():
                raise ValueError(
                    f"{path} is a model, but not a checkpoint of a run: it has no replay buffer and no random states. Use "
                    "`load`, or a file that `RunCheckpointCallback` has written."
                )
            pickled, lengths = pickle.loads(archive.read(STATE))
            arrays = [np.zeros(length, np.uint8) for length in lengths]
            for index, array in enumerate(arrays):
                with archive.open(ARRAY.format(index)) as entry:
                    start = 0
                    while start < len(array) and (n := entry.readinto(array[start : start + CHUNK].data)):  # type: ignore[attr-defined]
                        start += n
    # Damage can look like anything to the zip reader
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        NotImplementedError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"The checkpoint {path} is damaged ({error}).") from error
    return pickle.loads(pickled, buffers=arrays)


def is_run(path: str | Path) -> bool:
    """
    :param path: A file
    :return: Whether it is a checkpoint of a run, and not only a model
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return STATE in archive.namelist()


def checkpoints(folder: Path, name_prefix: str) -> list[Path]:
    """
    :param folder: Where checkpoints are
    :param name_prefix: Their common prefix
    :return: Checkpoints, the newest (by steps) first
    """
    pattern = re.compile(re.escape(name_prefix) + r"_(\d+)_steps\.zip")
    found = [(int(match[1]), path) for path in folder.glob("*.zip") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def run_state(model: Any, callback: BaseCallback) -> dict[str, Any]:
    """
    All of a run that SB3's model file does not hold. To be taken between rollouts.

    :param model: An algorithm in training
    :param callback: The callbacks of the training, as one
    :return: For ``write_run``; arrays are those in use, not copies
    """
    normalizer, env = model.get_vec_normalize_env(), model.env
    # Where the training was ended within a step, its environments are one step ahead
    at_episode_start = model._episode_starts & (model._stored_timesteps == model.num_timesteps)
    return {
        "replay_buffer": model.replay_buffer,
        "random": random_states(model),
        "last_obs": model._last_obs,
        "last_original_obs": model._last_original_obs,
        "at_episode_start": at_episode_start,
        "environments": env.env_method("state_dict") if env.has_attr("state_dict") else None,
        "normalizer": None if normalizer is None else {name: getattr(normalizer, name) for name in NORMALIZER},
        "logger": [dict(values) for values in (model.logger.name_to_value, model.logger.name_to_count)],
        "callbacks": [(type(part).__name__, plain_data(part)) for part in parts_of(callback)],
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
    Put a replay buffer back. Episodes that are not continued end there, as by a time limit.

    :param model: A model with an environment
    :param state: From ``read_run``
    :raises ValueError: If the number of environments is another one
    """
    buffer: ReplayBuffer = state["replay_buffer"]
    if buffer.n_envs != model.n_envs:
        raise ValueError(f"`env` has {model.n_envs} environments, but the run was saved with {buffer.n_envs}.")
    cut = np.flatnonzero(~state["at_episode_start"])
    buffer.device = model.device
    if isinstance(buffer, HerReplayBuffer):
        buffer.set_env(model.env)
        with warnings.catch_warnings():
            # It says that it does what is wanted here
            warnings.filterwarnings("ignore", message="The last trajectory in the replay buffer will be truncated")
            buffer.truncate_last_trajectory()
    elif buffer.size() > 0:
        ends = buffer.dones if buffer.optimize_memory_usage else buffer.timeouts
        ends[buffer.pos - 1, cut] = True
    model.replay_buffer = buffer


def restore_run(model: Any, state: dict[str, Any], callback: BaseCallback) -> None:
    """
    Put everything else back, after the environments were reset and the logger was made.

    :param model: A model whose training is about to begin
    :param state: From ``read_run``
    :param callback: The callbacks of the training, as one
    :raises ValueError: If the environments are normalised now and were not then, or the reverse
    """
    normalizer = model.get_vec_normalize_env()
    if (normalizer is None) != (state["normalizer"] is None):
        raise ValueError(
            "The run was saved "
            + (
                "without `VecNormalize`: unwrap `env`."
                if normalizer is not None
                else "with `VecNormalize`: wrap `env` in one."
            )
        )
    if normalizer is not None:
        for name, value in state["normalizer"].items():
            setattr(normalizer, name, value)
        # The reset has normalised by statistics that knew nothing, and begun new episodes
        model._last_obs = normalizer.normalize_obs(model._last_original_obs)
        normalizer.returns[~state["at_episode_start"]] = 0
    if state["environments"] is not None and model.env.has_attr("state_dict"):
        for index in np.flatnonzero(state["at_episode_start"]):
            model.env.env_method("load_state_dict", state["environments"][index], indices=[int(index)])
            for name in ("last_obs", "last_original_obs"):
                _copy_row(getattr(model, f"_{name}"), state[name], int(index))
    for values, saved in zip((model.logger.name_to_value, model.logger.name_to_count), state["logger"], strict=True):
        values.update(saved)
    for part, (kind, data) in zip(parts_of(callback), state["callbacks"], strict=False):
        if type(part).__name__ == kind:
            vars(part).update(data)
    restore_random_states(model, state["random"])


def _copy_row(target: Any, source: Any, index: int) -> None:
    if isinstance(source, dict):
        for key in source:
            target[key][index] = source[key][index]
    elif source is not None:
        target[index] = source[index]


def parts_of(callback: BaseCallback) -> list[BaseCallback]:
    """
    :param callback: A callback
    :return: It and all callbacks within it, always in the same order
    """
    parts = [callback]
    for value in vars(callback).values():
        for child in value if isinstance(value, list) else [value]:
            # Upwards there is the parent
            if isinstance(child, BaseCallback) and child is not getattr(callback, "parent", None):
                parts += parts_of(child)
    return parts


def plain_data(callback: BaseCallback) -> dict[str, Any]:
    """
    :param callback: A callback whose start was remembered
    :return: What it has counted or collected: public attributes of plain types that have changed since then
    """
    start = vars(callback).get(START, {})
    return {name: getattr(callback, name) for name, data in _plain_attributes(callback).items() if data != start.get(name)}


def remember_start(callback: BaseCallback) -> None:
    """
    Let ``plain_data`` compare with now; for callbacks that were remembered before, with then.

    :param callback: The callbacks of a training that begins, as one
    """
    for part in parts_of(callback):
        vars(part).setdefault(START, _plain_attributes(part))


def _plain_attributes(callback: BaseCallback) -> dict[str, bytes]:
    attributes = {}
    for name, value in vars(callback).items():
        if isinstance(value, PLAIN) and not name.startswith("_") and name not in ("locals", "globals", "callbacks"):
            # A list may hold anything
            with suppress(Exception):
                attributes[name] = pickle.dumps(value)
    return attributes


class RunCheckpointCallback(BaseCallback):
    """
    Write checkpoints that hold all of a run: every ``save_freq`` steps, at the end, and on SIGTERM and SIGINT, which then end
    the training as usual (exit code 143; ``KeyboardInterrupt``). ``MFPO.resume`` and ``SOM.resume`` go on from them; ``load``
    reads the model in them.

    A checkpoint is written between two rollouts. It takes its name only when it is whole; the one before is kept until then.
    One that cannot be written (a full disk) is warned of, and the training goes on.

    :param save_freq: Save every so many calls of ``env.step()``, as in SB3's callbacks
    :param save_path: Folder for the checkpoints
    :param name_prefix: Their common prefix; files are called ``<prefix>_<steps>_steps.zip``
    :param keep: How many of them to keep, at least 1; 2 leave one to fall back on
    :param on_signals: Whether to save on SIGTERM and SIGINT (in the main thread only)
    :param verbose: Verbosity level: 0 for no output, 2 for indicating when a checkpoint is saved
    :raises ValueError: If an argument is out of range
    """

    def __init__(
        self,
        save_freq: int,
        save_path: str | Path,
        name_prefix: str = "run",
        keep: int = 2,
        on_signals: bool = True,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        for name, value in (("save_freq", save_freq), ("keep", keep)):
            check_integer(name, value, minimum=1)
        self.save_freq = save_freq
        self.save_path = Path(save_path)
        self.name_prefix = name_prefix
        self.keep = keep
        self.on_signals = on_signals
        self._due = False
        self._received: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def _init_callback(self) -> None:
        self.save_path.mkdir(parents=True, exist_ok=True)

    def _on_training_start(self) -> None:
        self._received = None
        if self.on_signals and threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[kind] = signal.signal(kind, self._on_signal)

    def _outermost(self) -> BaseCallback:
        return self.locals["callback"]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if self._received is None and _is_learning(frame):
            self._received = kind
            return
        # The second time, or after a training that ended with an error
        self._restore_handlers()
        signal.raise_signal(kind)

    def _restore_handlers(self) -> None:
        for kind, handler in self._previous_handlers.items():
            signal.signal(kind, handler)
        self._previous_handlers.clear()

    def _on_step(self) -> bool:
        self._due = self._due or self.n_calls % self.save_freq == 0
        # A rollout of many steps may take longer than whoever asks to stop will wait
        model: Any = self.model
        return self._received is None or model.train_freq == TrainFreq(1, TrainFrequencyUnit.STEP)

    def _on_rollout_start(self) -> None:
        if self._due or self._received is not None:
            self.save()
        self._leave_on_signal()

    def _on_training_end(self) -> None:
        self.save()
        self._leave_on_signal()
        self._restore_handlers()

    def _leave_on_signal(self) -> None:
        if self._received is not None:
            self._restore_handlers()
            if self._received is signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + self._received)

    def save(self) -> None:
        """Write a checkpoint now, then remove those beyond ``keep``."""
        self._due = False
        path = self.save_path / f"{self.name_prefix}_{self.num_timesteps}_steps.zip"
        try:
            write_run(self.model, run_state(self.model, self._outermost()), path)  # type: ignore[arg-type]
        except OSError as error:
            warnings.warn(
                f"The checkpoint {path} could not be written ({error}); older ones are untouched. Training goes on, and the "
                f"next attempt comes in {self.save_freq} steps.",
                stacklevel=2,
            )
            return
        if self.verbose >= 2:
            print(f"Saving checkpoint of the run to {path}")
        for old in checkpoints(self.save_path, self.name_prefix)[self.keep :]:
            old.unlink(missing_ok=True)


def _is_learning(frame: FrameType | None) -> bool:
    learn: Callable[..., Any] = OffPolicyAlgorithm.learn
    while frame is not None and frame.f_code is not learn.__code__:
        frame = frame.f_back
    return frame is not None


def read_newest_run(path: Path, name_prefix: str) -> tuple[Path, dict[str, Any]]:
    """
    :param path: A checkpoint, or a folder of checkpoints, of which the newest whole one is taken
    :param name_prefix: The checkpoints' common prefix
    :return: Its path; the state in it
    :raises FileNotFoundError: If there is no checkpoint
    :raises ValueError: If none is whole
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"There is no checkpoint {path}.")
        return path, read_run(path)
    candidates = checkpoints(path, name_prefix)
    if not candidates:
        raise FileNotFoundError(f"There is no checkpoint {name_prefix}_<steps>_steps.zip in {path}.")
    for candidate in candidates:
        try:
            return candidate, read_run(candidate)
        except ValueError as error:
            if candidate is candidates[-1]:
                raise
            warnings.warn(f"{error} Going back to an older one.", stacklevel=3)
    raise AssertionError
