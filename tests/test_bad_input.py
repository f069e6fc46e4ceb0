"""Bad input is refused with a message that names it, before any work; a broken number stops training in time."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.sac.policies import SACPolicy

from sb3_mfpo import MFPO
from sb3_mfpo.mfpo.policies import MFPOPolicy
from tests.helpers import SMALL_POLICY, RandomEnv, make_model


class UntouchedEnv(RandomEnv):
    """Must not be used."""

    def reset(self, **kwargs: Any) -> Any:
        raise AssertionError("The environment was reset")

    step = reset


class UnusedBuffer(ReplayBuffer):
    """Must not be allocated."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise AssertionError("The replay buffer was allocated")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(batch_size=0), "`batch_size` must be an integer of at least 1, not 0"),
        (dict(batch_size=2.5), "`batch_size` must be an integer of at least 1, not 2.5"),
        (dict(buffer_size=0), "`buffer_size`"),
        (dict(n_steps=0), "`n_steps`"),
        (dict(n_probes=0), "`n_probes` must be an integer of at least 1, not 0"),
        (dict(learning_starts=-1), "`learning_starts`"),
        (dict(gradient_steps=-2), "`gradient_steps`"),
        (dict(policy_delay=0), "`policy_delay`"),
        (dict(target_update_interval=0), "`target_update_interval`"),
        (dict(compile_step="reduce-overhead"), "`compile_step`"),
        (dict(onednn_matmul="bf16"), "`onednn_matmul`"),
        (dict(n_policy_samples=-1), "`n_policy_samples` must be an integer of at least 0, not -1"),
        (dict(n_gaussian_samples=True), "`n_gaussian_samples`"),
        (dict(n_policy_samples=0, n_gaussian_samples=0), "`n_policy_samples` and `n_gaussian_samples` are both 0"),
        (dict(equal_time_share=1.5), r"`equal_time_share` must be a number in \[0, 1\], not 1.5"),
        (dict(equal_time_share=-0.1), "`equal_time_share`"),
        (dict(equal_time_share=float("nan")), "`equal_time_share`"),
        (dict(tau=2.0), "`tau`"),
        (dict(gamma=-0.5), "`gamma`"),
        (dict(time_std=-1.0), "`time_std`"),
        (dict(time_mean=float("inf")), "`time_mean` must be finite"),
        (dict(critic_reduction="max"), "`critic_reduction` must be one of 'min', 'mean', not 'max'"),
        (dict(ent_coef="automatic"), "`ent_coef` must be .* not 'automatic'"),
        (dict(ent_coef="auto_x"), "`ent_coef`"),
        (dict(ent_coef="auto_0"), "`ent_coef`"),
        (dict(ent_coef=0.0), "`ent_coef`"),
        (dict(ent_coef=-1.0), "`ent_coef`"),
        (dict(ent_coef=float("nan")), "`ent_coef`"),
        (dict(target_entropy="low"), "`target_entropy` must be .* not 'low'"),
        (dict(target_entropy=None), "`target_entropy`"),
        (dict(target_entropy="auto_low"), "`target_entropy`"),
        (dict(target_entropy=float("inf")), "`target_entropy`"),
        (dict(use_sde=True), "`use_sde=True` is not supported.*Remove the argument"),
    ],
    ids=str,
)
def test_algorithm_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(UntouchedEnv(), replay_buffer_class=UnusedBuffer, **kwargs)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(v_min=5.0, v_max=5.0), "`v_min` must be below `v_max`, not v_min=5.0, v_max=5.0"),
        (dict(v_min=10.0, v_max=-10.0), "`v_min` must be below `v_max`"),
        (dict(v_min=float("-inf")), "`v_min` must be finite"),
        (dict(v_max="high"), "`v_max` must be a number"),
        (dict(n_atoms=1), "`n_atoms` must be an integer of at least 2, not 1"),
        (dict(sampling_steps=0), "`sampling_steps` must be an integer of at least 1, not 0"),
        (dict(sampling_steps=1.5), "`sampling_steps`"),
        (dict(n_action_candidates=0), "`n_action_candidates`"),
        (dict(n_critics=0), "`n_critics`"),
        (dict(time_fourier_dim=7), "`time_fourier_dim` must be even"),
        (dict(time_embedding_dim=0), "`time_embedding_dim`"),
        (dict(net_arch=[]), r"`net_arch` needs a hidden layer.*not \[\]"),
        (dict(net_arch=dict(pi=[8], qf=[])), "`net_arch` needs a hidden layer"),
        (dict(net_arch=[16, 0]), "`net_arch` must be an integer of at least 1, not 0"),
        (dict(actor_type="diffusion"), "`actor_type` must be one of 'mean_flow', 'flow_matching', not 'diffusion'"),
        (dict(divergence_type="none"), "`divergence_type`"),
        (dict(critic_type="quantile"), "`critic_type`"),
    ],
    ids=str,
)
def test_policy_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(UntouchedEnv(), replay_buffer_class=UnusedBuffer, policy_kwargs=kwargs)
    env = RandomEnv()
    with pytest.raises(ValueError, match=message):
        MFPOPolicy(env.observation_space, env.action_space, lambda _: 1e-3, **{**SMALL_POLICY, **kwargs})


def test_reduction_belongs_to_the_algorithm() -> None:
    with pytest.raises(ValueError, match="`critic_reduction` is an argument of MFPO itself"):
        make_model(UntouchedEnv(), replay_buffer_class=UnusedBuffer, policy_kwargs=dict(critic_reduction="mean"))


def test_value_range_is_checked_against_the_default() -> None:
    with pytest.raises(ValueError, match=r"v_min=2000\.0, v_max=1600\.0"):
        MFPO("MlpPolicy", UntouchedEnv(), replay_buffer_class=UnusedBuffer, policy_kwargs=dict(v_min=2000.0))


@pytest.mark.parametrize("name, value", [("sampling_steps", 0), ("n_action_candidates", -1), ("sampling_steps", "two")])
def test_changing_a_trained_policy(name: str, value: Any) -> None:
    policy = make_model().policy
    with pytest.raises(ValueError, match=f"`{name}`"):
        setattr(policy, name, value)
    assert (policy.sampling_steps, policy.n_action_candidates) == (2, 10)


@pytest.mark.parametrize(
    "action_space, message",
    [
        (spaces.Discrete(3), "only supports .*Box"),
        (spaces.MultiBinary(3), "only supports .*Box"),
        (spaces.Box(-np.inf, np.inf, (2,)), "finite lower and upper bound"),
        (spaces.Box(np.array([-1, -np.inf], np.float32), np.ones(2, np.float32)), "finite lower and upper bound"),
        (spaces.Box(np.array([0.0, 1.0], np.float32), np.ones(2, np.float32)), "lower bound .* must be below the upper bound"),
    ],
    ids=str,
)
def test_action_spaces(action_space: Any, message: str) -> None:
    with pytest.raises((ValueError, AssertionError), match=message):
        make_model(UntouchedEnv(action_space=action_space), replay_buffer_class=UnusedBuffer)


def test_policy_of_another_algorithm() -> None:
    with pytest.raises(ValueError, match=r"`policy` must be one of .*'MlpPolicy'.* or a subclass of `MFPOPolicy`"):
        MFPO(SACPolicy, UntouchedEnv(), replay_buffer_class=UnusedBuffer)
    with pytest.raises(ValueError, match="Policy LstmPolicy unknown"):
        MFPO("LstmPolicy", UntouchedEnv(), replay_buffer_class=UnusedBuffer)


def test_nan_bounds() -> None:
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space.low[0] = np.nan
    with pytest.raises((ValueError, AssertionError), match="finite lower and upper bound"):
        make_model(UntouchedEnv(action_space=action_space), replay_buffer_class=UnusedBuffer)


# While training


class BrokenEnv(RandomEnv):
    """Returns a broken number at one step of the second episode (steps 8 to 14)."""

    def __init__(self, what: str, value: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.what, self.value, self.total = what, value, 0

    def broken(self, observation: Any) -> Any:
        (observation["vector"] if isinstance(observation, dict) else observation)[0] = self.value
        return observation

    def reset(self, **kwargs: Any) -> Any:
        observation, info = super().reset(**kwargs)
        return self.broken(observation) if self.what == "first observation" else observation, info

    def step(self, action: np.ndarray) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        self.total += 1
        if self.what == "observation" and self.total == 12:
            self.broken(observation)
        if self.what == "terminal observation" and self.total == 14:
            self.broken(observation)
        if self.what == "reward" and self.total == 12:
            reward = self.value
        return observation, reward, terminated, truncated, info


def weights(model: MFPO) -> list[th.Tensor]:
    return [value.clone() for value in model.policy.state_dict().values()]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "what, step", [("observation", 12), ("terminal observation", 14), ("reward", 12), ("first observation", 0)]
)
def test_broken_numbers_stop_training(tmp_path: Any, what: str, step: int, value: float) -> None:
    model = make_model(BrokenEnv(what, value))
    seen = []
    with pytest.raises(ValueError, match=rf"non-finite .*{what.split()[-1]} at step {step}\b"):
        model.learn(40, callback=lambda *_: seen.append(weights(model)) is None)
    # Nothing broken was stored or learned from
    stored = model.replay_buffer
    size = stored.size()
    assert all(np.isfinite(array[:size]).all() for array in (stored.observations, stored.next_observations, stored.rewards))
    assert all(th.isfinite(weight).all() for weight in weights(model))
    if seen:
        assert all(th.equal(old, new) for old, new in zip(seen[-1], weights(model), strict=True))
    model.save(tmp_path / "model")
    MFPO.load(tmp_path / "model", env=RandomEnv()).learn(15)


def test_broken_dict_observation_names_the_key() -> None:
    space = spaces.Dict(vector=spaces.Box(-1, 1, (3,), np.float32), other=spaces.Box(-1, 1, (2,), np.float32))
    model = make_model(BrokenEnv("terminal observation", np.nan, observation_space=space), policy="MultiInputPolicy")
    with pytest.raises(ValueError, match="terminal observation 'vector' at step 14"):
        model.learn(40)


def test_the_broken_environment_is_named() -> None:
    for what in ("observation", "terminal observation", "reward"):
        model = make_model(DummyVecEnv([RandomEnv, lambda what=what: BrokenEnv(what, np.nan)]), gradient_steps=-1)
        with pytest.raises(ValueError, match=f"Environment 1 returned a non-finite {what} at step"):
            model.learn(60)


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_normalisation_does_not_hide_an_infinite_number(what: str) -> None:
    env = VecNormalize(DummyVecEnv([lambda: BrokenEnv(what, np.inf)]))
    with pytest.raises(ValueError, match=f"non-finite {what} at step 12"):
        make_model(env).learn(40)


@pytest.mark.parametrize(
    "network, loss",
    [("critic", "critic_loss"), ("actor", "actor_loss"), ("divergence", "divergence_loss"), ("", "ent_coef_loss")],
)
def test_a_broken_loss_stops_before_its_step(network: str, loss: str) -> None:
    """A network that returns NaN from now on: its own weights must not change."""
    model = make_model().learn(20)
    if network:
        last_layer = {
            "critic": model.critic.q_networks[0].body[-1],
            "actor": model.actor.network.mlp.body[-1],
            "divergence": model.divergence.mlp.body[-1],
        }[network]
        handle = last_layer.register_forward_hook(
            lambda module, inputs, output: output * np.nan if th.is_grad_enabled() else output
        )
    else:
        model.target_entropy = np.nan
    module = getattr(model, network) if network else model.policy
    before = [parameter.clone() for parameter in module.parameters()] if network else [model.log_ent_coef.clone()]
    with pytest.raises(ValueError, match=rf"`{loss}` is nan at gradient step 11 \(environment step 20\)"):
        model.train(1, batch_size=8)
    after = list(module.parameters()) if network else [model.log_ent_coef]
    assert all(th.equal(old, new) for old, new in zip(before, after, strict=True))
    if network:
        handle.remove()
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


# Warnings


def test_wide_actions_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="action space reaches beyond 100"):
        make_model(RandomEnv(action_space=spaces.Box(-1000, 1000, (2,), np.float32)))


def test_lost_updates_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="`gradient_steps=1` with 2 environments.*`gradient_steps=-1` keeps it"):
        make_model(DummyVecEnv([RandomEnv] * 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model(DummyVecEnv([RandomEnv] * 2), gradient_steps=-1)
        make_model(DummyVecEnv([RandomEnv]))


def test_clipped_values_are_warned_of_once() -> None:
    model = make_model(policy_kwargs=dict(v_min=-0.1, v_max=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(40)
    messages = [str(warning.message) for warning in caught if "is clipped" in str(warning.message)]
    assert len(messages) == 1
    assert "[v_min, v_max] = [-0.1, 0.1]" in messages[0] and "policy_kwargs=dict(v_min=..., v_max=...)" in messages[0]


def test_ordinary_training_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_model().learn(40)
