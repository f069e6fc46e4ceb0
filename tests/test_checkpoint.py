"""A run that was stopped continues as if it had not been stopped; damaged and incomplete files do no harm."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
import warnings
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
)
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_mfpo import MFPO, RunCheckpointCallback
from sb3_mfpo.runs import checkpoint, state
from sb3_mfpo.runs.checkpoint import checkpoints, read_run
from tests.helpers import Algorithm, RandomEnv, assert_equal, make_model
from tests.test_examples import load


class UnknownWrapper(gym.Wrapper):
    """A wrapper that the package does not know: it may have a state."""

    def __init__(self, env: gym.Env | None = None):
        super().__init__(env or RandomEnv())
        self.count = 0


class StatefulGoalEnv(BitFlippingEnv):
    """A task with goals and episodes of a fixed length that offers its state."""

    def __init__(self) -> None:
        super().__init__(n_bits=3, continuous=True, max_steps=3)

    def step(self, action: np.ndarray) -> Any:
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, False, truncated, info

    def state_dict(self) -> dict[str, Any]:
        # The goal is always the same
        generator = self._obs_space.np_random.bit_generator.state
        return {"state": self.state.copy(), "step": self.current_step, "generator": generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.current_step = state["state"], state["step"]
        self._obs_space.np_random.bit_generator.state = state["generator"]


def one(env_class: Callable[[], gym.Env], n: int = 1, vec_env_class: type = DummyVecEnv) -> VecEnv:
    return vec_env_class([lambda: Monitor(env_class()) for _ in range(n)])


# Environments, arguments, and after how many steps an episode ends
CASES: dict[str, tuple[Callable[[], VecEnv], dict[str, Any], int]] = {
    "vector": (lambda: one(RandomEnv), {}, 7),
    "still warming up": (lambda: one(RandomEnv), dict(learning_starts=40), 7),
    "HER": (
        lambda: one(StatefulGoalEnv),
        dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=2)),
        3,
    ),
    "n-step": (lambda: one(RandomEnv), dict(n_steps=3), 7),
    "two environments": (lambda: one(RandomEnv, 2), dict(gradient_steps=-1), 14),
    "VecNormalize": (lambda: VecNormalize(one(RandomEnv)), {}, 7),
    "memory": (
        lambda: one(RandomEnv),
        dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
        7,
    ),
    "schedule and noise": (
        lambda: one(RandomEnv),
        dict(learning_rate=lambda progress: 1e-3 * progress, action_noise=NormalActionNoise(np.zeros(2), np.full(2, 0.1))),
        7,
    ),
    "scalar, rare updates": (
        lambda: one(RandomEnv),
        dict(policy_kwargs=dict(critic_type="scalar"), policy_delay=2, target_update_interval=3, train_freq=2),
        7,
    ),
}


class Record(BaseCallback):
    """Keeps all that is logged, except times."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        values = dict(self.logger.name_to_value)
        self.rows.append({"step": self.num_timesteps} | {k: v for k, v in values.items() if not k.startswith("time/")})
        return True


def arrays_of(thing: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(thing).items() if isinstance(value, (np.ndarray, dict, float, int))}


def assert_same(one: Any, other: Any) -> None:
    """Weights, optimizers, buffers, counters, statistics, generators: bit for bit."""
    assert_equal(one.get_parameters(), other.get_parameters())
    assert "actions" in arrays_of(one.replay_buffer)
    assert_equal(arrays_of(one.replay_buffer), arrays_of(other.replay_buffer))
    for name in ("num_timesteps", "_n_updates", "_episode_num", "_total_timesteps", "_current_progress_remaining"):
        assert getattr(one, name) == getattr(other, name), name
    assert_equal(state.random_states(one), state.random_states(other))
    normalizers = one.get_vec_normalize_env(), other.get_vec_normalize_env()
    if normalizers[0] is not None:
        for name in ("obs_rms", "ret_rms"):
            assert_equal(*(vars(getattr(normalizer, name)) for normalizer in normalizers))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("where", ["between episodes", "within an episode"])
def test_a_resumed_run_equals_the_uninterrupted_one(algorithm: Algorithm, case: str, where: str, tmp_path: Path) -> None:
    """Bit for bit: also what is logged."""
    make_env, kwargs, period = CASES[case]
    stop, total = 4 * period + 2 * (where == "within an episode"), 9 * period
    records = Record(), Record()
    whole_env = make_env()
    whole = make_model(algorithm, whole_env, seed=0, **kwargs)
    whole.learn(total, callback=records[0], log_interval=2)

    env = make_env()
    # In environment steps of all environments together, as `learn` counts them
    saving = RunCheckpointCallback(stop // env.num_envs, tmp_path, keep=100)
    make_model(algorithm, env, seed=0, **kwargs).learn(total, callback=saving, log_interval=2)
    env.close()
    # Everything that draws has gone on; a new process knows nothing of it
    random.seed(1)
    np.random.seed(1)
    th.manual_seed(1)
    new_env = make_env()
    resumed = algorithm.resume(tmp_path / f"run_{stop}_steps.zip", new_env, device="cpu")
    assert resumed.num_timesteps == stop
    resumed.learn(total, callback=records[1], log_interval=2)
    assert_same(whole, resumed)
    expected = [row for row in records[0].rows if row["step"] > stop]
    assert len(expected) > 3 and records[1].rows == expected
    for used in (whole_env, new_env):
        used.close()


def test_saving_changes_nothing(algorithm: Algorithm, tmp_path: Path) -> None:
    alone = make_model(algorithm, RandomEnv(), seed=0).learn(50)
    watched = make_model(algorithm, RandomEnv(), seed=0).learn(50, callback=RunCheckpointCallback(3, tmp_path))
    assert_same(alone, watched)


def test_an_unknown_environment_resumes_with_a_new_episode(algorithm: Algorithm, tmp_path: Path) -> None:
    """Counters and warm-up continue. The interrupted episode ends as if by a time limit."""
    with pytest.warns(UserWarning, match=r"do not hold the state.*UnknownWrapper has no `state_dict`") as warned:
        make_model(algorithm, UnknownWrapper(), seed=0).learn(24, callback=RunCheckpointCallback(17, tmp_path, keep=9))
    assert len([one for one in warned if "do not hold" in str(one.message)]) == 1
    assert "UnknownWrapper" in read_run(tmp_path / "run_17_steps.zip")["environments"]["unknown"]
    model = algorithm.resume(tmp_path / "run_17_steps.zip", UnknownWrapper())
    with pytest.warns(UserWarning, match=r"begin new episodes.*UnknownWrapper has no `state_dict`"):
        model.learn(30)
    assert model.replay_buffer.timeouts[:17, 0].tolist() == [(i + 1) % 7 == 0 or i == 16 for i in range(17)]
    assert (model.num_timesteps, model._n_updates) == (30, 20)
    assert model.replay_buffer.pos == 30


def test_a_new_episode_after_resume_is_normalised_by_the_runs_statistics(tmp_path: Path) -> None:
    """The new episode's first observation is normalised by the run's statistics, not by those of the reset alone."""

    def make_env() -> VecNormalize:
        return VecNormalize(DummyVecEnv([lambda: UnknownWrapper(RandomEnv(spaces.Box(50, 100, (3,), np.float32)))]))

    with pytest.warns(UserWarning, match="do not hold the state"):
        make_model(MFPO, make_env(), seed=0).learn(24, callback=RunCheckpointCallback(17, tmp_path, keep=9))
    env = make_env()
    model = MFPO.resume(tmp_path / "run_17_steps.zip", env)
    with pytest.warns(UserWarning, match="begin new episodes"):
        model._setup_learn(30)
    assert env.obs_rms.count == pytest.approx(18, abs=3) and env.returns == 0
    assert np.array_equal(model._last_obs, env.normalize_obs(model._last_original_obs))
    assert np.abs(model._last_obs).max() > 0.1


def test_random_warm_up_is_not_repeated_after_resume(
    algorithm: Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(algorithm, learning_starts=10).learn(14, callback=RunCheckpointCallback(6, tmp_path, keep=9))
    model = algorithm.resume(tmp_path / "run_12_steps.zip", RandomEnv())
    sampled: list[None] = []
    monkeypatch.setattr(model.action_space, "sample", lambda: sampled.append(None))
    model.learn(20)
    assert not sampled and model._n_updates == 10


def test_the_model_in_a_checkpoint_loads_as_any_other(algorithm: Algorithm, tmp_path: Path) -> None:
    model = make_model(algorithm, seed=0).learn(30, callback=RunCheckpointCallback(10, tmp_path))
    loaded = algorithm.load(tmp_path / "run_30_steps.zip")
    observation = model.observation_space.sample()
    assert np.array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    assert loaded.replay_buffer.size() == 0


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    make_model(MFPO).learn(45, callback=RunCheckpointCallback(10, tmp_path, name_prefix="a", keep=2))
    assert {path.name for path in tmp_path.iterdir()} == {"a_45_steps.zip", "a_40_steps.zip"}
    assert [path.name for path in checkpoints(tmp_path, "a")] == ["a_45_steps.zip", "a_40_steps.zip"]


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    make_model(MFPO, RandomEnv(), seed=0).learn(28, callback=RunCheckpointCallback(1000, tmp_path))
    model = MFPO.resume(tmp_path, RandomEnv()).learn(28)
    assert model.num_timesteps == 28
    assert MFPO.resume(tmp_path, RandomEnv()).learn(40).num_timesteps == 40


def test_callbacks_resume_with_what_they_had_counted(tmp_path: Path) -> None:
    """What they have counted and collected survives two interruptions; a setting that the user changes is kept."""

    def callbacks(eval_freq: int) -> tuple[EvalCallback, CallbackList]:
        kwargs: dict[str, Any] = dict(n_eval_episodes=1, log_path=str(tmp_path), verbose=0)
        evaluation = EvalCallback(Monitor(RandomEnv()), eval_freq=eval_freq, **kwargs)
        return evaluation, CallbackList([evaluation, RunCheckpointCallback(7, tmp_path)])

    evaluation, both = callbacks(7)
    make_model(MFPO, RandomEnv(), seed=0).learn(28, callback=both)
    evaluation.best_mean_reward = 5.0
    evaluation.model.learn(7, reset_num_timesteps=False, callback=both)
    for total in (49, 63):
        evaluation, both = callbacks(14)
        MFPO.resume(tmp_path, RandomEnv()).learn(total, callback=both)
        assert evaluation.best_mean_reward == 5.0 and evaluation.eval_freq == 14
    assert evaluation.n_calls == 63
    assert evaluation.evaluations_timesteps == [7, 14, 21, 28, 35, 42, 56]


def test_a_resumed_run_keeps_its_buffer_and_says_so(tmp_path: Path) -> None:
    make_model(MFPO, n_steps=3).learn(20, callback=RunCheckpointCallback(10, tmp_path))
    for name, value in dict(buffer_size=10, n_steps=1, replay_buffer_kwargs={}).items():
        with pytest.raises(ValueError, match=f"`{name}` cannot be changed: .*`load` makes a new one"):
            MFPO.resume(tmp_path, RandomEnv(), **{name: value})
    model = MFPO.resume(tmp_path, RandomEnv(), gamma=0.5)
    assert model.replay_buffer.gamma == model.gamma == 0.5


@pytest.mark.parametrize("order", [1, -1], ids=["same order", "other order"])
def test_callbacks_resume_in_another_list(order: int, tmp_path: Path) -> None:
    """SB3 puts them into a list of its own for a progress bar."""

    def callbacks() -> tuple[EvalCallback, list[BaseCallback]]:
        evaluation = EvalCallback(Monitor(RandomEnv()), eval_freq=7, n_eval_episodes=1, verbose=0)
        return evaluation, [evaluation, RunCheckpointCallback(7, tmp_path)]

    first, both = callbacks()
    make_model(MFPO, RandomEnv(), seed=0).learn(28, callback=both)
    second, both = callbacks()
    MFPO.resume(tmp_path, RandomEnv()).learn(28, callback=both[::order], progress_bar=True)
    assert second.best_mean_reward == first.best_mean_reward > -np.inf and second.n_calls == 28
    with pytest.warns(UserWarning, match="What EvalCallback had collected is lost"):
        MFPO.resume(tmp_path, RandomEnv()).learn(28, callback=RunCheckpointCallback(7, tmp_path))


# Callbacks of all kinds


def test_callbacks_that_refer_to_each_other(tmp_path: Path) -> None:
    first, second = Record(), Record()
    first.other, second.other = second, [first]  # type: ignore[attr-defined]
    callback = CallbackList([first, RunCheckpointCallback(10, tmp_path), second])
    make_model(MFPO).learn(20, callback=callback)
    model = MFPO.resume(tmp_path, RandomEnv())
    assert len(read_run(tmp_path / "run_20_steps.zip")["callbacks"]) == 4
    model.learn(30, callback=callback)
    assert [row["step"] for row in first.rows] == list(range(1, 31))


class Unpicklable(list):
    def __reduce__(self) -> Any:
        raise AssertionError("It was pickled")


def test_callbacks_are_not_copied_without_checkpoints() -> None:
    callback = Record()
    callback.data = Unpicklable()  # type: ignore[attr-defined]
    make_model(MFPO).learn(12, callback=callback)
    assert not [name for name in vars(callback) if "start" in name]


def test_a_model_in_a_list_of_a_callback_is_not_saved_with_it(tmp_path: Path) -> None:
    """A callback's data is saved, but not the objects that it works on."""
    model, callback = make_model(MFPO), Record()
    callback.models, callback.counts = [], []  # type: ignore[attr-defined]

    class Collect(BaseCallback):
        def _on_step(self) -> bool:
            callback.models.append(self.model)  # type: ignore[attr-defined]
            callback.counts.append(self.n_calls)  # type: ignore[attr-defined]
            return True

    model.learn(12, callback=[callback, Collect(), RunCheckpointCallback(100, tmp_path)])
    ((_, saved),) = [part for part in read_run(tmp_path / "run_12_steps.zip")["callbacks"] if part[0] == "Record"]
    assert pickle.loads(saved["data"]["counts"]) == list(range(1, 13)) and "models" not in saved["data"]


NESTED: dict[str, Callable[[BaseCallback], BaseCallback]] = {
    "EveryNTimesteps": lambda callback: EveryNTimesteps(10, callback),
    "after evaluation": lambda callback: evaluating(callback_after_eval=callback),
    "on a new best": lambda callback: evaluating(callback_on_new_best=callback),
    "in a list within": lambda callback: EveryNTimesteps(10, CallbackList([Record(), callback])),
}


def evaluating(**kwargs: Any) -> EvalCallback:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = RandomEnv()
        env.observation_space.seed(0)
        return EvalCallback(Monitor(env), eval_freq=10, n_eval_episodes=1, verbose=0, **kwargs)


@pytest.mark.parametrize("how", NESTED)
def test_checkpoints_within_event_callbacks(how: str, tmp_path: Path) -> None:
    """At the steps at which SB3's own callback writes, and at the end."""
    expected, ours = tmp_path / "expected", tmp_path / "ours"
    make_model(MFPO, seed=0).learn(35, callback=NESTED[how](CheckpointCallback(1, str(expected))))
    make_model(MFPO, seed=0).learn(35, callback=NESTED[how](RunCheckpointCallback(1, ours, keep=9)))
    steps = {int(path.stem.split("_")[-2]) for path in expected.iterdir()}
    assert steps and {checkpoint.steps_of(path) for path in ours.iterdir()} == steps | {35}


@pytest.mark.parametrize("how", NESTED)
def test_a_signal_saves_within_event_callbacks_too(how: str, tmp_path: Path) -> None:
    callback = NESTED[how](RunCheckpointCallback(100, tmp_path))
    with pytest.raises(SystemExit):
        make_model(MFPO).learn(50, callback=[callback, Send(signal.SIGTERM, 13)])
    assert [path.name for path in tmp_path.iterdir()] == ["run_13_steps.zip"]


def test_runs_of_other_algorithms_are_refused(tmp_path: Path) -> None:
    model = SAC("MlpPolicy", RandomEnv(), buffer_size=100)
    with pytest.raises(ValueError, match=r"saves runs of MFPO and SOM.*not of SAC: use SB3's `CheckpointCallback`"):
        model.learn(10, callback=RunCheckpointCallback(5, tmp_path))
    assert model.num_timesteps == 0


# Checkpoints of other runs


def test_a_folder_with_another_runs_checkpoints_is_refused_at_the_start(tmp_path: Path) -> None:
    """The other run's checkpoint is neither deleted nor taken for this run's newest."""
    make_model(MFPO).learn(30, callback=RunCheckpointCallback(10, tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make_model(MFPO, seed=1)
    with pytest.raises(ValueError, match=r"holds checkpoints of another run.*run_20_steps\.zip.*`MFPO\.resume`"):
        other.learn(40, callback=RunCheckpointCallback(5, tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert other.num_timesteps == 0
    other.learn(20, callback=RunCheckpointCallback(5, tmp_path, name_prefix="other"))
    assert MFPO.resume(tmp_path, RandomEnv()).num_timesteps == 30
    assert MFPO.resume(tmp_path, RandomEnv(), name_prefix="other").num_timesteps == 20


def test_a_second_learn_is_another_run_unless_its_steps_continue(tmp_path: Path) -> None:
    """It begins anew, so it is another run, unless its steps are counted on."""
    model, callback = make_model(MFPO), RunCheckpointCallback(10, tmp_path)
    model.learn(30, callback=callback)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        model.learn(20, callback=callback)
    model = MFPO.resume(tmp_path, RandomEnv()).learn(30)
    model.learn(15, callback=callback, reset_num_timesteps=False)
    assert {path.name for path in tmp_path.iterdir()} == {"run_40_steps.zip", "run_45_steps.zip"}


def test_resuming_an_older_checkpoint_refuses_a_folder_with_later_ones(tmp_path: Path) -> None:
    """The later ones were not written by the resumed run, but would be taken for its newest."""
    make_model(MFPO).learn(40, callback=RunCheckpointCallback(10, tmp_path, keep=9))
    model = MFPO.resume(tmp_path / "run_20_steps.zip", RandomEnv())
    with pytest.raises(ValueError, match=r"later steps of this one.*run_30_steps\.zip"):
        model.learn(40, callback=RunCheckpointCallback(10, tmp_path))
    for steps in (30, 40):
        (tmp_path / f"run_{steps}_steps.zip").unlink()
    MFPO.resume(tmp_path, RandomEnv()).learn(33, callback=RunCheckpointCallback(10, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"run_30_steps.zip", "run_33_steps.zip"}


def test_a_damaged_newest_checkpoint_does_not_stop_the_resumed_run(tmp_path: Path) -> None:
    make_model(MFPO).learn(40, callback=RunCheckpointCallback(20, tmp_path))
    damage(tmp_path / "run_40_steps.zip", "array")
    with pytest.warns(UserWarning, match="Going back to an older one"):
        model = MFPO.resume(tmp_path, RandomEnv())
    model.learn(40, callback=RunCheckpointCallback(20, tmp_path))
    assert MFPO.resume(tmp_path, RandomEnv()).num_timesteps == 40


def test_the_incomplete_file_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    for name in ("run_20_steps.zip.tmp", "other_20_steps.zip.tmp", "notes.tmp"):
        (tmp_path / name).write_text("half")
    make_model(MFPO).learn(15, callback=RunCheckpointCallback(10, tmp_path))
    expected = {"run_10_steps.zip", "run_15_steps.zip", "other_20_steps.zip.tmp", "notes.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_copy_of_a_model_in_training_is_independent(tmp_path: Path) -> None:
    copies = []

    class Copy(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 12:
                copies.append(copy.deepcopy(self.model))
            return True

    make_model(MFPO).learn(15, callback=[RunCheckpointCallback(10, tmp_path), Copy()])
    assert copies[0].learn(5, reset_num_timesteps=False).num_timesteps == 17


def test_the_suffix_zip_may_be_left_out(tmp_path: Path) -> None:
    make_model(MFPO).learn(20, callback=RunCheckpointCallback(20, tmp_path))
    assert MFPO.resume(tmp_path / "run_20_steps", RandomEnv()).num_timesteps == 20


class NoAttributes(VecEnvWrapper):
    """Vectorized environments of a user, whose attributes cannot be read."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        # The one that SB3's constructor asks for
        if attr_name == "render_mode":
            return [None]
        raise NotImplementedError

    def env_method(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    has_attr = env_method


def test_environments_whose_state_cannot_be_read_are_named_once(tmp_path: Path) -> None:
    """Training continues. One warning says that their state is not in the checkpoints."""
    env = NoAttributes(DummyVecEnv([RandomEnv]))
    env.note = "an attribute of its own"  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"do not hold the state.*NoAttributes has no `state_dict`") as warned:
        make_model(MFPO, env).learn(31, callback=RunCheckpointCallback(10, tmp_path))
    assert len(warned) == 1
    model = MFPO.resume(tmp_path, env)
    with pytest.warns(UserWarning, match="begin new episodes"):
        model.learn(40)
    assert (model.num_timesteps, model.replay_buffer.size()) == (40, 40)


# Damage


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        del data[len(data) // 2 :]
    elif kind == "empty":
        data.clear()
    else:
        with zipfile.ZipFile(path) as archive:
            name = {"array": checkpoint.ARRAY[:9], "weights": "policy.pth", "state": checkpoint.STATE}[kind]
            entry = max((entry for entry in archive.infolist() if entry.filename.startswith(name)), key=lambda e: e.file_size)
        # Past the local header
        data[entry.header_offset + 100 + entry.file_size // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["cut", "empty", "array", "weights", "state"])
def test_resume_skips_a_damaged_checkpoint(kind: str, tmp_path: Path) -> None:
    make_model(MFPO, RandomEnv()).learn(40, callback=RunCheckpointCallback(20, tmp_path))
    newest, older = checkpoints(tmp_path, "run")
    damage(newest, kind)
    with pytest.raises(ValueError, match=r"run_40_steps\.zip is damaged"):
        MFPO.resume(newest, RandomEnv())
    with pytest.warns(UserWarning, match=r"run_40_steps\.zip is damaged.*Going back to an older one"):
        model = MFPO.resume(tmp_path, RandomEnv())
    assert model.num_timesteps == 20
    damage(older, kind)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match=r"run_20_steps\.zip is damaged"):
        MFPO.resume(tmp_path, RandomEnv())


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    """At random places: either the file is refused, or the byte did not matter and everything is as it was."""
    make_model(MFPO, RandomEnv()).learn(20, callback=RunCheckpointCallback(20, tmp_path))
    (path,) = checkpoints(tmp_path, "run")
    whole, expected = path.read_bytes(), pickle.dumps(read_run(path)["replay_buffer"])
    generator = np.random.default_rng(0)
    found = 0
    for position in generator.integers(len(whole), size=200):
        data = bytearray(whole)
        data[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        try:
            assert pickle.dumps(read_run(path)["replay_buffer"]) == expected
        except ValueError as error:
            assert "damaged" in str(error) or "not a checkpoint" in str(error)
            found += 1
    assert found > 150


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint run_<steps>_steps\.zip"):
        MFPO.resume(tmp_path, RandomEnv())
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        MFPO.resume(tmp_path / "run_1_steps.zip", RandomEnv())
    make_model(MFPO).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"is a model, but not a checkpoint of a run.*Use `load`"):
        MFPO.resume(tmp_path / "model.zip", RandomEnv())


def test_resume_refuses_environments_that_do_not_fit(tmp_path: Path) -> None:
    make_model(MFPO).learn(20, callback=RunCheckpointCallback(20, tmp_path))
    with pytest.raises(ValueError, match="`env` has 2 environments, but the run was saved with 1"):
        MFPO.resume(tmp_path, DummyVecEnv([RandomEnv] * 2), gradient_steps=-1)
    with pytest.raises(ValueError, match="saved without `VecNormalize`: unwrap `env`"):
        MFPO.resume(tmp_path, VecNormalize(DummyVecEnv([RandomEnv]))).learn(30)
    other = tmp_path / "other"
    make_model(MFPO, VecNormalize(DummyVecEnv([RandomEnv]))).learn(20, callback=RunCheckpointCallback(20, other))
    with pytest.raises(ValueError, match="saved with `VecNormalize`: wrap `env`"):
        MFPO.resume(other, RandomEnv()).learn(30)


@pytest.mark.parametrize("argument", [dict(save_freq=0), dict(save_freq=1, keep=0)])
def test_bad_arguments_are_refused(argument: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be an integer of at least 1, not 0"):
        RunCheckpointCallback(save_path=tmp_path, **argument)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_training_continues_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes from a device that is always full. The older checkpoint stays."""
    callback = RunCheckpointCallback(10, tmp_path)
    model = make_model(MFPO, RandomEnv(), seed=0).learn(10, callback=callback)
    before = (tmp_path / "run_10_steps.zip").read_bytes()

    def fill_disk(*_: Any) -> bool:
        if model.num_timesteps == 15:
            (tmp_path / "run_20_steps.zip.tmp").symlink_to("/dev/full")
        return True

    with pytest.warns(UserWarning, match=r"run_20_steps\.zip could not be written.*No space left.*Training goes on"):
        model.learn(15, reset_num_timesteps=False, callback=[callback, ConvertCallback(fill_disk)])
    assert model.num_timesteps == 25
    assert (tmp_path / "run_10_steps.zip").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"run_10_steps.zip", "run_25_steps.zip"}
    assert MFPO.resume(tmp_path, RandomEnv()).num_timesteps == 25


def test_killed_at_random_moments(capsys: pytest.CaptureFixture) -> None:
    """The benchmark's 50 kills, in short: every second one comes while a checkpoint is being written."""
    results = load("checkpoint", Path(__file__).parent.parent / "benchmarks").main(
        ["--kills", "6", "--buffer-size", "300000", "--transitions", "1000", "--rounds", "1"]
    )
    assert results["kill"]["survived"] == 6 and results["kill"]["while writing"] >= 2
    assert results["kill"]["checkpoint in MB"] > 40


@pytest.mark.nightly
def test_killed_fifty_times() -> None:
    results = load("checkpoint", Path(__file__).parent.parent / "benchmarks").main(["--transitions", "1000", "--rounds", "1"])
    assert results["kill"]["survived"] == 50


# Weights alone


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_weights_are_saved_and_loaded_without_pickles(
    algorithm: Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, other = make_model(algorithm, seed=0).learn(20), make_model(algorithm, seed=1)
    model.policy.n_action_candidates = 4
    model.policy.save_weights("weights.pt")
    other.policy.load_weights("weights.pt")
    observation = model.observation_space.sample()
    expected, _ = model.predict(observation, deterministic=True)
    assert np.array_equal(other.predict(observation, deterministic=True)[0], expected)
    assert other.policy.n_action_candidates == 4
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_model(algorithm, policy_kwargs=dict(net_arch=[9])).policy.load_weights("weights.pt")
    th.save({"weights": RunsCode()}, "trap.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        other.policy.load_weights("trap.pt")
    assert not Path("harm").exists()


# Signals


class Send(BaseCallback):
    """Sends this process a signal at a step."""

    def __init__(self, kind: signal.Signals, step: int):
        super().__init__()
        self.kind, self.step = kind, step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            os.kill(os.getpid(), self.kind)
        return True


@pytest.mark.parametrize("kind, error, code", [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, None)])
def test_a_signal_saves_and_ends_the_training(
    kind: signal.Signals, error: type[BaseException], code: Any, tmp_path: Path
) -> None:
    """The step is finished, and the resumed run equals the uninterrupted one."""
    handlers = signal.getsignal(kind)
    callback = CallbackList([Send(kind, 21), RunCheckpointCallback(1000, tmp_path)])
    with pytest.raises(error) as raised:
        make_model(MFPO, RandomEnv(), seed=0).learn(50, callback=callback)
    assert getattr(raised.value, "code", None) == code
    assert signal.getsignal(kind) is handlers
    assert [path.name for path in tmp_path.iterdir()] == ["run_21_steps.zip"]
    resumed = MFPO.resume(tmp_path, RandomEnv()).learn(50)
    assert_same(make_model(MFPO, RandomEnv(), seed=0).learn(50), resumed)


def test_a_signal_ends_a_long_rollout_early(tmp_path: Path) -> None:
    """The environment is then one step ahead, so the resumed run begins a new episode."""
    callback = CallbackList([Send(signal.SIGTERM, 14), RunCheckpointCallback(1000, tmp_path)])
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="ended within a rollout"):
        make_model(MFPO, RandomEnv(), train_freq=40).learn(80, callback=callback)
    model = MFPO.resume(tmp_path, RandomEnv())
    assert (model.num_timesteps, model.replay_buffer.size()) == (14, 13)
    with pytest.warns(UserWarning, match=r"begin new episodes.*ended within a rollout"):
        assert model.learn(80).num_timesteps >= 80


class Fail(BaseCallback):
    """Ends the training with an error, as a pruned trial does."""

    def _on_step(self) -> bool:
        if self.num_timesteps == 12:
            raise RuntimeError("pruned")
        return True


def test_signal_handlers_are_restored_after_a_training_that_failed(tmp_path: Path) -> None:
    handlers = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError, match="pruned"):
        make_model(MFPO).learn(20, callback=[RunCheckpointCallback(1000, tmp_path), Fail()])
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_the_model_of_a_training_that_failed_can_be_freed(tmp_path: Path) -> None:
    """Its model and replay buffer can be freed."""

    def failed_buffer(folder: Path) -> weakref.ref:
        model = make_model(MFPO)
        with pytest.raises(RuntimeError, match="pruned"):
            model.learn(20, callback=[RunCheckpointCallback(5, folder), Fail()])
        return weakref.ref(model.replay_buffer)

    buffers = [failed_buffer(tmp_path / str(number)) for number in range(3)]
    gc.collect()
    assert [buffer() for buffer in buffers] == [None] * 3


def simulate(ready: Any) -> None:
    ready.set()
    time.sleep(30)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_was_forked_during_training(kind: signal.Signals, tmp_path: Path) -> None:
    """Such as a simulator that an environment restarts: a Python signal handler would not run within its C code."""
    codes = []

    class Fork(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 12:
                context = multiprocessing.get_context("fork")
                ready = context.Event()
                process = context.Process(target=simulate, args=(ready,))
                process.start()
                assert ready.wait(10)
                os.kill(process.pid, kind)  # type: ignore[arg-type]
                process.join(10)
                codes.append(process.exitcode)
                process.kill()
            return True

    # Libraries that other tests import have handlers of their own
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        make_model(MFPO).learn(14, callback=[RunCheckpointCallback(1000, tmp_path), Fork()])
    finally:
        signal.signal(signal.SIGTERM, handler)
    # SIGINT is an exception in Python
    assert codes == [-signal.SIGTERM if kind is signal.SIGTERM else 1]


class DyingProcess(RandomEnv):
    """Ends its process at a step, as Ctrl-C does, which also reaches the environments' processes."""

    def step(self, action: np.ndarray) -> Any:
        if self.steps == 4:
            os._exit(0)
        return super().step(action)


def test_the_run_is_saved_when_a_signal_ends_the_environments_first(tmp_path: Path) -> None:
    env = SubprocVecEnv([DyingProcess])
    callback = CallbackList([Send(signal.SIGINT, 4), RunCheckpointCallback(1000, tmp_path)])
    # The signal comes within the fourth step; the run would be saved after the gradient step, before the fifth
    model = make_model(MFPO, env, learning_starts=0, gradient_steps=1, train_freq=2)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="do not hold the state"):
        model.learn(20, callback=callback)
    assert [path.name for path in tmp_path.iterdir()] == ["run_4_steps.zip"]


def test_checkpoints_are_written_in_a_thread_too(tmp_path: Path) -> None:
    """Only the main thread can handle signals; a thread writes checkpoints without them."""
    model = make_model(MFPO)
    thread = threading.Thread(target=lambda: model.learn(20, callback=RunCheckpointCallback(10, tmp_path)))
    thread.start()
    thread.join()
    assert len(checkpoints(tmp_path, "run")) == 2


def test_arrays_are_stored_without_zeros_at_their_ends(tmp_path: Path) -> None:
    """A buffer of 172 MB of which little is used."""
    env = RandomEnv(spaces.Box(-1, 1, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32))
    model = make_model(MFPO, env, buffer_size=1_000_000)
    model.learn(20, callback=RunCheckpointCallback(10, tmp_path))
    path = checkpoints(tmp_path, "run")[0]
    assert path.stat().st_size < 10**7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = read_run(path)["replay_buffer"]
    assert loaded.observations.shape == (1_000_000, 1, 17)
    assert np.array_equal(loaded.observations[:20], model.replay_buffer.observations[:20])
    assert not loaded.observations[20:].any()
