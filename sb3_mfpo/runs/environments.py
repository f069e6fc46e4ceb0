"""
The state of vectorized environments, so that a run resumes within an episode.

Known are Gymnasium's MuJoCo and classic-control tasks, dm_control's suite, the usual wrappers, and every environment or
wrapper whose class has ``state_dict()`` and ``load_state_dict(state)``. A class derived from a known one is not known, because
it may have a state of its own. Nothing is guessed: anything else is reported as unknown, with its name.

Every layer of a stack (an environment, or a wrapper without what it wraps) has a state of two parts: what belongs to the run
(statistics, log files, random numbers) and what belongs to the episode. Where an episode cannot continue, only the first part
is restored.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper

State = dict[str, Any]


class Attributes(NamedTuple):
    """Names of the attributes that a wrapper changes: those of the run, and those of the episode."""

    run: tuple[str, ...] = ()
    episode: tuple[str, ...] = ()


_COMMON, _SB3 = "gymnasium.wrappers.common.", "stable_baselines3.common."
_OBSERVATION, _ACTION = "gymnasium.wrappers.stateful_observation.", "gymnasium.wrappers.stateful_action."
_STATELESS = {
    "gymnasium.wrappers.transform_action": ("ClipAction", "DiscretizeAction", "RescaleAction", "TransformAction"),
    "gymnasium.wrappers.transform_observation": (
        *("AddRenderObservation", "DiscretizeObservation", "DtypeObservation", "FilterObservation", "FlattenObservation"),
        *("GrayscaleObservation", "RescaleObservation", "ReshapeObservation", "ResizeObservation", "TransformObservation"),
    ),
    "gymnasium.wrappers.transform_reward": ("ClipReward", "TransformReward"),
    "gymnasium.wrappers.common": ("PassiveEnvChecker",),
    "gymnasium.wrappers.stateful_action": ("RepeatAction",),
    "sb3_mfpo.envs": ("DMControlTask",),
    "stable_baselines3.common.vec_env.vec_transpose": ("VecTransposeImage",),
    "stable_baselines3.common.vec_env.vec_extract_dict_obs": ("VecExtractDictObs",),
    "stable_baselines3.common.vec_env.vec_check_nan": ("VecCheckNan",),
}
# Without settings, which come from whoever makes the environments
WRAPPERS: dict[str, Attributes] = {
    **{f"{module}.{name}": Attributes() for module, names in _STATELESS.items() for name in names},
    # Seeds and options of the next reset
    f"{_SB3}vec_env.dummy_vec_env.DummyVecEnv": Attributes(run=("_seeds", "_options")),
    f"{_SB3}vec_env.subproc_vec_env.SubprocVecEnv": Attributes(run=("_seeds", "_options")),
    f"{_COMMON}TimeLimit": Attributes(episode=("_elapsed_steps",)),
    # rl_zoo3 replaces Gymnasium's by it
    "rl_zoo3.gym_patches.PatchedTimeLimit": Attributes(episode=("_elapsed_steps",)),
    f"{_COMMON}OrderEnforcing": Attributes(episode=("_has_reset",)),
    f"{_COMMON}RecordEpisodeStatistics": Attributes(
        run=("episode_count", "time_queue", "return_queue", "length_queue"),
        episode=("episode_start_time", "episode_returns", "episode_lengths"),
    ),
    f"{_OBSERVATION}FrameStackObservation": Attributes(episode=("obs_queue",)),
    f"{_OBSERVATION}DelayObservation": Attributes(episode=("observation_queue",)),
    f"{_OBSERVATION}TimeAwareObservation": Attributes(episode=("timesteps",)),
    f"{_OBSERVATION}MaxAndSkipObservation": Attributes(episode=("_obs_buffer",)),
    f"{_OBSERVATION}NormalizeObservation": Attributes(run=("obs_rms",)),
    "gymnasium.wrappers.stateful_reward.NormalizeReward": Attributes(run=("return_rms",), episode=("discounted_reward",)),
    f"{_ACTION}StickyAction": Attributes(episode=("last_action", "is_sticky_actions", "num_repeats", "repeats_taken")),
    f"{_SB3}monitor.Monitor": Attributes(
        run=("t_start", "results_writer", "episode_returns", "episode_lengths", "episode_times", "total_steps"),
        episode=("rewards", "needs_reset", "current_reset_info"),
    ),
    f"{_SB3}vec_env.vec_monitor.VecMonitor": Attributes(
        run=("t_start", "results_writer", "episode_count"), episode=("episode_returns", "episode_lengths")
    ),
    f"{_SB3}vec_env.vec_normalize.VecNormalize": Attributes(
        run=("obs_rms", "ret_rms"), episode=("returns", "old_obs", "old_reward")
    ),
    f"{_SB3}vec_env.vec_frame_stack.VecFrameStack": Attributes(episode=("stacked_obs",)),
}
# Attributes that hold the time at which something began, and their clocks. The time that has passed since is saved.
CLOCKS: dict[str, Callable[[], float]] = {"t_start": time.time, "episode_start_time": time.perf_counter}

# All attributes of a wrapper that has none of its own
BARE_WRAPPER = {*vars(gym.Wrapper(gym.Env())), "_saved_kwargs"}

# Spaces with random numbers of their own
SPACES = ("action_space", "observation_space")

# Where the classes of known tasks are defined
TASKS = ("gymnasium.envs.classic_control.", "gymnasium.envs.mujoco.")
DM_CONTROL_TASKS = ("dm_control.suite.",)
DM_CONTROL_PHYSICS = ("dm_control.suite.", "dm_control.mujoco.engine")
# Attributes of tasks that are no state: how they were made, and what draws pictures
SETTINGS = ("spec", "metadata", "_ezpickle_args", "_ezpickle_kwargs", "_cached_spec")
DRAWING = ("pygame", "gymnasium.envs.mujoco.mujoco_rendering")
PLAIN = (bool, int, float, complex, str, bytes, np.generic, np.ndarray, type(None))
MUJOCO = ("mujoco._structs.MjModel", "mujoco._structs.MjData")
# Arrays of a simulator's model of at least so many bytes (meshes, textures) are not saved; a checksum compares them
LARGE = 2**20


class UnknownState(Exception):
    """A state cannot be saved, or does not fit; the message says which, in a few words."""


def capture(venv: VecEnv) -> State:
    """
    :param venv: Vectorized environments, between two steps
    :return: Their state, which can be pickled: of the vectorized ``wrappers``; of the layers of each of the ``environments``;
        ``unknown``, why the episodes cannot continue from it (None if they can)
    """
    wrappers = [_capture_layer(layer) for layer in _vec_layers(venv)]
    layers, reasons = list(wrappers), []
    environments: list[list[State]] = []
    try:
        environments = [pickle.loads(pickled) for pickled in _call_on_each(venv, _capture_env)]
        layers += [layer for env in environments for layer in env]
    except Exception as error:  # Environments may raise anything; the rest of the run can be saved
        reasons.append(repr(error))
    reasons += [layer["unknown"] for layer in layers if layer["unknown"]]
    return {"wrappers": wrappers, "environments": environments, "unknown": reasons[0] if reasons else None}


def restore(venv: VecEnv, state: State, within_episode: bool) -> None:
    """
    Restore a state. Reset the environments first.

    :param venv: Vectorized environments, made and wrapped as those of ``capture``
    :param state: From ``capture``
    :param within_episode: Whether the episodes continue, or only the run
    :raises UnknownState: If they were not made and wrapped as those of ``capture``. The episodes must then begin anew; what
        belongs to the run has been restored in the wrappers that are in both.
    """
    now = list(_vec_layers(venv))
    reasons = [_restore_layers(now, state["wrappers"], within_episode)]
    if state["environments"]:
        pickled = [pickle.dumps((layers, within_episode)) for layers in state["environments"]]
        reasons += _call_on_each(venv, _restore_env, pickled)
    for reason in filter(None, reasons):
        raise UnknownState(reason)


def _vec_layers(venv: VecEnv) -> Iterator[VecEnv]:
    yield venv
    while isinstance(venv, VecEnvWrapper):
        venv = venv.venv
        yield venv


def _env_layers(env: gym.Env) -> Iterator[gym.Env]:
    yield env
    while isinstance(env, gym.Wrapper):
        env = env.env
        yield env


def _call_on_each(venv: VecEnv, function: Callable[..., Any], arguments: list[Any] | None = None) -> list[Any]:
    """
    Call a function of this module with each environment, in the environment's own process, and with one of the arguments if
    there are any. The function must not raise: that would end a process. Unknown vectorized environments return nothing.
    """
    *_, innermost = _vec_layers(venv)
    columns = [(argument,) for argument in arguments] if arguments else [()] * venv.num_envs
    if type(innermost) is DummyVecEnv:
        return [function(env, *column) for env, column in zip(innermost.envs, columns, strict=True)]
    if type(innermost) is SubprocVecEnv:
        name = _MethodName(function.__name__)
        if innermost.waiting or not innermost.has_attr(name):
            raise UnknownState("the environments' processes do not answer")
        return [innermost.env_method(name, *column, indices=i)[0] for i, column in enumerate(columns)]
    return []


class _MethodName(str):
    """
    Name of a function of this module. ``SubprocVecEnv`` can only call methods of environments: when the name is unpickled in
    their process, the function becomes a method.
    """

    def __reduce__(self) -> tuple[Callable[[str], str], tuple[str]]:
        return _make_method, (str(self),)


def _make_method(name: str) -> str:
    method_name = f"_sb3_mfpo{name}"
    setattr(gym.Env, method_name, globals()[name])
    return method_name


def _capture_env(env: gym.Env) -> bytes:
    return pickle.dumps([_capture_layer(layer) for layer in _env_layers(env)])


def _restore_env(env: gym.Env, pickled: bytes) -> str | None:
    try:
        layers, within_episode = pickle.loads(pickled)
        return _restore_layers(list(_env_layers(env)), layers, within_episode)
    except Exception as error:
        return f"{_name(env)}: {error!r}"


def _capture_layer(layer: Any) -> State:
    # `unknown` says why the state of the episode is not complete
    name, run, episode, unknown = _name(layer), {}, {}, None
    try:
        run = {"generators": _generators_of(layer)}
        if hasattr(type(layer), "state_dict") and hasattr(type(layer), "load_state_dict"):
            episode = {"state_dict": layer.state_dict()}
        elif name in WRAPPERS:
            run |= {key: _attribute(layer, key) for key in WRAPPERS[name].run if hasattr(layer, key)}
            episode = {key: _attribute(layer, key) for key in WRAPPERS[name].episode if hasattr(layer, key)}
        elif name.startswith(TASKS):
            episode = {"task": _task_state(layer)}
        elif name == "shimmy.dm_control_compatibility.DmControlCompatibilityV0":
            episode = {"dm_control": _dm_control_state(layer._env)}
        elif not (isinstance(layer, gym.Wrapper) and vars(layer).keys() <= BARE_WRAPPER):
            raise UnknownState(f"{name} has no `state_dict` and `load_state_dict`")
        # Here, because a failure while the run is saved would end the training
        pickle.dumps((run, episode))
    except UnknownState as error:
        unknown = str(error)
    except Exception as error:
        run, episode, unknown = {}, {}, f"{name}: {error!r}"
    return {"name": name, "run": run, "episode": episode, "unknown": unknown}


def _restore_layers(layers: list[Any], states: list[State], within_episode: bool) -> str | None:
    """Return why the episode cannot continue; None if it can, or if only the run is restored."""
    names, saved_names = [_name(layer) for layer in layers], [state["name"] for state in states]
    if names != saved_names:
        for state in states:
            if names.count(state["name"]) == saved_names.count(state["name"]) == 1:
                _restore_attributes(layers[names.index(state["name"])], state["run"])
        return f"the environments were {' < '.join(saved_names)} and are {' < '.join(names)}"
    for layer, state in zip(layers, states, strict=True):
        _restore_attributes(layer, state["run"])
    if within_episode:
        for layer, state in zip(layers, states, strict=True):
            _restore_episode(layer, state["episode"])
    return None


def _restore_episode(layer: Any, state: State) -> None:
    if "state_dict" in state:
        layer.load_state_dict(state["state_dict"])
    elif "task" in state:
        _restore_task(layer, state["task"])
    elif "dm_control" in state:
        _restore_dm_control(layer._env, state["dm_control"])
    else:
        _restore_attributes(layer, state)


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


# Wrappers


def _attribute(layer: Any, key: str) -> Any:
    value = getattr(layer, key)
    if key in CLOCKS:
        return CLOCKS[key]() - value
    if isinstance(value, ResultsWriter):
        value.file_handler.flush()
        with open(value.file_handler.name, newline="") as file:
            return file.read()
    return value


def _restore_attributes(layer: Any, state: State) -> None:
    for key, value in state.items():
        current = getattr(layer, key, None)
        if key == "generators":
            _restore_generators(layer, value)
        elif key in CLOCKS:
            setattr(layer, key, CLOCKS[key]() - value)
        elif key == "results_writer":
            if current is not None and value is not None:
                rewrite(current.file_handler, value)
        else:
            setattr(layer, key, value)


def rewrite(file: Any, content: str) -> None:
    """
    :param file: An open text file
    :param content: Its new content, in place of the present one
    """
    file.seek(0)
    file.truncate()
    file.write(content)
    file.flush()


# Random numbers


def _generators_of(layer: Any) -> State:
    # A generator is None until something is drawn
    own_spaces = {name: [part._np_random for part in _parts_of_space(layer, name)] for name in SPACES}
    return {"env": vars(layer).get("_np_random"), **own_spaces}


def _restore_generators(layer: Any, generators: State) -> None:
    owners = [(layer, generators["env"])]
    for name in SPACES:
        owners += zip(_parts_of_space(layer, name), generators[name], strict=False)
    for owner, generator in owners:
        if generator is not None:
            owner._np_random = generator


def _parts_of_space(layer: Any, name: str) -> Iterator[spaces.Space]:
    return _parts(vars(layer).get(name, vars(layer).get(f"_{name}")))


def _parts(space: Any) -> Iterator[spaces.Space]:
    if isinstance(space, spaces.Space):
        yield space
        children = getattr(space, "spaces", ())
        for child in children.values() if isinstance(children, dict) else children:
            yield from _parts(child)


# Tasks of Gymnasium


def _task_state(env: Any) -> State:
    # Classic-control tasks have no simulator
    simulation = _simulation_state(env.model, env.data) if hasattr(env, "data") else None
    return {"simulation": simulation, "attributes": _plain_attributes(env)}


def _restore_task(env: Any, state: State) -> None:
    if state["simulation"] is not None:
        _restore_simulation(env.model, env.data, state["simulation"])
    vars(env).update(state["attributes"])


def _plain_attributes(thing: Any) -> State:
    attributes = {}
    for name, value in vars(thing).items():
        if name in SETTINGS or _is_saved_elsewhere(value) or _name(value).startswith(DRAWING):
            continue
        # It may be a state
        if not _is_plain(value):
            raise UnknownState(f"the attribute `{name}` of {_name(thing)} is a {_name(value)}")
        attributes[name] = value
    return attributes


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, deque)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN) and not (isinstance(value, np.ndarray) and value.dtype.hasobject)


def _is_saved_elsewhere(value: Any) -> bool:
    functions = (FunctionType, MethodType, BuiltinFunctionType, type)
    generators = (np.random.Generator, np.random.RandomState, spaces.Space)
    return isinstance(value, (*functions, *generators)) or _name(value) in MUJOCO


# Tasks of dm_control's suite


def _dm_control_state(env: Any) -> State:
    if _name(env) != "dm_control.rl.control.Environment":
        raise UnknownState(f"{_name(env)} is not a task of dm_control's suite")
    task, physics = env.task, env.physics
    if not (_name(task).startswith(DM_CONTROL_TASKS) and _name(physics).startswith(DM_CONTROL_PHYSICS)):
        raise UnknownState(f"{_name(task)} is not a task of dm_control's suite")
    return {
        "env": {name: getattr(env, name) for name in ("_step_count", "_reset_next_step")},
        "task": _plain_attributes(task),
        "random": task.random.get_state(),
        "simulation": _simulation_state(physics.model.ptr, physics.data.ptr),
    }


def _restore_dm_control(env: Any, state: State) -> None:
    vars(env).update(state["env"])
    vars(env.task).update(state["task"])
    env.task.random.set_state(state["random"])
    _restore_simulation(env.physics.model.ptr, env.physics.data.ptr, state["simulation"])


# MuJoCo


def _simulation_state(model: Any, data: Any) -> State:
    # Besides the state itself: what was computed from it, and the model, which tasks change too (the position of a target)
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, integration, kind)
    return {
        "integration": integration,
        "data": dict(_arrays(data)),
        "model": {name: array if array.nbytes < LARGE else _checksum(array) for name, array in _arrays(model)},
        "options": {name: value for name, value in _members(model.opt) if isinstance(value, PLAIN)},
    }


def _restore_simulation(model: Any, data: Any, state: State) -> None:
    import mujoco

    for name, array in _arrays(model):
        saved = state["model"][name]
        if isinstance(saved, np.ndarray) and saved.shape == array.shape:
            array[...] = saved
        elif isinstance(saved, np.ndarray) or saved != _checksum(array):
            raise UnknownState(f"`{name}` of the simulator's model is another one")
    for name, value in state["options"].items():
        current = getattr(model.opt, name)
        if isinstance(value, np.ndarray):
            current[...] = value
        elif current != value:
            setattr(model.opt, name, value)
    mujoco.mj_setState(model, data, state["integration"], mujoco.mjtState.mjSTATE_INTEGRATION)
    # Computes contacts and constraints, from which the next step may begin
    mujoco.mj_forward(model, data)
    # Some of the data was computed before the last move, and is read before the next one
    for name, array in _arrays(data):
        if array.shape == state["data"][name].shape:
            array[...] = state["data"][name]


def _members(struct: Any) -> Iterator[tuple[str, Any]]:
    for name in dir(struct):
        if not name.startswith("_"):
            yield name, getattr(struct, name)


def _arrays(struct: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in _members(struct):
        if isinstance(value, np.ndarray):
            yield name, value


def _checksum(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
