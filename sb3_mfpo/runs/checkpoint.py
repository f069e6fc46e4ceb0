"""
Checkpoint files.

A checkpoint is a model file of SB3, which ``load`` reads like any other. Further entries hold the rest of the run: replay
buffer, random states, environments, callbacks. The file takes its name only when it is complete.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_mfpo.runs.files import UNFINISHED, replacing

# Entries of the zip file. Those that end with ".pth" would be taken for parameters of the model
STATE, ARRAY, RUN_ID = "run/state.pickle", "run/array_{}.bin", "run/id.txt"
# Bytes that are written at once, and that are searched for zeros at once
CHUNK, BLOCK = 2**24, 2**20


def write_run(model: OffPolicyAlgorithm, state: dict[str, Any], path: Path) -> None:
    """
    Write a model and the rest of its run. Arrays are written without copies. Zeros at their ends, such as the unused part of a
    replay buffer, are left out.

    :param model: The model
    :param state: The rest, anything that can be pickled; its ``run_id`` identifies the run
    :param path: The file's path
    :raises OSError: If the file cannot be written; an older file of this name is kept
    """
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(state, protocol=5, buffer_callback=arrays.append)
    views = [np.frombuffer(array.raw(), np.uint8) for array in arrays]
    with replacing(path) as file:
        model.save(file)  # type: ignore[arg-type]
        with zipfile.ZipFile(file, mode="a") as archive:
            archive.writestr(RUN_ID, state["run_id"])
            archive.writestr(STATE, pickle.dumps((pickled, [len(view) for view in views])))
            for index, view in enumerate(views):
                used = _used_length(view)
                with archive.open(ARRAY.format(index), mode="w", force_zip64=True) as entry:
                    for start in range(0, used, CHUNK):
                        entry.write(view[start : min(start + CHUNK, used)].data)


def _used_length(view: np.ndarray) -> int:
    """Number of bytes up to the last block that is not zero."""
    end = len(view)
    while end > 0 and not view[max(end - BLOCK, 0) : end].any():
        end -= BLOCK
    return max(end, 0)


def read_run(path: Path) -> dict[str, Any]:
    """
    Read a run without its model. It is unpickled, which can run code: read only files that you trust.

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
                # A truncated file can end like a zip file, because the model's entries are zip files
                raise zipfile.BadZipFile("it is truncated")
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
    # What the zip reader raises depends on where the damage is
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"The checkpoint {path} is damaged ({error}).") from error
    return pickle.loads(pickled, buffers=arrays)


def is_run(path: str | Path) -> bool:
    """
    :param path: A file
    :return: Whether it is a checkpoint of a run, not a model alone
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return STATE in archive.namelist()


def run_id_of(path: Path) -> str | None:
    """
    :param path: A checkpoint
    :return: The run's id, "" of a file without one; None if the file is too damaged to read it
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(RUN_ID).decode()
    except KeyError:
        return ""
    except (zipfile.BadZipFile, OSError, EOFError):
        return None


def checkpoints(folder: Path, name_prefix: str) -> list[Path]:
    """
    :param folder: Where checkpoints are
    :param name_prefix: Their common prefix
    :return: The checkpoints there, the one with the most steps first
    """
    return sorted(_named(folder, name_prefix, ".zip"), key=steps_of, reverse=True)


def unfinished(folder: Path, name_prefix: str) -> list[Path]:
    """
    :param folder: Where checkpoints are
    :param name_prefix: Their common prefix
    :return: Incomplete files, left by processes that were killed while they wrote
    """
    return _named(folder, name_prefix, f".zip{UNFINISHED}")


def _named(folder: Path, name_prefix: str, suffix: str) -> list[Path]:
    pattern = re.compile(re.escape(name_prefix) + r"_\d+_steps" + re.escape(suffix))
    return [path for path in folder.glob(f"*{suffix}") if pattern.fullmatch(path.name)]


def steps_of(path: Path) -> int:
    """
    :param path: A checkpoint
    :return: The environment steps in its name
    """
    return int(path.stem.split("_")[-2])


def read_newest_run(path: Path, name_prefix: str) -> tuple[Path, dict[str, Any]]:
    """
    :param path: A checkpoint (".zip" may be left out), or a folder, whose newest undamaged checkpoint is taken
    :param name_prefix: The checkpoints' common prefix
    :return: The checkpoint's path; the state in it
    :raises FileNotFoundError: If there is no checkpoint
    :raises ValueError: If all are damaged
    """
    if not path.is_dir():
        if not path.exists():
            path = path.with_name(f"{path.name}.zip")
        if not path.exists():
            raise FileNotFoundError(f"There is no checkpoint {path}.")
        return path, read_run(path)
    candidates = checkpoints(path, name_prefix)
    if not candidates:
        raise FileNotFoundError(f"There is no checkpoint {name_prefix}_<steps>_steps.zip in {path}.")
    for candidate in candidates[:-1]:
        try:
            return candidate, read_run(candidate)
        except ValueError as error:
            warnings.warn(f"{error} Going back to an older one.", stacklevel=3)
    return candidates[-1], read_run(candidates[-1])
