"""Environments and users that misbehave: training continues or stops with a clear error, and the model can be saved."""

from __future__ import annotations

import copy
import gc
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import hypothesis
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mfpo import MFPO, RunCheckpointCallback
from tests.helpers import SMALL_POLICY, Algorithm, RandomEnv, assert_equal, make_model

# `HYPOTHESIS_PROFILE=nightly` draws more
hypothesis.settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class OddEnv(RandomEnv):
    """Returns other observations or rewards than usual, from a step of the environment on."""

    def __init__(self, observe: Callable[[Any], Any] | None = None, reward: Callable[[], float] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.observe, self.odd_reward, self.total = observe, reward, 0

    def reset(self, **kwargs: Any) -> Any:
        observation, info = super().reset(**kwargs)
        return self.observe(observation) if self.observe is not None and self.total == 0 else observation, info

    def step(self, action: np.ndarray) -> Any:
        observation, reward, *rest = super().step(action)
        self.total += 1
        if self.observe is not None:
            observation = self.observe(observation)
        return observation, self.odd_reward() if self.odd_reward is not None else reward, *rest


class Fails(RandomEnv):
    """Raises, or takes its process with it, at step 25."""

    def __init__(self, dies: bool = False):
        super().__init__()
        self.dies, self.total = dies, 0

    def step(self, action: np.ndarray) -> Any:
        self.total += 1
        if self.total == 25:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the simulator has lost contact")
        return super().step(action)


def constant(value: float) -> Callable[[Any], Any]:
    return lambda observation: np.full_like(observation, value)


def with_space(**kwargs: Any) -> Callable[[], gym.Env]:
    return lambda: RandomEnv(**kwargs)


def wide(width: float) -> spaces.Box:
    return spaces.Box(-width / 2, width / 2, (2,), np.float32)


# What happens, and the error that it ends with, if any
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], str | None]] = {
    "NaN observations": (lambda: OddEnv(constant(np.nan)), {}, "non-finite observation at step 0"),
    "infinite observations": (lambda: OddEnv(constant(np.inf)), {}, "non-finite observation at step 0"),
    "observations of 1e10": (lambda: OddEnv(constant(1e10)), {}, None),
    "observations of 1e30": (lambda: OddEnv(constant(1e30)), {}, "policy's actions are not finite.*use `VecNormalize`"),
    "constant observations": (lambda: OddEnv(constant(0.0)), {}, None),
    "constant observations, normalised": (lambda: VecNormalize(DummyVecEnv([lambda: OddEnv(constant(3.0))])), {}, None),
    "float64 observations": (with_space(observation_space=spaces.Box(-1, 1, (3,), np.float64)), {}, None),
    "uint8 observations": (with_space(observation_space=spaces.Box(0, 255, (3,), np.uint8)), {}, None),
    "rewards of 1e-6": (lambda: OddEnv(reward=lambda: 1e-6), {}, None),
    "rewards of 1e6": (lambda: OddEnv(reward=lambda: 1e6), {}, None),
    "rewards of 1e6, scalar critic": (
        lambda: OddEnv(reward=lambda: 1e6),
        dict(policy_kwargs=dict(critic_type="scalar")),
        None,
    ),
    "NaN rewards": (lambda: OddEnv(reward=lambda: np.nan), {}, "non-finite reward at step 1"),
    "episodes of one step": (with_space(episode_length=1, terminates=True), {}, None),
    "episodes without end": (with_space(episode_length=10**9), {}, None),
    "raises in step": (Fails, {}, "the simulator has lost contact"),
    "raises in step of a worker": (lambda: SubprocVecEnv([RandomEnv, Fails]), dict(gradient_steps=-1), "environment 1"),
    "a worker dies": (
        lambda: SubprocVecEnv([RandomEnv, lambda: Fails(dies=True)]),
        dict(gradient_steps=-1),
        r"process of environment 1 has ended \(exit code -9\)",
    ),
    "actions 1e-6 wide": (with_space(action_space=wide(1e-6)), {}, None),
    "actions 1e3 wide": (with_space(action_space=wide(1e3)), {}, None),
    "batch larger than the buffer": (RandomEnv, dict(batch_size=64, buffer_size=16), None),
    "buffer of size 1": (RandomEnv, dict(buffer_size=1), None),
    "CUDA where there is none": (RandomEnv, dict(device="cuda"), None),
    "no random steps": (RandomEnv, dict(learning_starts=0), None),
}


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_or_stops_with_a_clear_error(algorithm: Algorithm, case: str, tmp_path: Path) -> None:
    make_env, kwargs, error = CASES[case]
    with warnings.catch_warnings():
        # Of clipped values, wide actions and overflows, each tested elsewhere
        warnings.simplefilter("ignore")
        env = make_env()
        model = make_model(algorithm, env, seed=0, **kwargs)
        try:
            if error is None:
                model.learn(60, callback=RunCheckpointCallback(20, tmp_path))
            else:
                with pytest.raises((ValueError, RuntimeError), match=error):
                    model.learn(60, callback=RunCheckpointCallback(20, tmp_path))
        finally:
            if isinstance(env, SubprocVecEnv) and error is not None:
                for process in env.processes:
                    process.kill()
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())
    if error is None:
        assert model._n_updates > 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = algorithm.resume(tmp_path, make_env())
        assert loaded.num_timesteps == 60
        assert all(np.isfinite(loaded.replay_buffer.rewards.flat))
    # What was learned up to then can be saved
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = algorithm.load(tmp_path / "model")
    action, _ = loaded.predict(model.observation_space.sample(), deterministic=True)
    assert np.isfinite(action).all()


# Broken connections


class Raises(BaseCallback):
    """Raises an error at step 16."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def _on_step(self) -> bool:
        if self.num_timesteps == 16:
            raise self.error
        return True


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("error", [ConnectionResetError("tracker"), BrokenPipeError("head"), EOFError("input")], ids=repr)
def test_broken_connections_elsewhere_are_not_blamed_on_environments(
    algorithm: Algorithm, vec_env: Any, error: Exception
) -> None:
    env = vec_env([RandomEnv] * 2)
    with pytest.raises(type(error)) as caught:
        make_model(algorithm, env, gradient_steps=-1).learn(40, callback=Raises(error))
    assert caught.value is error
    env.close()


def test_a_reset_names_the_worker_that_has_ended(algorithm: Algorithm) -> None:
    env = SubprocVecEnv([RandomEnv] * 2)
    model = make_model(algorithm, env, gradient_steps=-1).learn(30)
    env.processes[1].kill()
    with pytest.raises(RuntimeError, match=r"broke\. The process of environment 1 has ended \(exit code -9\)\. Its own"):
        model.learn(30)
    env.processes[0].kill()


# Many gradient steps at once


def test_memory_does_not_grow_with_the_gradient_steps(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in memory, all of which the garbage collector knows, at the fourth step after a reading and just before two."""
    monkeypatch.setattr(algorithm, "READ_EVERY", 10)
    model = make_model(algorithm).learn(20)
    counts, step, done = {}, model._gradient_step, 0

    def counted(batch: Any) -> Any:
        nonlocal done
        done += 1
        if done in (4, 10, 50):
            counts[done] = sum(issubclass(type(obj), th.Tensor) for obj in gc.get_objects())
        return step(batch)

    monkeypatch.setattr(model, "_gradient_step", counted)
    gc.collect()
    model.train(50, batch_size=8)
    assert counts[4] < counts[10] == counts[50]


def test_logged_means_are_over_all_gradient_steps(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight steps, read together or three at a time, with a policy that is improved in every second."""
    logged = []
    for read_every in (1000, 3):
        monkeypatch.setattr(algorithm, "READ_EVERY", read_every)
        model = make_model(algorithm, seed=0, policy_delay=2).learn(20)
        model.train(8, batch_size=8)
        logged.append({k: v for k, v in model.logger.name_to_value.items() if k.startswith("train/")})
    assert logged[1] == pytest.approx(logged[0], rel=1e-12)
    assert logged[0]["train/updates_per_step"] == 8 and logged[0].keys() >= {"train/actor_loss", "train/critic_loss"}


@pytest.mark.parametrize("broken", [1, 4, 5, 8])
def test_the_broken_gradient_step_is_named(algorithm: Algorithm, broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where losses are looked at late: every four steps, and at the end of the call."""
    monkeypatch.setattr(algorithm, "READ_EVERY", 4)
    monkeypatch.setattr(algorithm, "_looks_at_losses_late", lambda self, optimizer: True)
    model = make_model(algorithm).learn(20)
    descend, critic_losses = model._descend, []

    def broken_descend(name: str, loss: th.Tensor, optimizer: th.optim.Optimizer) -> th.Tensor:
        if optimizer is model.critic.optimizer:
            critic_losses.append(loss)
            if len(critic_losses) == broken:
                with th.no_grad():
                    loss.mul_(np.nan)
        return descend(name, loss, optimizer)

    monkeypatch.setattr(model, "_descend", broken_descend)
    with pytest.raises(ValueError, match=rf"`critic_loss` is nan at gradient step {10 + broken} \(environment step 20\)"):
        model.train(10, batch_size=8)
    assert len(critic_losses) == (4 if broken <= 4 else 8)


def test_train_with_no_gradient_steps_changes_nothing(algorithm: Algorithm) -> None:
    model = make_model(algorithm).learn(20)
    before = copy.deepcopy(model.get_parameters())
    model.train(0, batch_size=8)
    assert_equal(model.get_parameters(), before)
    assert model._n_updates == 10


def test_learning_starts_like_that_of_sac(algorithm: Algorithm) -> None:
    """Also as a float."""
    assert make_model(algorithm, learning_starts=1e1).learn(20)._n_updates == 10


# Any valid arguments


def boxes(draw: Any, kind: str) -> spaces.Box:
    shape = draw(st.sampled_from([(1,), (3,), (2, 2)]))
    if kind == "observation":
        dtype = draw(st.sampled_from([np.float32, np.float64, np.uint8]))
        return spaces.Box(0, 255, shape, dtype)
    low = draw(st.floats(-50, 50))
    return spaces.Box(np.float32(low), np.float32(low + draw(st.floats(1e-3, 50))), shape, np.float32)


def observation_space(draw: Any) -> spaces.Space:
    if draw(st.booleans()):
        return boxes(draw, "observation")
    return spaces.Dict({"vector": boxes(draw, "observation"), "kind": spaces.Discrete(3)})


@st.composite
def trainings(draw: Any, algorithm: Algorithm) -> tuple[RandomEnv, dict[str, Any]]:
    """An environment, and arguments for the algorithm."""
    env = RandomEnv(observation_space(draw), boxes(draw, "action"), draw(st.integers(1, 9)), draw(st.booleans()))
    v_min = draw(st.floats(-1e3, 0))
    policy_kwargs: dict[str, Any] = dict(
        net_arch=draw(st.lists(st.integers(1, 12), min_size=1, max_size=2)),
        layer_norm=draw(st.booleans()),
        time_fourier_dim=2 * draw(st.integers(1, 4)),
        time_embedding_dim=draw(st.integers(1, 6)),
        action_fourier_dim=2 * draw(st.integers(0, 3)),
        action_fourier_std=draw(st.floats(0.01, 5)),
        critic_type=draw(st.sampled_from(["categorical", "scalar"])),
        value_init=draw(st.sampled_from(["uniform", "narrow"])),
        sampling_steps=draw(st.integers(1, 4)),
        sampling_power=draw(st.floats(0.1, 4)),
        n_action_candidates=draw(st.integers(1, 5)),
        n_critics=draw(st.integers(1, 3)),
        n_atoms=draw(st.integers(2, 12)),
        v_min=v_min,
        v_max=v_min + draw(st.floats(1, 1e3)),
        share_features_extractor=draw(st.booleans()),
        optimizer_class=draw(st.sampled_from([th.optim.Adam, th.optim.AdamW, th.optim.RMSprop])),
    )
    kwargs: dict[str, Any] = dict(
        policy="MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy",
        learning_rate=draw(st.floats(1e-5, 1e-2)),
        buffer_size=draw(st.integers(1, 100)),
        learning_starts=draw(st.integers(0, 20)),
        batch_size=draw(st.integers(1, 16)),
        tau=draw(st.floats(0, 1)),
        gamma=draw(st.floats(0, 1)),
        train_freq=draw(st.one_of(st.integers(1, 5), st.just((1, "episode")))),
        gradient_steps=draw(st.sampled_from([-1, 0, 1, 2])),
        # SB3 has no n-step returns for Dict observations
        n_steps=1 if isinstance(env.observation_space, spaces.Dict) else draw(st.sampled_from([1, 3])),
        policy_delay=draw(st.integers(1, 3)),
        target_update_interval=draw(st.integers(1, 3)),
        intervals=draw(st.sampled_from(["grid", "any"])),
        equal_time_share=draw(st.floats(0, 1)),
        uniform_time_share=draw(st.floats(0, 1)),
        time_mean=draw(st.floats(-2, 2)),
        time_std=draw(st.floats(0, 2)),
        critic_reduction=draw(st.sampled_from(["min", "mean"])),
        actor_rate=draw(st.floats(0.1, 10)),
        actor_tau=draw(st.floats(0.001, 1)),
        seed=draw(st.integers(0, 1000)),
    )
    if algorithm is MFPO:
        n_policy, n_gaussian, n_local = draw(st.sampled_from([(0, 4, 0), (3, 0, 0), (2, 3, 4), (1, 1, 0), (0, 1, 2)]))
        kwargs |= dict(n_policy_samples=n_policy, n_gaussian_samples=n_gaussian, n_local_samples=n_local)
        kwargs |= dict(n_probes=draw(st.integers(1, 3)), ent_coef_rate=draw(st.one_of(st.none(), st.floats(0.1, 10))))
        kwargs["ent_coef"] = draw(st.one_of(st.sampled_from(["auto", "auto_0.01"]), st.floats(1e-3, 10)))
        kwargs["target_entropy"] = draw(st.one_of(st.sampled_from(["auto", "auto_0.3"]), st.floats(-5, 5)))
        policy_kwargs["actor_type"] = draw(st.sampled_from(["mean_flow", "flow_matching"]))
        policy_kwargs["divergence_type"] = draw(st.sampled_from(["mean_flow", "flow_matching", "exact"]))
    else:
        kwargs |= dict(
            inverse_temperature=draw(st.floats(1e-2, 1e3)),
            normalize_q=draw(st.booleans()),
            n_samples=draw(st.integers(1, 8)),
            score_estimator=draw(st.sampled_from(["posterior_mean", "gradient"])),
            score_norm=draw(st.one_of(st.none(), st.floats(0.1, 30))),
            path=draw(st.sampled_from(["linear", "vp"])),
            adaptive_loss=draw(st.booleans()),
        )
    return env, {**kwargs, "policy_kwargs": {**SMALL_POLICY, **policy_kwargs}}


def test_any_valid_training_runs(algorithm: Algorithm) -> None:
    """Sixty steps with drawn arguments and spaces: never NaN, never a crash."""

    @hypothesis.given(trainings(algorithm))
    def runs(training: tuple[RandomEnv, dict[str, Any]]) -> None:
        env, kwargs = training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make_model(algorithm, env, **kwargs).learn(60)
        assert model.num_timesteps >= 60
        assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())
        for deterministic in (True, False):
            action, _ = model.predict(model.observation_space.sample(), deterministic=deterministic)
            assert env.action_space.contains(action)

    runs()
