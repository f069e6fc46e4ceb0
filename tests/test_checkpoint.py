"""Nothing is lost: a run that was stopped goes on as if it had not been; damaged and half-written files do no harm."""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_mfpo import MFPO
from sb3_mfpo.common import checkpoint
from sb3_mfpo.common.checkpoint import RunCheckpointCallback, checkpoints, read_run
from tests.helpers import Algorithm, RandomEnv, assert_equal, make_model
from tests.test_examples import load


class StatefulEnv(RandomEnv):
    """Offers its state: here the generator that its observations come from."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "generator": self.observation_space.np_random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.observation_space.np_random.bit_generator.state = state["generator"]


class StatefulGoalEnv(BitFlippingEnv):
    """The same for a task with goals, in episodes of one length."""

    def __init__(self) -> None:
        super().__init__(n_bits=3, continuous=True, max_steps=3)

    def step(self, action: np.ndarray) -> Any:
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, False, truncated, info

    def state_dict(self) -> dict[str, Any]:
        # The goal is always the same
        return {"state": self.state.copy(), "generator": self._obs_space.np_random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]
        self._obs_space.np_random.bit_generator.state = state["generator"]


def one(env_class: Callable[[], gym.Env], n: int = 1, vec_env_class: type = DummyVecEnv) -> VecEnv:
    return vec_env_class([lambda: Monitor(env_class()) for _ in range(n)])


# Environments, arguments, and after how many steps an episode ends
CASES: dict[str, tuple[Callable[[], VecEnv], dict[str, Any], int]] = {
    "vector": (lambda: one(StatefulEnv), {}, 7),
    "still warming up": (lambda: one(StatefulEnv), dict(learning_starts=40), 7),
    "HER": (
        lambda: one(StatefulGoalEnv),
        dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=dict(n_sampled_goal=2)),
        3,
    ),
    "n-step": (lambda: one(StatefulEnv), dict(n_steps=3), 7),
    "two environments": (lambda: one(StatefulEnv, 2), dict(gradient_steps=-1), 14),
    "two processes": (lambda: one(StatefulEnv, 2, SubprocVecEnv), dict(gradient_steps=-1), 14),
    "VecNormalize": (lambda: VecNormalize(one(StatefulEnv)), {}, 7),
    "memory": (
        lambda: one(StatefulEnv),
        dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
        7,
    ),
    "schedule and noise": (
        lambda: one(StatefulEnv),
        dict(learning_rate=lambda progress: 1e-3 * progress, action_noise=NormalActionNoise(np.zeros(2), np.full(2, 0.1))),
        7,
    ),
    "scalar, rare updates": (
        lambda: one(StatefulEnv),
        dict(policy_kwargs=dict(critic_type="scalar"), policy_delay=2, target_update_interval=3, train_freq=7),
        7,
    ),
}


class Record(BaseCallback):
    """Keeps all that is logged, but for times."""

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
    assert_equal(checkpoint.random_states(one), checkpoint.random_states(other))
    normalizers = one.get_vec_normalize_env(), other.get_vec_normalize_env()
    if normalizers[0] is not None:
        for name in ("obs_rms", "ret_rms"):
            assert_equal(*(vars(getattr(normalizer, name)) for normalizer in normalizers))


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(algorithm: Algorithm, case: str, tmp_path: Path) -> None:
    """Stopped at the end of an episode, bit for bit: also what is logged."""
    make_env, kwargs, period = CASES[case]
    stop, total = 4 * period, 9 * period
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
    alone = make_model(algorithm, StatefulEnv(), seed=0).learn(50)
    watched = make_model(algorithm, StatefulEnv(), seed=0).learn(50, callback=RunCheckpointCallback(3, tmp_path))
    assert_same(alone, watched)


def test_in_the_middle_of_an_episode(algorithm: Algorithm, tmp_path: Path) -> None:
    """A new episode begins; counters and warm-up go on, and the episode that was cut ends as by a time limit."""
    make_model(algorithm, StatefulEnv(), seed=0).learn(24, callback=RunCheckpointCallback(17, tmp_path, keep=9))
    model = algorithm.resume(tmp_path / "run_17_steps.zip", StatefulEnv())
    assert model.replay_buffer.timeouts[:17, 0].tolist() == [(i + 1) % 7 == 0 or i == 16 for i in range(17)]
    model.learn(30)
    assert (model.num_timesteps, model._n_updates) == (30, 20)
    assert model.replay_buffer.pos == 30


def test_in_the_middle_of_an_episode_with_normalisation(tmp_path: Path) -> None:
    """The new episode's first observation is normalised by the run's statistics, not by those of the reset alone."""

    def make_env() -> VecNormalize:
        return VecNormalize(DummyVecEnv([lambda: RandomEnv(spaces.Box(50, 100, (3,), np.float32))]))

    make_model(MFPO, make_env(), seed=0).learn(24, callback=RunCheckpointCallback(17, tmp_path, keep=9))
    env = make_env()
    model = MFPO.resume(tmp_path / "run_17_steps.zip", env)
    model._setup_learn(30)
    assert env.obs_rms.count == pytest.approx(18, abs=3) and env.returns == 0
    assert np.array_equal(model._last_obs, env.normalize_obs(model._last_original_obs))
    assert np.abs(model._last_obs).max() > 0.1


def test_warm_up_is_not_repeated(algorithm: Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(algorithm, learning_starts=10).learn(14, callback=RunCheckpointCallback(6, tmp_path, keep=9))
    model = algorithm.resume(tmp_path / "run_12_steps.zip", RandomEnv())
    sampled: list[None] = []
    monkeypatch.setattr(model.action_space, "sample", lambda: sampled.append(None))
    model.learn(20)
    assert not sampled and model._n_updates == 10


def test_the_model_in_it_loads_as_any_other(algorithm: Algorithm, tmp_path: Path) -> None:
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
    make_model(MFPO, StatefulEnv(), seed=0).learn(28, callback=RunCheckpointCallback(1000, tmp_path))
    model = MFPO.resume(tmp_path, StatefulEnv()).learn(28)
    assert model.num_timesteps == 28
    assert MFPO.resume(tmp_path, StatefulEnv()).learn(40).num_timesteps == 40


def test_callbacks_go_on(tmp_path: Path) -> None:
    """What they have counted and collected survives two interruptions; what the user sets anew holds."""

    def callbacks(eval_freq: int) -> tuple[EvalCallback, CallbackList]:
        kwargs: dict[str, Any] = dict(n_eval_episodes=1, log_path=str(tmp_path), verbose=0)
        evaluation = EvalCallback(Monitor(StatefulEnv()), eval_freq=eval_freq, **kwargs)
        return evaluation, CallbackList([evaluation, RunCheckpointCallback(7, tmp_path)])

    evaluation, both = callbacks(7)
    make_model(MFPO, StatefulEnv(), seed=0).learn(28, callback=both)
    evaluation.best_mean_reward = 5.0
    evaluation.model.learn(7, reset_num_timesteps=False, callback=both)
    for total in (49, 63):
        evaluation, both = callbacks(14)
        MFPO.resume(tmp_path, StatefulEnv()).learn(total, callback=both)
        assert evaluation.best_mean_reward == 5.0 and evaluation.eval_freq == 14
    assert evaluation.n_calls == 63
    assert evaluation.evaluations_timesteps == [7, 14, 21, 28, 35, 42, 56]


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
def test_a_damaged_checkpoint_is_found_and_passed_over(kind: str, tmp_path: Path) -> None:
    make_model(MFPO, StatefulEnv()).learn(40, callback=RunCheckpointCallback(20, tmp_path))
    newest, older = checkpoints(tmp_path, "run")
    damage(newest, kind)
    with pytest.raises(ValueError, match=r"run_40_steps\.zip is damaged"):
        MFPO.resume(newest, StatefulEnv())
    with pytest.warns(UserWarning, match=r"run_40_steps\.zip is damaged.*Going back to an older one"):
        model = MFPO.resume(tmp_path, StatefulEnv())
    assert model.num_timesteps == 20
    damage(older, kind)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match=r"run_20_steps\.zip is damaged"):
        MFPO.resume(tmp_path, StatefulEnv())


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    """At random places: either the file is refused, or the byte did not matter and everything is as it was."""
    make_model(MFPO, StatefulEnv()).learn(20, callback=RunCheckpointCallback(20, tmp_path))
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


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint run_<steps>_steps\.zip"):
        MFPO.resume(tmp_path, RandomEnv())
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        MFPO.resume(tmp_path / "run_1_steps.zip", RandomEnv())
    make_model(MFPO).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"is a model, but not a checkpoint of a run.*Use `load`"):
        MFPO.resume(tmp_path / "model.zip", RandomEnv())


def test_environments_that_do_not_fit(tmp_path: Path) -> None:
    make_model(MFPO).learn(20, callback=RunCheckpointCallback(20, tmp_path))
    with pytest.raises(ValueError, match="`env` has 2 environments, but the run was saved with 1"):
        MFPO.resume(tmp_path, DummyVecEnv([RandomEnv] * 2), gradient_steps=-1)
    with pytest.raises(ValueError, match="saved without `VecNormalize`: unwrap `env`"):
        MFPO.resume(tmp_path, VecNormalize(DummyVecEnv([RandomEnv]))).learn(30)
    make_model(MFPO, VecNormalize(DummyVecEnv([RandomEnv]))).learn(20, callback=RunCheckpointCallback(20, tmp_path))
    with pytest.raises(ValueError, match="saved with `VecNormalize`: wrap `env`"):
        MFPO.resume(tmp_path, RandomEnv()).learn(30)


@pytest.mark.parametrize("argument", [dict(save_freq=0), dict(save_freq=1, keep=0)])
def test_bad_arguments(argument: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be an integer of at least 1, not 0"):
        RunCheckpointCallback(save_path=tmp_path, **argument)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own error, from a device that is always full: training goes on, the older checkpoint stays."""
    callback = RunCheckpointCallback(10, tmp_path)
    model = make_model(MFPO, StatefulEnv(), seed=0).learn(10, callback=callback)
    before = (tmp_path / "run_10_steps.zip").read_bytes()
    (tmp_path / "run_20_steps.zip.tmp").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=r"run_20_steps\.zip could not be written.*No space left.*Training goes on"):
        model.learn(15, reset_num_timesteps=False, callback=callback)
    assert model.num_timesteps == 25
    assert (tmp_path / "run_10_steps.zip").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"run_10_steps.zip", "run_25_steps.zip"}
    assert MFPO.resume(tmp_path, StatefulEnv()).num_timesteps == 25


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


def test_weights_alone(algorithm: Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        make_model(MFPO, StatefulEnv(), seed=0).learn(50, callback=callback)
    assert getattr(raised.value, "code", None) == code
    assert signal.getsignal(kind) is handlers
    assert [path.name for path in tmp_path.iterdir()] == ["run_21_steps.zip"]
    resumed = MFPO.resume(tmp_path, StatefulEnv()).learn(50)
    assert_same(make_model(MFPO, StatefulEnv(), seed=0).learn(50), resumed)


def test_a_signal_in_a_long_rollout(tmp_path: Path) -> None:
    """The rollout is cut: the environment is a step ahead, so that the next run begins a new episode."""
    callback = CallbackList([Send(signal.SIGTERM, 14), RunCheckpointCallback(1000, tmp_path)])
    with pytest.raises(SystemExit):
        make_model(MFPO, StatefulEnv(), train_freq=40).learn(80, callback=callback)
    model = MFPO.resume(tmp_path, StatefulEnv())
    assert (model.num_timesteps, model.replay_buffer.size()) == (14, 13)
    assert model.learn(80).num_timesteps >= 80


def test_signals_outside_of_training_do_what_they_did(tmp_path: Path) -> None:
    callback = RunCheckpointCallback(1000, tmp_path)

    class Broken(RandomEnv):
        def step(self, action: np.ndarray) -> Any:
            raise RuntimeError("broken")

    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with pytest.raises(RuntimeError, match="broken"):
            make_model(MFPO, Broken()).learn(20, callback=callback)
        # The training is over, though nobody could say so to the callback
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)
        callback._restore_handlers()


def test_training_in_a_thread(tmp_path: Path) -> None:
    """Signals belong to the main thread; checkpoints are written all the same."""
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
