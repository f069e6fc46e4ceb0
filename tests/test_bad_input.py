"""Bad input is refused with a message that names it, before any work; a broken number stops training in time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.sac.policies import SACPolicy

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm
from tests.helpers import ALGORITHMS, SMALL_POLICY, Algorithm, RandomEnv, make_model


class UntouchedEnv(RandomEnv):
    """An environment that must not be used."""

    def reset(self, **kwargs: Any) -> Any:
        raise AssertionError("The environment was reset")

    step = reset


class UnusedBuffer(ReplayBuffer):
    """A buffer that must not be allocated."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise AssertionError("The replay buffer was allocated")


ARGUMENTS_OF_ALL: list[tuple[dict[str, Any], str]] = [
    (dict(batch_size=0), "`batch_size` must be an integer of at least 1, not 0"),
    (dict(batch_size=2.5), "`batch_size` must be an integer of at least 1, not 2.5"),
    (dict(buffer_size=0), "`buffer_size`"),
    (dict(n_steps=0), "`n_steps`"),
    (dict(learning_starts=-1), "`learning_starts`"),
    (dict(learning_starts="1e4"), "`learning_starts` must be a number"),
    (dict(gradient_steps=-2), "`gradient_steps`"),
    (dict(policy_delay=0), "`policy_delay`"),
    (dict(target_update_interval=0), "`target_update_interval`"),
    (dict(compile_step="reduce-overhead"), "`compile_step`"),
    (dict(allow_non_finite_observations="nan"), "`allow_non_finite_observations` must be one of True, False, not 'nan'"),
    (dict(intervals="all"), "`intervals` must be one of 'grid', 'any', not 'all'"),
    (dict(uniform_time_share=-0.5), r"`uniform_time_share` must be a number in \[0, 1\], not -0.5"),
    (dict(uniform_time_share="half"), "`uniform_time_share`"),
    (dict(equal_time_share=1.5), r"`equal_time_share` must be a number in \[0, 1\], not 1.5"),
    (dict(equal_time_share=-0.1), "`equal_time_share`"),
    (dict(equal_time_share=float("nan")), "`equal_time_share`"),
    (dict(tau=2.0), "`tau`"),
    (dict(actor_rate=0.0), "`actor_rate` must be above 0, not 0.0"),
    (dict(actor_tau=0.0), "`actor_tau` must be above 0, not 0.0"),
    (dict(actor_tau=1.5), r"`actor_tau` must be a number in \[0, 1\], not 1.5"),
    (dict(gamma=-0.5), "`gamma`"),
    (dict(time_std=-1.0), "`time_std`"),
    (dict(time_mean=float("inf")), "`time_mean` must be finite"),
    (dict(critic_reduction="max"), "`critic_reduction` must be one of 'min', 'mean', not 'max'"),
]
ARGUMENTS: dict[Algorithm, list[tuple[dict[str, Any], str]]] = {
    MFPO: [
        (dict(n_probes=0), "`n_probes` must be an integer of at least 1, not 0"),
        (dict(n_policy_samples=-1), "`n_policy_samples` must be an integer of at least 0, not -1"),
        (dict(n_gaussian_samples=True), "`n_gaussian_samples`"),
        (dict(n_policy_samples=0, n_gaussian_samples=0), "`n_policy_samples` and `n_gaussian_samples` are both 0"),
        (dict(n_local_samples=-1), "`n_local_samples` must be an integer of at least 0, not -1"),
        (dict(n_gaussian_samples=0, n_local_samples=4), "`n_local_samples=4` needs `n_gaussian_samples` above 0"),
        (dict(n_local_samples=1), "`n_local_samples` must be 0 or at least 2, not 1"),
        (dict(ent_coef_rate=0.0), "`ent_coef_rate` must be .* not 0.0"),
        (dict(ent_coef_rate=float("nan")), "`ent_coef_rate`"),
        (dict(ent_coef_rate="fast"), "`ent_coef_rate`"),
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
    SOM: [
        (dict(inverse_temperature=0.0), "`inverse_temperature` must be above 0, not 0.0"),
        (dict(inverse_temperature=-1.0), "`inverse_temperature` must be above 0, not -1.0"),
        (dict(inverse_temperature=float("inf")), "`inverse_temperature` must be finite, not inf"),
        (dict(inverse_temperature="auto"), "`inverse_temperature` must be a number"),
        (dict(n_samples=0), "`n_samples` must be an integer of at least 1, not 0"),
        (dict(score_estimator="exact"), "`score_estimator` must be one of 'posterior_mean', 'gradient', not 'exact'"),
        (dict(score_norm=0.0), "`score_norm` must be above 0, not 0.0"),
        (dict(score_norm=True), "`score_norm` must be a number"),
        (dict(path="cosine"), "`path` must be one of 'linear', 'vp', not 'cosine'"),
        (dict(normalize_q="batch"), "`normalize_q`"),
        (dict(adaptive_loss=2), "`adaptive_loss`"),
    ],
}


@pytest.mark.parametrize(
    "algorithm, kwargs, message",
    [(algorithm, *case) for algorithm, own in ARGUMENTS.items() for case in own + ARGUMENTS_OF_ALL],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_bad_arguments_of_the_algorithm_are_refused(algorithm: Algorithm, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(algorithm, UntouchedEnv(), replay_buffer_class=UnusedBuffer, **kwargs)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(v_min=5.0, v_max=5.0), "`v_min` must be below `v_max`, not v_min=5.0, v_max=5.0"),
        (dict(v_min=10.0, v_max=-10.0), "`v_min` must be below `v_max`"),
        (dict(v_min=float("-inf"), v_max=0.0), "`v_min` must be finite"),
        (dict(v_min=0.0, v_max="high"), "`v_max` must be a number"),
        (dict(v_min=0.0), "`v_min` and `v_max` go together, not v_min=0.0, v_max=None"),
        (dict(v_max=1.0), "`v_min` and `v_max` go together"),
        (dict(value_range=0.0), "`value_range` must be above 0"),
        (dict(n_atoms=1), "`n_atoms` must be an integer of at least 2, not 1"),
        (dict(sampling_steps=0), "`sampling_steps` must be an integer of at least 1, not 0"),
        (dict(sampling_steps=1.5), "`sampling_steps`"),
        (dict(n_action_candidates=0), "`n_action_candidates`"),
        (dict(n_critics=0), "`n_critics`"),
        (dict(time_fourier_dim=7), "`time_fourier_dim` must be even"),
        (dict(time_embedding_dim=0), "`time_embedding_dim`"),
        (dict(action_fourier_dim=7), "`action_fourier_dim` must be even"),
        (dict(action_fourier_dim=-2), "`action_fourier_dim` must be an integer of at least 0, not -2"),
        (dict(action_fourier_std=0.0), "`action_fourier_std` must be above 0, not 0.0"),
        (dict(sampling_power=0.0), "`sampling_power` must be above 0, not 0.0"),
        (dict(sampling_power=float("inf")), "`sampling_power` must be finite"),
        (dict(net_arch=[16, 0]), "`net_arch` must be an integer of at least 1, not 0"),
        (dict(critic_type="quantile"), "`critic_type`"),
        (dict(value_init="wide"), "`value_init`"),
        (dict(activation_fn=th.nn.GLU), r"`activation_fn` must keep the number of units, which GLU\(dim=-1\) does not"),
        (dict(activation_fn=dict), "`activation_fn` must make a `torch.nn.Module`"),
        (dict(optimizer_class=th.optim.LBFGS), "`optimizer_class` must take steps without a `closure`.*LBFGS needs"),
        (dict(optimizer_kwargs=dict(lr=1e-3)), "`optimizer_kwargs` must not hold `lr`: give `learning_rate`"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_policy_are_refused(algorithm: Algorithm, kwargs: dict[str, Any], message: str) -> None:
    refused_by_both(algorithm, kwargs, message)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(actor_type="diffusion"), "`actor_type` must be one of 'mean_flow', 'flow_matching', not 'diffusion'"),
        (dict(divergence_type="none"), "`divergence_type`"),
    ],
    ids=str,
)
def test_bad_arguments_of_mfpos_policy_are_refused(kwargs: dict[str, Any], message: str) -> None:
    refused_by_both(MFPO, kwargs, message)


def refused_by_both(algorithm: Algorithm, kwargs: dict[str, Any], message: str) -> None:
    """By the algorithm and by the policy itself."""
    with pytest.raises(ValueError, match=message):
        make_model(algorithm, UntouchedEnv(), replay_buffer_class=UnusedBuffer, policy_kwargs=kwargs)
    env = RandomEnv()
    with pytest.raises(ValueError, match=message):
        algorithm.policy_base(env.observation_space, env.action_space, lambda _: 1e-3, **{**SMALL_POLICY, **kwargs})


def test_critic_reduction_among_the_policy_arguments_is_refused(algorithm: Algorithm) -> None:
    with pytest.raises(ValueError, match=f"`critic_reduction` is an argument of {algorithm.__name__} itself"):
        make_model(algorithm, UntouchedEnv(), replay_buffer_class=UnusedBuffer, policy_kwargs=dict(critic_reduction="mean"))


@pytest.mark.parametrize("name, value", [("sampling_steps", 0), ("n_action_candidates", -1), ("sampling_steps", "two")])
def test_bad_settings_of_a_trained_policy_are_refused_and_change_nothing(algorithm: Algorithm, name: str, value: Any) -> None:
    policy = make_model(algorithm).policy
    before = policy.sampling_steps, policy.n_action_candidates
    with pytest.raises(ValueError, match=f"`{name}`"):
        setattr(policy, name, value)
    assert (policy.sampling_steps, policy.n_action_candidates) == before


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
def test_unsupported_action_spaces_are_refused(algorithm: Algorithm, action_space: Any, message: str) -> None:
    with pytest.raises((ValueError, AssertionError), match=message):
        make_model(algorithm, UntouchedEnv(action_space=action_space), replay_buffer_class=UnusedBuffer)


def test_the_policy_of_another_algorithm_is_refused(algorithm: Algorithm) -> None:
    with pytest.raises(
        ValueError, match=rf"`policy` must be one of .*'MlpPolicy'.* or a subclass of `{algorithm.__name__}Policy`"
    ):
        algorithm(SACPolicy, UntouchedEnv(), replay_buffer_class=UnusedBuffer)
    with pytest.raises(ValueError, match="Policy LstmPolicy unknown"):
        algorithm("LstmPolicy", UntouchedEnv(), replay_buffer_class=UnusedBuffer)


def test_a_function_that_makes_another_algorithms_policy_is_refused(algorithm: Algorithm) -> None:
    with pytest.raises(ValueError, match=rf"`policy` must be one of .* or a subclass of `{algorithm.__name__}Policy`"):
        algorithm(lambda observation_space, *args, **kwargs: SACPolicy(observation_space, *args), RandomEnv(), buffer_size=10)


def test_arguments_of_a_custom_policy_are_checked_by_its_base_class(algorithm: Algorithm) -> None:
    class Own(algorithm.policy_base):
        def __init__(self, *args: Any, n_critics: int | None = None, **kwargs: Any):
            super().__init__(*args, n_critics=5 if n_critics is None else n_critics, **kwargs)

    with pytest.raises(ValueError, match="`n_critics` must be an integer of at least 1, not 0"):
        make_model(algorithm, policy=Own, policy_kwargs=dict(n_critics=0))
    with pytest.raises(ValueError, match="`n_critics` must be an integer of at least 1, not 0"):
        make_model(algorithm, policy=partial(algorithm.policy_base, n_critics=0))


def test_action_bounds_of_nan_are_refused(algorithm: Algorithm) -> None:
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space.low[0] = np.nan
    with pytest.raises((ValueError, AssertionError), match="finite lower and upper bound"):
        make_model(algorithm, UntouchedEnv(action_space=action_space), replay_buffer_class=UnusedBuffer)


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


def weights(model: MeanFlowAlgorithm) -> list[th.Tensor]:
    return [value.clone() for value in model.policy.state_dict().values()]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "what, step", [("observation", 12), ("terminal observation", 14), ("reward", 12), ("first observation", 0)]
)
def test_numbers_that_are_not_finite_stop_training(
    algorithm: Algorithm, tmp_path: Any, what: str, step: int, value: float
) -> None:
    model = make_model(algorithm, BrokenEnv(what, value))
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
    algorithm.load(tmp_path / "model", env=RandomEnv()).learn(15)


def test_broken_dict_observation_names_the_key(algorithm: Algorithm) -> None:
    space = spaces.Dict(vector=spaces.Box(-1, 1, (3,), np.float32), other=spaces.Box(-1, 1, (2,), np.float32))
    model = make_model(
        algorithm, BrokenEnv("terminal observation", np.nan, observation_space=space), policy="MultiInputPolicy"
    )
    with pytest.raises(ValueError, match="terminal observation 'vector' at step 14"):
        model.learn(40)


def test_the_environment_with_the_broken_number_is_named(algorithm: Algorithm) -> None:
    for what in ("observation", "terminal observation", "reward"):
        model = make_model(algorithm, DummyVecEnv([RandomEnv, lambda what=what: BrokenEnv(what, np.nan)]), gradient_steps=-1)
        with pytest.raises(ValueError, match=f"Environment 1 returned a non-finite {what} at step"):
            model.learn(60)


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_normalisation_does_not_hide_an_infinite_number(algorithm: Algorithm, what: str) -> None:
    env = VecNormalize(DummyVecEnv([lambda: BrokenEnv(what, np.inf)]))
    with pytest.raises(ValueError, match=f"non-finite {what} at step 12"):
        make_model(algorithm, env).learn(40)


def test_a_reward_that_is_no_number_is_refused(algorithm: Algorithm) -> None:
    with pytest.raises(ValueError, match="Environment 0 returned a non-finite reward at step 12"):
        make_model(algorithm, DummyVecEnv([lambda: BrokenEnv("reward", None)])).learn(40)  # type: ignore[arg-type]
    env = OtherVecEnv(DummyVecEnv([RandomEnv] * 2), reward=lambda rewards: np.array([rewards[0], "much"], object))
    message = r"Environment 1 returned, at step 2, as reward what cannot be stored as float32: 'much'"
    with pytest.raises(ValueError, match=message):
        make_model(algorithm, env, gradient_steps=-1).learn(40)


class OtherVecEnv(VecEnvWrapper):
    """Final observations and rewards as vectorized environments that are not SB3's may give them."""

    def __init__(self, venv: VecEnv, final: Callable[[Any], Any] = lambda x: x, reward: Callable[[Any], Any] = lambda x: x):
        super().__init__(venv)
        self.final, self.reward = final, reward

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = self.final(info["terminal_observation"])
        return observations, self.reward(rewards), dones, infos


MIXED = spaces.Dict(a=spaces.Box(-1, 1, (3,), np.float32), b=spaces.Discrete(4))


def collected(algorithm: Any, space: spaces.Space, **kwargs: Any) -> Any:
    """The replay buffer after random actions, the same for every algorithm; our networks are then trained on it."""
    env = OtherVecEnv(DummyVecEnv([lambda: RandomEnv(space)] * 2), **kwargs)
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    arguments: dict[str, Any] = dict(learning_starts=40, buffer_size=500, batch_size=8, gradient_steps=-1, seed=0)
    if algorithm is SAC:
        return SAC(policy, env, device="cpu", **arguments).learn(40).replay_buffer
    model = make_model(algorithm, env, policy=policy, **arguments).learn(44)
    assert model._n_updates == 4
    return model.replay_buffer


@pytest.mark.parametrize(
    "space, final",
    [
        (spaces.Discrete(5), int),
        (spaces.Box(-1, 1, (3,), np.float32), list),
        (spaces.Box(-1, 1, (3,), np.float32), tuple),
        (spaces.Box(-1, 1, (3,), np.float32), lambda last: last.astype(object)),
        (spaces.MultiBinary(3), lambda last: last.astype(bool)),
        (MIXED, lambda last: {"a": last["a"].tolist(), "b": int(last["b"])}),
        (MIXED, lambda last: {**last, "why": "it ended", "target": None, "debug": np.array([np.nan]), "more": {"a": 1.0}}),
        (MIXED, lambda last: None),
    ],
    ids=["int", "list", "tuple", "objects", "bools", "dict of lists", "further entries", "none"],
)
def test_final_observations_are_stored_as_with_sac(algorithm: Algorithm, space: spaces.Space, final: Any) -> None:
    buffer, expected = collected(algorithm, space, final=final), collected(SAC, space, final=final)
    for key in space if isinstance(space, spaces.Dict) else [...]:
        assert np.array_equal(buffer.next_observations[key][:20], expected.next_observations[key][:20])
    assert buffer.dones[:20].any()


@pytest.mark.parametrize("reward", [list, lambda rewards: rewards.astype(object), lambda rewards: rewards > -0.3])
def test_rewards_are_stored_as_with_sac(algorithm: Algorithm, reward: Any) -> None:
    space = spaces.Box(-1, 1, (3,), np.float32)
    buffers = [collected(each, space, reward=reward) for each in (algorithm, SAC)]
    assert np.array_equal(*(buffer.rewards[:20] for buffer in buffers))


@pytest.mark.parametrize(
    "final, message",
    [
        (dict(a=[0.0, np.nan, 0.0], b=1), r"a non-finite terminal observation 'a' at step 14: \[ 0\. nan  0\.\]"),
        (dict(a=[0.0, 1e300, 0.0], b=1), "a non-finite terminal observation 'a' at step 14"),
        (dict(a=None, b=1), "a non-finite terminal observation 'a' at step 14"),
        (dict(a=[0.0] * 3, b=np.nan), "a non-finite terminal observation 'b' at step 14"),
        (dict(a=[0.0] * 3, b=None), "at step 14, as terminal observation 'b' what cannot be stored as int64: None"),
        (dict(a=[0.0] * 3, b="third"), "at step 14, as terminal observation 'b' what cannot be stored as int64: 'third'"),
        (dict(a=[0.0] * 3), "no 'b' in its terminal observation at step 14, but only 'a'"),
    ],
)
def test_broken_final_observations_are_refused(algorithm: Algorithm, final: Any, message: str) -> None:
    env = OtherVecEnv(DummyVecEnv([lambda: RandomEnv(MIXED)] * 2), final=lambda last: final)
    model = make_model(algorithm, env, policy="MultiInputPolicy", gradient_steps=-1)
    with pytest.raises(ValueError, match=f"Environment 0 returned,? {message}"):
        model.learn(40)
    assert model.replay_buffer.size() == 6


class ReplaceMissing(BaseFeaturesExtractor):
    """Gives zeros for NaN and infinite numbers."""

    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.nan_to_num(observations, nan=0.0, posinf=0.0, neginf=0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_missing_numbers_in_observations_can_be_allowed(algorithm: Algorithm, tmp_path: Any, value: float) -> None:
    """For features extractors that replace them; the refusal says so."""

    class Missing(BrokenEnv):
        def step(self, action: np.ndarray) -> Any:
            observation, *rest = super().step(action)
            return self.broken(observation), *rest

    policy_kwargs = dict(features_extractor_class=ReplaceMissing)
    with pytest.raises(ValueError, match="or set `allow_non_finite_observations=True` if the features extractor replaces"):
        make_model(algorithm, Missing("first observation", value), policy_kwargs=policy_kwargs).learn(30)
    env = Missing("first observation", value)
    model = make_model(algorithm, env, policy_kwargs=policy_kwargs, allow_non_finite_observations=True).learn(30)
    assert not np.isfinite(model.replay_buffer.observations[:30, 0, 0]).any()
    assert all(th.isfinite(weight).all() for weight in weights(model))
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=env).learn(30)
    assert loaded.replay_buffer.size() == 30
    # Rewards and actions have no such use
    env.what, env.total = "reward", 0
    with pytest.raises(ValueError, match="non-finite reward"):
        loaded.learn(30)
    with pytest.raises(ValueError, match="actions are not finite"):
        make_model(algorithm, Missing("first observation", value), allow_non_finite_observations=True).learn(30)


@pytest.mark.parametrize(
    "algorithm, network, loss",
    [
        *((algorithm, network, f"{network}_loss") for algorithm in ALGORITHMS for network in ("critic", "actor")),
        (MFPO, "divergence", "divergence_loss"),
        (MFPO, "", "ent_coef_loss"),
    ],
)
def test_a_loss_of_nan_stops_training_before_its_step(algorithm: Algorithm, network: str, loss: str) -> None:
    """A network that returns NaN from now on: its own weights must not change."""
    model = make_model(algorithm).learn(20)
    if network:
        part = {"critic": lambda: model.critic.q_networks[0], "actor": lambda: model.actor.network}
        last_layer = part.get(network, lambda: model.divergence)().body[-1]
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


def test_a_very_wide_action_space_is_warned_of(algorithm: Algorithm) -> None:
    with pytest.warns(UserWarning, match="action space reaches beyond 100"):
        make_model(algorithm, RandomEnv(action_space=spaces.Box(-1000, 1000, (2,), np.float32)))


def test_fewer_updates_than_environment_steps_are_warned_of(algorithm: Algorithm) -> None:
    with pytest.warns(UserWarning, match="`gradient_steps=1` with 2 environments.*`gradient_steps=-1` keeps it"):
        make_model(algorithm, DummyVecEnv([RandomEnv] * 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model(algorithm, DummyVecEnv([RandomEnv] * 2), gradient_steps=-1)
        make_model(algorithm, DummyVecEnv([RandomEnv]))


def test_clipped_values_are_warned_of_once(algorithm: Algorithm) -> None:
    model = make_model(algorithm, policy_kwargs=dict(v_min=-0.1, v_max=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(40)
    messages = [str(warning.message) for warning in caught if "is clipped" in str(warning.message)]
    assert len(messages) == 1
    assert "outside of [-0.1, 0.1]" in messages[0] and "lower `v_min` or higher `v_max`" in messages[0]


def test_ordinary_training_does_not_warn(algorithm: Algorithm) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_model(algorithm).learn(40)
