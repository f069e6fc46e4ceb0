"""What SB3 users rely on, for every algorithm."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, TD3, HerReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm
from tests.helpers import DEVICES, SMALL, SMALL_POLICY, Algorithm, RandomEnv, assert_equal, make_model

OPTIMIZERS: dict[Algorithm, set[str]] = {
    MFPO: {"actor.optimizer", "critic.optimizer", "divergence.optimizer", "ent_coef_optimizer"},
    SOM: {"actor.optimizer", "critic.optimizer"},
}
METRICS_OF_ALL = {
    *("actor_loss", "critic_loss", "q_value", "ess_gaussian", "clipped_target_mass"),
    *("updates_per_step", "n_updates", "learning_rate", "return_scale"),
}
METRICS: dict[Algorithm, set[str]] = {
    MFPO: METRICS_OF_ALL | {"divergence_loss", "ent_coef", "ent_coef_loss", "entropy", "ess_policy", "policy_proposal_weight"},
    SOM: METRICS_OF_ALL,
}


def state_of(model: MeanFlowAlgorithm) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in model.get_parameters().items()}


def observations_for(model: MeanFlowAlgorithm, n: int = 6) -> np.ndarray:
    model.observation_space.seed(0)
    return np.stack([model.observation_space.sample() for _ in range(n)])


def record_arguments(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Keep the positional arguments that a method is called with; it still runs."""
    arguments: list[tuple[Any, ...]] = []
    function = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        arguments.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorded)
    return arguments


# Constructor


@pytest.mark.parametrize(
    "algorithm, other, different", [(MFPO, SAC, {"ent_coef", "tau"}), (SOM, TD3, {"learning_rate", "policy_delay", "tau"})]
)
def test_arguments_are_those_of_sb3_in_the_same_order(algorithm: Algorithm, other: type, different: set[str]) -> None:
    theirs = inspect.signature(other.__init__).parameters
    ours = inspect.signature(algorithm.__init__).parameters
    # What a stochastic policy does not have
    names = [name for name in theirs if name not in ("target_policy_noise", "target_noise_clip")]
    assert list(ours)[: len(names)] == names
    assert {name for name in names if theirs[name].default != ours[name].default} == different
    assert all(parameter.kind == parameter.KEYWORD_ONLY for parameter in list(ours.values())[len(names) :])


# Saving and loading


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("algorithm, kwargs", [(MFPO, {}), (MFPO, dict(ent_coef=0.2)), (SOM, {})])
def test_save_and_load(algorithm: Algorithm, tmp_path: Path, device: str, kwargs: dict[str, Any]) -> None:
    model = make_model(algorithm, **kwargs, seed=0).learn(40)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device=device)
    assert loaded.device.type == device
    observations = observations_for(model)
    if device == "cpu":
        assert_equal(state_of(model), state_of(loaded))
        for deterministic in (True, False):
            th.manual_seed(0)
            expected, _ = model.predict(observations, deterministic=deterministic)
            th.manual_seed(0)
            assert np.array_equal(loaded.predict(observations, deterministic=deterministic)[0], expected)
    else:
        action, _ = loaded.predict(observations, deterministic=True)
        assert np.isfinite(action).all()
    if algorithm is MFPO:
        assert loaded._temperature().item() == model._temperature().item()
        assert loaded.target_entropy == model.target_entropy
    # Training goes on where it was
    loaded.set_env(RandomEnv())
    loaded.learn(20, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded._n_updates) == (60, model._n_updates + 20)


def test_parameters_hold_every_optimizer(algorithm: Algorithm) -> None:
    # The default's steps of the temperature have no memory
    kwargs = dict(ent_coef_rate=None) if algorithm is MFPO else {}
    parameters = make_model(algorithm, **kwargs).learn(20).get_parameters()
    assert set(parameters) == {"policy", *OPTIMIZERS[algorithm]}
    for name in OPTIMIZERS[algorithm]:
        assert parameters[name]["state"], f"{name} has no state"


def test_load_with_env_continues(algorithm: Algorithm, tmp_path: Path) -> None:
    model = make_model(algorithm, seed=0).learn(30)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=RandomEnv())
    loaded.learn(20)
    assert loaded.num_timesteps == 20
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        algorithm.load(tmp_path / "model", env=RandomEnv(spaces.Box(-1, 1, (5,), np.float32)))


def test_set_parameters_copies_everything_but_the_buffer(algorithm: Algorithm, tmp_path: Path) -> None:
    model, other = make_model(algorithm, seed=0).learn(30), make_model(algorithm, seed=1).learn(30)
    observations = observations_for(model)
    assert not np.array_equal(model.predict(observations, True)[0], other.predict(observations, deterministic=True)[0])
    other.set_parameters(model.get_parameters())
    assert_equal(state_of(model), state_of(other))
    expected, _ = model.predict(observations, deterministic=True)
    assert np.array_equal(other.predict(observations, deterministic=True)[0], expected)
    with pytest.raises(ValueError, match="do not match"):
        other.set_parameters({"policy": model.get_parameters()["policy"]}, exact_match=True)


def test_a_policy_that_is_put_in_place_is_the_one_that_is_trained(algorithm: Algorithm) -> None:
    """The same training as of the model that it was taken from."""
    policy_kwargs = dict(features_extractor_class=SmallExtractor)
    model, other = (make_model(algorithm, seed=seed, policy_kwargs=policy_kwargs).learn(20) for seed in (0, 1))
    former = model.policy
    before = copy.deepcopy(former.state_dict())
    model.policy, expected = copy.deepcopy(other.policy), copy.deepcopy(other)
    expected.replay_buffer = model.replay_buffer
    if isinstance(model, MFPO):
        model.log_ent_coef.data.copy_(expected.log_ent_coef)
        # A copy: optimizers keep the tensors that they are given
        model.ent_coef_optimizer.load_state_dict(copy.deepcopy(expected.ent_coef_optimizer.state_dict()))
    for each in (model, expected):
        np.random.seed(0)
        th.manual_seed(0)
        each.train(3, batch_size=8)
    assert_equal(state_of(model), state_of(expected))
    assert not th.equal(next(model.policy.actor.parameters()), next(other.policy.actor.parameters()))
    assert_equal(former.state_dict(), before)


def test_policy_save_and_load(algorithm: Algorithm, tmp_path: Path) -> None:
    model = make_model(algorithm, critic_reduction="mean", policy_kwargs=dict(layer_norm=False, activation_fn=nn.Tanh)).learn(
        20
    )
    model.policy.sampling_steps = 3
    model.policy.save(tmp_path / "policy")
    policy = algorithm.policy_base.load(tmp_path / "policy", device="cpu")
    observations = observations_for(model)
    expected, _ = model.predict(observations, deterministic=True)
    assert np.array_equal(policy.predict(observations, deterministic=True)[0], expected)
    assert policy.critic_reduction == "mean"
    assert_equal(policy._get_constructor_parameters().keys(), model.policy._get_constructor_parameters().keys())


@pytest.mark.parametrize("algorithm", [MFPO, SOM, SAC])
def test_the_actor_is_a_policy(algorithm: Any, tmp_path: Path) -> None:
    """It predicts by itself, within the bounds, and so does its copy from a file, where it goes on with its sampling steps."""
    env = RandomEnv(action_space=spaces.Box(np.array([-2, 0], np.float32), np.array([0.5, 9], np.float32)))
    if algorithm is SAC:
        model = SAC("MlpPolicy", env, learning_starts=10, buffer_size=50, device="cpu").learn(20)
    else:
        model = make_model(algorithm, env, policy_kwargs=dict(net_arch=[16, 12])).learn(20)
        model.policy.sampling_steps = 3
    actor, observations = model.actor, observations_for(model)
    assert isinstance(actor, BasePolicy)
    actor.save(tmp_path / "actor")
    loaded = type(actor).load(tmp_path / "actor", device="cpu")
    for deterministic in (True, False):
        actions = []
        for one in (actor, loaded):
            th.manual_seed(0)
            actions.append(one.predict(observations, deterministic=deterministic)[0])
            assert all(model.action_space.contains(action) for action in actions[-1])
        assert np.array_equal(*actions)
        # Whatever the seed, if it is deterministic
        assert np.array_equal(actor.predict(observations, deterministic=deterministic)[0], actions[0]) == deterministic
    assert_equal(actor._get_constructor_parameters().keys(), loaded._get_constructor_parameters().keys())


def test_the_actor_starts_from_the_centre_of_the_noise_when_it_is_deterministic(algorithm: Algorithm) -> None:
    """As the policy does with a single candidate."""
    model = make_model(algorithm, policy_kwargs=dict(n_action_candidates=1)).learn(20)
    observations = observations_for(model)
    expected, _ = model.predict(observations, deterministic=True)
    assert np.allclose(model.actor_target.predict(observations, deterministic=True)[0], expected, atol=1e-6)


class SmallExtractor(BaseFeaturesExtractor):
    """Features extractor with layers that behave differently in training."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 5):
        super().__init__(observation_space, features_dim)
        self.layers = nn.Sequential(
            nn.Linear(observation_space.shape[0], features_dim), nn.BatchNorm1d(features_dim), nn.Dropout(0.5)
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


@pytest.mark.parametrize("share", [False, True])
def test_custom_policy_kwargs_survive_saving(algorithm: Algorithm, tmp_path: Path, share: bool) -> None:
    policy_kwargs = dict(
        net_arch=dict(pi=[10, 9], qf=[8]),
        activation_fn=nn.SiLU,
        layer_norm=False,
        time_fourier_dim=4,
        time_embedding_dim=3,
        action_fourier_dim=8,
        action_fourier_std=1.5,
        sampling_steps=3,
        sampling_power=1.0,
        n_action_candidates=4,
        n_critics=3,
        n_atoms=5,
        v_min=-300.0,
        v_max=400.0,
        features_extractor_class=SmallExtractor,
        features_extractor_kwargs=dict(features_dim=6),
        share_features_extractor=share,
        optimizer_class=th.optim.AdamW,
        optimizer_kwargs=dict(weight_decay=0.1),
    )
    model = make_model(algorithm, policy_kwargs=policy_kwargs).learn(30)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    policy = loaded.policy
    assert (policy.sampling_steps, policy.n_action_candidates, len(policy.critic.q_networks)) == (3, 4, 3)
    assert policy.critic.atoms.tolist() == pytest.approx([-300.0, -125.0, 50.0, 225.0, 400.0])
    assert policy.actor.network.input_layer.weight.shape == (10, 2 + 8 + 6 + 3)
    assert (policy.action_fourier_std, policy.sampling_power) == (1.5, 1.0)
    assert isinstance(policy.actor.optimizer, th.optim.AdamW)
    assert (policy.critic.features_extractor is policy.actor.features_extractor) == share
    assert policy.critic_target.features_extractor is not policy.actor.features_extractor
    observations = observations_for(model)
    expected, _ = model.predict(observations, deterministic=True)
    assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)


@pytest.mark.parametrize("kind", ["defaults of its own", "partial", "function"])
def test_policies_of_ones_own(algorithm: Algorithm, tmp_path: Path, kind: str) -> None:
    """Whatever makes a policy is accepted, as by SAC; what it leaves open may be filled in before the base is called."""
    base: Any = algorithm.policy_base

    class Own(base):
        """The value range follows from a largest reward unless it is given."""

        def __init__(
            self, *args: Any, v_min: float | None = None, v_max: float | None = None, n_critics: Any = None, **kwargs: Any
        ):
            super().__init__(*args, v_min=v_min or -100.0, v_max=v_max or 100.0, n_critics=n_critics or 3, **kwargs)

    policies = {
        "defaults of its own": Own,
        "partial": partial(base, n_critics=3),
        "function": lambda *args, **kwargs: base(*args, n_critics=3, **kwargs),
    }
    policy_kwargs = SMALL_POLICY | (dict(v_min=None) if kind == "defaults of its own" else {})
    model = algorithm(policies[kind], RandomEnv(), **SMALL[algorithm], policy_kwargs=policy_kwargs).learn(20)
    assert len(model.critic.q_networks) == 3
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    observations = observations_for(model)
    expected, _ = model.predict(observations, deterministic=True)
    assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)


def test_changed_sampling_survives_saving(algorithm: Algorithm, tmp_path: Path) -> None:
    model = make_model(algorithm).learn(20)
    observations = observations_for(model)
    model.policy.sampling_steps, model.policy.n_action_candidates = 4, 17
    expected, _ = model.predict(observations, deterministic=True)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    assert (loaded.policy.sampling_steps, loaded.policy.n_action_candidates) == (4, 17)
    assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)


def test_deepcopy_and_pickle(algorithm: Algorithm) -> None:
    model = make_model(algorithm, seed=0).learn(20)
    observations = observations_for(model)
    expected, _ = model.predict(observations, deterministic=True)
    for policy in (copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))):
        assert np.array_equal(policy.predict(observations, deterministic=True)[0], expected)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        np.random.seed(0)
        th.manual_seed(0)
        one.train(2, batch_size=8)
    assert_equal(state_of(model), state_of(twin))
    # The copy stands by itself
    expected, _ = model.predict(observations, deterministic=True)
    for parameter in twin.policy.parameters():
        parameter.data.mul_(2)
    assert np.array_equal(model.predict(observations, deterministic=True)[0], expected)
    assert not np.array_equal(twin.predict(observations, deterministic=True)[0], expected)


def test_replay_buffer_is_saved_apart(algorithm: Algorithm, tmp_path: Path) -> None:
    model = make_model(algorithm).learn(30)
    model.save_replay_buffer(tmp_path / "buffer")
    other = make_model(algorithm)
    other.load_replay_buffer(tmp_path / "buffer")
    assert other.replay_buffer.size() == 30
    assert np.array_equal(other.replay_buffer.rewards, model.replay_buffer.rewards)


# Acting


@pytest.mark.parametrize("candidates", [1, 10])
def test_deterministic_action_is_a_function_of_weights_and_observations(
    algorithm: Algorithm, tmp_path: Path, candidates: int
) -> None:
    """The same call gives the same action, whatever was drawn before, also of the same model from a file."""
    model = make_model(algorithm, policy_kwargs=dict(n_action_candidates=candidates), seed=0).learn(60)
    observations = observations_for(model, n=33)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    for batch in (observations, observations[3:5], observations[7]):
        expected, _ = model.predict(batch, deterministic=True)
        assert expected.shape == (*batch.shape[:-1], 2)
        for seed in range(3):
            th.manual_seed(seed)
            np.random.seed(seed)
            assert np.array_equal(model.predict(batch, deterministic=True)[0], expected)
            assert np.array_equal(loaded.predict(batch, deterministic=True)[0], expected)
    assert len(np.unique(model.predict(observations, deterministic=True)[0], axis=0)) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 7, 33, 300])
def test_deterministic_actions_are_the_best_of_their_states_in_any_batch(algorithm: Algorithm, batch_size: int) -> None:
    """
    Products of other numbers of rows are rounded otherwise, so that of two nearly equal candidates either may win: by value
    the chosen one is as good as the best.
    """
    model = make_model(algorithm, seed=0).learn(60)
    policy = model.policy
    observations = th.as_tensor(observations_for(model, n=300))
    with th.no_grad():
        chosen = th.cat([policy(batch, deterministic=True) for batch in observations.split(batch_size)])
        # Candidate by candidate
        features = policy.actor_target.encode(observations)
        candidates = [policy.act(features, noise.expand(300, 2)) for noise in policy.candidate_noise]
        over_critics = {"min": th.amin, "mean": th.mean}[policy.critic_reduction]
        values = th.stack([over_critics(th.cat(policy.critic_target(observations, action), 1), 1) for action in candidates])
        value = over_critics(th.cat(policy.critic_target(observations, chosen), 1), 1)
    value_range = policy.critic.atoms[-1] - policy.critic.atoms[0]
    assert (value - values.amax(dim=0)).abs().max() < 1e-4 * value_range
    distances = th.stack([(chosen - action).abs().amax(dim=1) for action in candidates])
    assert distances.amin(dim=0).max() < 1e-5
    # Which one is taken matters
    assert (values.amax(dim=0) - values.amin(dim=0)).median() > 1e-3 * value_range


def test_no_observations_give_no_actions(algorithm: Algorithm) -> None:
    """As with SAC."""
    for model in (make_model(algorithm), SAC("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu")):
        for deterministic in (False, True):
            actions, _ = model.predict(np.zeros((0, 3), np.float32), deterministic=deterministic)
            assert actions.shape == (0, 2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_empty_batch_gives_no_actions(algorithm: Algorithm, deterministic: bool) -> None:
    empty = np.empty((0, 3), np.float32)
    expected = SAC("MlpPolicy", RandomEnv(), buffer_size=10).predict(empty, deterministic=deterministic)[0]
    assert make_model(algorithm).predict(empty, deterministic=deterministic)[0].shape == expected.shape == (0, 2)


def test_deterministic_prediction_draws_no_random_numbers(algorithm: Algorithm) -> None:
    model = make_model(algorithm)
    state = th.get_rng_state()
    model.predict(observations_for(model), deterministic=True)
    assert th.equal(th.get_rng_state(), state)


def test_deterministic_action_is_the_best_candidate(algorithm: Algorithm) -> None:
    """No candidate has a higher value by the target critics, and more candidates cannot be worse."""
    model = make_model(algorithm, seed=0).learn(60)
    policy = model.policy
    observation = th.as_tensor(observations_for(model, 1))

    def value(action: th.Tensor) -> float:
        return th.cat(policy.critic_target(observation, action[None]), dim=1).min().item()

    with th.no_grad():
        action = policy._predict(observation, deterministic=True)[0]
        candidates = policy.act(policy.actor_target.encode(observation), policy.candidate_noise)
        assert len(candidates) == 10
        assert value(action) == pytest.approx(max(value(candidate) for candidate in candidates), abs=1e-5)


def test_stochastic_actions_follow_the_seed(algorithm: Algorithm) -> None:
    model = make_model(algorithm)
    observations = observations_for(model)
    actions = []
    for seed in (0, 0, 1):
        th.manual_seed(seed)
        actions.append(model.predict(observations, deterministic=False)[0])
    assert np.array_equal(actions[0], actions[1])
    assert not np.array_equal(actions[0], actions[2])
    assert not np.array_equal(*(model.predict(observations)[0] for _ in range(2)))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sampling_steps_can_be_changed_without_retraining(algorithm: Algorithm, steps: int) -> None:
    model = make_model(algorithm).learn(20)
    model.policy.sampling_steps = steps
    model.policy.n_action_candidates = steps + 2
    assert model.policy.sampling_steps == steps
    calls = []
    handle = model.actor_target.network.body.register_forward_hook(lambda *args: calls.append(None))
    for deterministic in (False, True):
        calls.clear()
        action, _ = model.predict(observations_for(model, 1), deterministic=deterministic)
        assert len(calls) == steps
        assert model.action_space.contains(action[0])
    handle.remove()
    model.learn(10, reset_num_timesteps=False)


def test_candidate_noise_is_well_spread(algorithm: Algorithm) -> None:
    """The same on every call, every coordinate with the mean and nearly the variance of a standard normal."""
    model = make_model(algorithm)
    model.policy.n_action_candidates = 64
    noise = model.policy.candidate_noise
    assert noise.shape == (64, 2)
    assert th.allclose(noise.mean(0), th.zeros(2), atol=1e-6)
    assert th.allclose(noise.var(0), th.ones(2), atol=0.1)
    assert th.equal(make_model(algorithm, policy_kwargs=dict(n_action_candidates=64), seed=5).policy.candidate_noise, noise)


@pytest.mark.parametrize(
    "low, high", [([-1.0], [1.0]), ([-2.0], [0.5]), ([-1.0, 0.0, -3.0], [1.0, 5.0, -1.0]), ([0.0, 10.0], [1e-3, 90.0])]
)
def test_one_dimensional_and_asymmetric_actions(algorithm: Algorithm, low: list[float], high: list[float]) -> None:
    action_space = spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
    model = make_model(algorithm, RandomEnv(action_space=action_space)).learn(40)  # the environment checks every action
    for deterministic in (True, False):
        action, _ = model.predict(model.observation_space.sample(), deterministic=deterministic)
        assert action_space.contains(action)


def test_rounding_does_not_leave_the_bounds(algorithm: Algorithm) -> None:
    """Here SB3's formula gives the number after the upper bound."""
    action_space = spaces.Box(np.float32(-1.5727084), np.float32(0.4272916), (1,), np.float32)
    policy = make_model(algorithm, RandomEnv(action_space=action_space)).policy
    assert BasePolicy.unscale_action(policy, np.ones(1, np.float32)) > action_space.high
    for action in (-1.0, 1.0):
        assert action_space.contains(policy.unscale_action(np.full(1, action, np.float32)))


def test_matrix_shaped_actions(algorithm: Algorithm) -> None:
    model = make_model(algorithm, RandomEnv(action_space=spaces.Box(-2, 2, (2, 3), np.float32))).learn(30)
    assert model.predict(model.observation_space.sample(), deterministic=True)[0].shape == (2, 3)


# Training


def train_twice(algorithm: Algorithm, **kwargs: Any) -> tuple[Any, Any]:
    models = []
    for _ in range(2):
        env = RandomEnv()
        models.append(make_model(algorithm, env, seed=3, **kwargs).learn(50))
    return models[0], models[1]


def test_same_seed_same_training(algorithm: Algorithm) -> None:
    first, second = train_twice(algorithm)
    assert_equal(state_of(first), state_of(second))
    assert np.array_equal(first.replay_buffer.actions, second.replay_buffer.actions)
    assert not th.equal(
        make_model(algorithm, seed=4).policy.actor.network.input_layer.weight,
        make_model(algorithm, seed=5).policy.actor.network.input_layer.weight,
    )


@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
def test_several_environments(algorithm: Algorithm, vec_env_class: type) -> None:
    env = vec_env_class([RandomEnv for _ in range(3)])
    model = make_model(algorithm, env, gradient_steps=-1).learn(60)
    # learning_starts = 10: the first three rounds of 3 steps come without updates
    assert model.num_timesteps == 60
    assert model._n_updates == 60 - 9
    env.close()


@pytest.mark.parametrize(
    "train_freq, gradient_steps, updates",
    [(1, 1, 30), (5, 2, 12), ((2, "episode"), 3, 9), ((1, "episode"), -1, 35), (4, 0, 0)],
)
def test_train_frequency(algorithm: Algorithm, train_freq: Any, gradient_steps: int, updates: int) -> None:
    """Episodes have 7 steps."""
    model = make_model(algorithm, train_freq=train_freq, gradient_steps=gradient_steps).learn(40)
    assert model._n_updates == updates


def test_policy_delay_and_target_update_interval(algorithm: Algorithm) -> None:
    # A temperature that rises: it does not fall where one proposal has all the weight
    kwargs = dict(target_entropy=5.0) if algorithm is MFPO else {}
    model = make_model(algorithm, policy_delay=3, target_update_interval=4, learning_starts=10, **kwargs)
    model.learn(10)
    batch = model.replay_buffer.sample(8)

    followers = [model.actor, model.actor_target, *([model.divergence] if algorithm is MFPO else [])]

    def snapshot() -> list[th.Tensor]:
        modules = (model.critic, model.critic_target, *followers)
        temperature = [model.log_ent_coef] if algorithm is MFPO else []
        return [parameter.detach().clone() for parameter in (*(next(m.parameters()) for m in modules), *temperature)]

    for update in range(1, 13):
        before = snapshot()
        model._gradient_step(batch)
        critic, target, *policy = (not th.equal(old, new) for old, new in zip(before, snapshot(), strict=True))
        assert critic
        assert target == (update % 4 == 0)
        assert all(changed == (update % 3 == 0) for changed in policy)


def test_polyak_average(algorithm: Algorithm) -> None:
    model = make_model(algorithm, tau=0.1)
    model.learn(10)
    old = [parameter.clone() for parameter in model.critic_target.parameters()]
    model._gradient_step(model.replay_buffer.sample(8))
    for before, after, online in zip(old, model.critic_target.parameters(), model.critic.parameters(), strict=True):
        assert th.allclose(after, 0.9 * before + 0.1 * online, atol=1e-6)


def test_the_average_of_the_actor_acts_and_gives_targets(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collection, evaluation and every action that a gradient step starts from; the regression alone is the actor's."""
    model = make_model(algorithm, actor_tau=0.1, seed=0).learn(11)
    acting = record_arguments(monkeypatch, model.actor_target, "encode")
    trained = record_arguments(monkeypatch, model.actor, "encode")
    for deterministic in (True, False):
        model.predict(observations_for(model), deterministic=deterministic)
    assert len(acting) == 2 and not trained
    batch = model.replay_buffer.sample(8)
    old = [parameter.clone() for parameter in model.actor_target.parameters()]
    model._gradient_step(batch)
    assert [th.equal(args[0], batch.observations) for args in trained] == [True]
    assert th.equal(acting[2][0], batch.next_observations)
    for before, after, online in zip(old, model.actor_target.parameters(), model.actor.parameters(), strict=True):
        assert th.allclose(after, 0.9 * before + 0.1 * online, atol=1e-6)
    assert not any(parameter.grad is not None for parameter in model.actor_target.parameters())


def test_an_average_of_one_step_is_the_actor(algorithm: Algorithm) -> None:
    model = make_model(algorithm, actor_tau=1.0).learn(15)
    assert_equal(model.actor_target.state_dict(), model.actor.state_dict())


@pytest.mark.parametrize("terminates", [True, False])
def test_termination_ends_the_return_and_truncation_does_not(
    algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch, terminates: bool
) -> None:
    model = make_model(algorithm, RandomEnv(episode_length=1, terminates=terminates))
    calls = record_arguments(monkeypatch, model.policy.critic_target, "bellman_target")
    model.learn(20)
    discounts = th.cat([args[2] for args in calls])
    assert (discounts == (0.0 if terminates else model.gamma)).all()


def test_a_loaded_model_may_reduce_the_critics_in_another_way(algorithm: Algorithm, tmp_path: Path) -> None:
    model = make_model(algorithm, critic_reduction="mean", seed=0).learn(40)
    model.save(tmp_path / "model")
    states = {}
    for reduction in ("mean", "min"):
        loaded = algorithm.load(tmp_path / "model", critic_reduction=reduction, device="cpu")
        assert loaded.policy.critic_reduction == reduction
        loaded.replay_buffer = model.replay_buffer
        loaded.set_random_seed(1)
        loaded.train(2, batch_size=8)
        states[reduction] = state_of(loaded)["policy"]["critic.q_networks.0.body.5.weight"]
    assert not th.equal(*states.values())


def test_n_step_returns_use_their_own_discounts(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(algorithm, RandomEnv(episode_length=7, terminates=True), n_steps=3, gamma=0.9)
    calls = record_arguments(monkeypatch, model.policy.critic_target, "bellman_target")
    model.learn(80)
    discounts = th.cat([args[2] for args in calls])
    assert th.isclose(discounts, th.tensor(0.9**3), atol=1e-6).any()
    assert (discounts == 0).any()
    # Nothing but three full steps, or the end of an episode (or of the buffer, where fewer steps are summed)
    allowed = th.tensor([0.0, 0.9, 0.9**2, 0.9**3])
    assert th.isclose(discounts, allowed, atol=1e-6).any(dim=1).all()


def test_hindsight_experience_replay(algorithm: Algorithm) -> None:
    model = make_model(
        algorithm,
        BitFlippingEnv(n_bits=3, continuous=True, max_steps=3),
        policy="MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=dict(n_sampled_goal=2, goal_selection_strategy="future"),
    ).learn(40)
    assert model._n_updates == 30
    assert isinstance(model.replay_buffer, HerReplayBuffer)


def test_memory_efficient_buffer(algorithm: Algorithm) -> None:
    model = make_model(
        algorithm, optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)
    ).learn(40)
    assert not hasattr(model.replay_buffer, "next_observations")
    assert model._n_updates == 30


def test_action_noise_is_added(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = NormalActionNoise(np.full(2, 10.0), np.full(2, 0.01))
    model = make_model(algorithm, action_noise=noise, learning_starts=0, policy_kwargs=dict(v_min=-300, v_max=300)).learn(5)
    # A push of 10 carries every action to the upper bound
    assert (model.replay_buffer.actions[:5] == 1).all()


def test_vec_normalize(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalize(DummyVecEnv([lambda: RandomEnv(spaces.Box(50, 100, (3,), np.float32))]))
    model = make_model(algorithm, env)
    seen = record_arguments(monkeypatch, model.policy.critic, "encode")
    model.learn(40)
    # The buffer holds raw observations, the networks see normalised ones
    assert model.replay_buffer.observations[:40].min() >= 50
    assert max(args[0].abs().max() for args in seen) <= env.clip_obs


def test_stacked_frames_and_images(algorithm: Algorithm) -> None:
    env = VecFrameStack(
        DummyVecEnv([lambda: FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)]), n_stack=2
    )
    model = make_model(
        algorithm, env, policy="CnnPolicy", buffer_size=50, policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8))
    )
    before = [p.clone() for p in model.actor.features_extractor.parameters()]
    model.learn(14)
    # The actor's loss trains its extractor
    assert all(not th.equal(old, new) for old, new in zip(before, model.actor.features_extractor.parameters(), strict=True))
    observation = env.reset()
    assert model.predict(observation, deterministic=True)[0].shape == (1, 5)


def test_shared_extractor_learns_from_the_actor_alone(algorithm: Algorithm) -> None:
    model = make_model(
        algorithm, policy_kwargs=dict(features_extractor_class=SmallExtractor, share_features_extractor=True)
    ).learn(12)
    shared = {id(p) for p in model.actor.features_extractor.parameters()}
    of_critic = {id(p) for group in model.critic.optimizer.param_groups for p in group["params"]}
    of_actor = {id(p) for group in model.actor.optimizer.param_groups for p in group["params"]}
    assert shared <= of_actor
    assert not shared & of_critic


def test_dict_observations(algorithm: Algorithm) -> None:
    space = spaces.Dict(
        image=spaces.Box(0, 255, (1, 36, 36), np.uint8), vector=spaces.Box(-1, 1, (3,), np.float64), kind=spaces.Discrete(4)
    )
    model = make_model(algorithm, RandomEnv(space), policy="MultiInputPolicy", buffer_size=50).learn(16)
    assert model._n_updates == 6
    observation = space.sample()
    expected, _ = model.predict(observation, deterministic=True)
    batch = {key: np.stack([value] * 3) for key, value in observation.items()}
    assert np.allclose(model.predict(batch, deterministic=True)[0], np.stack([expected] * 3), atol=1e-5)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (4,), np.float64),
        spaces.Box(0, 255, (4,), np.uint8),
        spaces.Box(-1, 1, (2, 3), np.float32),
        spaces.Discrete(5),
    ],
    ids=["float64", "uint8", "matrix", "discrete"],
)
def test_observation_types(algorithm: Algorithm, space: spaces.Space) -> None:
    model = make_model(algorithm, RandomEnv(space)).learn(30)
    assert model._n_updates == 20
    assert model.predict(space.sample(), deterministic=True)[0].dtype == np.float32


def test_learning_rate_schedule_reaches_every_optimizer(algorithm: Algorithm) -> None:
    model = make_model(algorithm, learning_rate=lambda progress: 1e-3 * progress + 1e-5).learn(40)
    states = [value for name, value in model.get_parameters().items() if name in OPTIMIZERS[algorithm]]
    rates = [group["lr"] for state in states for group in state["param_groups"]]
    # Actor and critics, in MFPO divergence network and temperature, too
    actor = model.actor_rate
    factors = [actor, 1, actor, model.ent_coef_rate] if isinstance(model, MFPO) else [actor, 1]
    assert rates == pytest.approx([1e-5 * factor for factor in factors])


def test_learn_twice_continues(algorithm: Algorithm) -> None:
    model = make_model(algorithm).learn(30)
    model.learn(25, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (55, 45)
    model.learn(20)
    assert model.num_timesteps == 20


def test_training_and_evaluation_mode(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(algorithm, policy_kwargs=dict(features_extractor_class=SmallExtractor))
    modes = []
    monkeypatch.setattr(
        model.critic.features_extractor, "forward", lambda x: modes.append(model.critic.training) or x.new_zeros(len(x), 5)
    )
    model.learn(11)
    assert modes and all(modes)
    monkeypatch.undo()
    model.learn(30)
    statistics = model.actor.features_extractor.layers[1].running_mean.clone()
    observation = model.observation_space.sample()
    actions = [model.predict(observation, deterministic=True)[0] for _ in range(5)]
    assert not model.actor.training
    assert all(np.array_equal(action, actions[0]) for action in actions)  # dropout is off
    assert th.equal(model.actor.features_extractor.layers[1].running_mean, statistics)
    # The target's statistics are copies of the critic's, and the target never trains
    assert not model.critic_target.training
    model._update_target(model.critic_target, model.critic, model.tau)
    target, online = (critic.features_extractor.layers[1] for critic in (model.critic_target, model.critic))
    assert th.equal(target.running_mean, online.running_mean)
    assert not th.equal(online.running_mean, th.zeros(5))


@pytest.mark.parametrize("algorithm", [MFPO, SOM, SAC])
def test_online_and_target_statistics_are_equal_after_every_step(algorithm: Any) -> None:
    """Of batch normalisation in the critics' features extractor, also when the targets do not follow."""
    kwargs: dict[str, Any] = dict(tau=0.0, policy_kwargs=dict(features_extractor_class=SmallExtractor), seed=0)
    if algorithm is SAC:
        model = SAC("MlpPolicy", RandomEnv(), learning_starts=10, buffer_size=50, device="cpu", **kwargs).learn(10)
    else:
        model = make_model(algorithm, **kwargs).learn(10)
    for _ in range(3):
        weights = [parameter.clone() for parameter in model.critic_target.parameters()]
        model.train(1, batch_size=8)
        online, target = (critic.features_extractor.layers[1] for critic in (model.critic, model.critic_target))
        assert th.equal(online.running_mean, target.running_mean) and th.equal(online.running_var, target.running_var)
        assert online.running_mean.abs().min() > 0
        assert all(map(th.equal, weights, model.critic_target.parameters()))


def test_only_what_the_critics_learn_from_is_counted(algorithm: Algorithm) -> None:
    """One batch a step: the running mean moves by a tenth of the way to the mean of the batch."""
    model = make_model(algorithm, policy_kwargs=dict(features_extractor_class=SmallExtractor), seed=0).learn(10)
    batch, (linear, norm, _) = model.replay_buffer.sample(8), model.critic.features_extractor.layers
    with th.no_grad():
        expected = 0.9 * norm.running_mean + 0.1 * linear(batch.observations).mean(dim=0)
    model.policy.set_training_mode(True)
    model._gradient_step(batch)
    assert norm.num_batches_tracked == 1
    assert th.allclose(norm.running_mean, expected, atol=1e-6)
    assert norm.training


@pytest.mark.parametrize("net_arch", [[], dict(pi=[], qf=[8]), dict(pi=[8], qf=[])], ids=str)
@pytest.mark.parametrize("value_init", ["uniform", "narrow"])
def test_networks_without_hidden_layers_are_linear(
    algorithm: Algorithm, tmp_path: Path, net_arch: Any, value_init: str
) -> None:
    """As in SB3: a change of the input changes the output by as much wherever it is made."""
    policy_kwargs = dict(net_arch=net_arch, value_init=value_init, action_fourier_dim=0)
    model = make_model(algorithm, policy_kwargs=policy_kwargs, seed=0).learn(20)
    pi, qf = (net_arch["pi"], net_arch["qf"]) if net_arch else ([], [])
    states, actions, step = th.randn(5, 3), th.randn(5, 2), th.randn(5, 2)
    networks = {model.critic.q_networks[0]: (qf, lambda a: model.critic.q_networks[0](states, a))}
    for network in (model.actor.network, *([model.divergence] if algorithm is MFPO else [])):
        interval = network.embed(*th.rand(2, 5, 1))
        networks[network] = (pi, lambda a, network=network, interval=interval: network(states, a, interval))
    for network, (widths, call) in networks.items():
        assert len(network.body) == 3 * len(widths)
        curvature = call(actions + step) - 2 * call(actions) + call(actions - step)
        assert (curvature.abs().max() < 1e-4) == (not widths)
    model.save(tmp_path / "model")
    observations = observations_for(model)
    expected, _ = model.predict(observations, deterministic=True)
    assert np.array_equal(algorithm.load(tmp_path / "model").predict(observations, deterministic=True)[0], expected)


# What PyTorch allows to do with networks


def sample_of(policy: Any, observations: np.ndarray) -> np.ndarray:
    th.manual_seed(0)
    return policy.predict(observations, deterministic=False)[0]


def assign(network: nn.Module, weights: dict[str, th.Tensor]) -> None:
    network.load_state_dict(weights, assign=True)


def write_to_data(network: nn.Module, weights: dict[str, th.Tensor]) -> None:
    for name, parameter in network.named_parameters():
        parameter.data.copy_(weights[name])


def edit_one(network: nn.Module, weights: dict[str, th.Tensor]) -> None:
    """A number in the middle, past autograd."""
    network.get_parameter("network.embed.mlp.2.weight").data[1, 2, 3] += 5.0


@pytest.mark.parametrize("change", [assign, write_to_data, edit_one], ids=lambda change: change.__name__)
def test_actions_follow_the_weights_however_they_are_changed(algorithm: Algorithm, change: Any) -> None:
    policy, other = (make_model(algorithm, seed=seed).policy for seed in (0, 1))
    observations = np.random.RandomState(0).randn(5, 3).astype(np.float32)
    before = sample_of(policy, observations)
    change(policy.actor_target, other.actor.state_dict())
    after = sample_of(policy, observations)
    assert not np.allclose(after, before, atol=1e-4)
    assert np.array_equal(after, sample_of(copy.deepcopy(policy), observations))


def test_functional_calls_use_the_given_weights(algorithm: Algorithm) -> None:
    policy, other = (make_model(algorithm, seed=seed).policy for seed in (0, 1))
    observations, weights = th.randn(5, 3), dict(other.named_parameters())
    for deterministic in (False, True):
        with th.no_grad():
            th.manual_seed(0)
            policy(observations)
            th.manual_seed(0)
            actions = th.func.functional_call(policy, weights, (observations,), dict(deterministic=deterministic))
            th.manual_seed(0)
            assert th.equal(actions, other(observations, deterministic=deterministic))


def test_inference_mode(algorithm: Algorithm, tmp_path: Path) -> None:
    """Acting within it leaves nothing behind; a model that was loaded within it acts, as SAC's does."""
    model = make_model(algorithm, seed=0).learn(20)
    observations = observations_for(model)
    expected = sample_of(model.policy, observations), model.predict(observations, deterministic=True)[0]
    model.save(tmp_path / "model")
    with th.inference_mode():
        loaded = algorithm.load(tmp_path / "model", device="cpu")
        for policy in (model.policy, loaded.policy):
            assert np.allclose(sample_of(policy, observations), expected[0], atol=1e-5)
            assert np.allclose(policy.predict(observations, deterministic=True)[0], expected[1], atol=1e-5)
    assert np.allclose(sample_of(loaded.policy, observations), expected[0], atol=1e-5)
    assert np.allclose(loaded.predict(observations, deterministic=True)[0], expected[1], atol=1e-5)
    model.learn(10, reset_num_timesteps=False)


class Actions(nn.Module):
    """What an exported policy computes."""

    def __init__(self, policy: Any, deterministic: bool):
        super().__init__()
        self.policy, self.deterministic = policy, deterministic

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.policy(observations, deterministic=self.deterministic)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("method", ["trace a row", "trace a batch", "export"])
def test_recorded_policies_act_for_other_batches(algorithm: Algorithm, method: str, deterministic: bool) -> None:
    """Also for batches that are cut into chunks otherwise."""
    model = make_model(algorithm).learn(20)
    model.policy.set_training_mode(False)
    actions = Actions(model.policy, deterministic)
    recorded: Any
    with th.no_grad():
        if method == "export":
            batch = th.export.Dim("batch")
            recorded = th.export.export(actions, (th.randn(4, 3),), dynamic_shapes=({0: batch},)).module()
        else:
            recorded = th.jit.trace(actions, (th.randn(1 if method == "trace a row" else 4, 3),), check_trace=False)
        for n in (1, 2, 7, 2000):
            observations = th.randn(n, 3)
            th.manual_seed(0)
            expected = actions(observations)
            th.manual_seed(0)
            difference = (recorded(observations) - expected).abs().amax(dim=1)
            # Of two nearly equal candidates either may win
            assert difference.shape == (n,) and (difference < 1e-5).float().mean() > 0.99


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_recorded_policies_of_dict_observations(algorithm: Algorithm) -> None:
    space = spaces.Dict(image=spaces.Box(0, 255, (1, 36, 36), np.uint8), vector=spaces.Box(-1, 1, (3,), np.float32))
    model = make_model(algorithm, RandomEnv(space), policy="MultiInputPolicy", buffer_size=10)
    model.policy.set_training_mode(False)

    def batch(n: int) -> Any:
        return {key: th.as_tensor(np.stack([space[key].sample() for _ in range(n)])) for key in space}

    actions = Actions(model.policy, deterministic=True)
    with th.no_grad():
        recorded = th.jit.trace(actions, (batch(2),), check_trace=False)
        for n in (1, 5):
            observations = batch(n)
            assert th.allclose(recorded(observations), actions(observations), atol=1e-5)


def test_autocast(algorithm: Algorithm) -> None:
    """Actions are float32 within it, and learning goes on; nothing of it is left outside."""
    model = make_model(algorithm, seed=0).learn(20)
    observations = observations_for(model)
    expected = sample_of(model.policy, observations)
    with th.autocast("cpu", dtype=th.bfloat16):
        for deterministic in (False, True):
            assert model.predict(observations, deterministic=deterministic)[0].dtype == np.float32
        rounded = sample_of(model.policy, observations)
    assert 0 < np.abs(rounded - expected).max() < 0.2
    assert np.array_equal(sample_of(model.policy, observations), expected)
    with th.autocast("cpu", dtype=th.bfloat16):
        model.learn(20, reset_num_timesteps=False)
    assert all(p.dtype == th.float32 and th.isfinite(p).all() for p in model.policy.parameters())


def test_hooks_fire_in_prediction_and_training(algorithm: Algorithm) -> None:
    """On actors and critics as a whole and on every part; prediction takes the critics' networks alone."""
    model = make_model(algorithm).learn(12)
    policy, seen, with_gradient = model.policy, set(), set()

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.add(module)
        if th.is_grad_enabled():
            with_gradient.add(module)

    handles = [module.register_forward_hook(hook) for module in policy.modules() if module is not policy]
    model.predict(observations_for(model), deterministic=False)
    assert seen == set(policy.actor_target.modules())
    seen.clear()
    model.predict(observations_for(model), deterministic=True)
    parts = {policy.critic, policy.critic_target, policy.critic.q_networks, policy.critic_target.q_networks}
    assert seen == (set(policy.actor_target.modules()) | set(policy.critic_target.modules())) - parts
    model.train(1, batch_size=8)
    # A list of networks is not called
    lists = {policy.critic.q_networks, policy.critic_target.q_networks, policy}
    # The actor as a whole is called to act, as in SAC; of the two, the target acts
    called = set(policy.modules()) - lists - {policy.actor}
    assert seen == called
    # The divergence of the target actor takes autograd where there are hooks
    of_target = set(policy.actor_target.modules())
    assert with_gradient - of_target == called - set(policy.critic_target.modules()) - of_target
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("part", ["", "network", "network.input_layer", "network.body.3"])
def test_hooks_may_replace_outputs(algorithm: Algorithm, part: str) -> None:
    """As in the ablation of a unit."""
    model = make_model(algorithm).learn(12)
    observations = observations_for(model)
    before = sample_of(model.policy, observations), model.predict(observations, deterministic=True)[0]
    handle = model.actor_target.get_submodule(part).register_forward_hook(lambda module, inputs, output: 0 * output)
    assert not np.array_equal(sample_of(model.policy, observations), before[0])
    assert not np.array_equal(model.predict(observations, deterministic=True)[0], before[1])
    handle.remove()
    assert np.array_equal(sample_of(model.policy, observations), before[0])


def prune_every_second_input(layer: nn.Module) -> None:
    mask = th.ones_like(layer.weight)
    mask[:, ::2] = 0
    prune.custom_from_mask(layer, "weight", mask)


@pytest.mark.parametrize(
    "change",
    [prune_every_second_input, parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["pruned", "weight norm", "spectral norm"],
)
def test_a_changed_first_layer_trains_on(algorithm: Algorithm, change: Any) -> None:
    """In the actor and its target: pruned weights stay 0 in every use; a sample uses the weights as they are then."""
    model = make_model(algorithm, seed=0).learn(12)
    layer = model.actor_target.network.input_layer
    for one in (model.actor.network.input_layer, layer):
        change(one)
    model.learn(20, reset_num_timesteps=False)
    observations = observations_for(model)
    actions = sample_of(model.policy, observations)
    # The same weights without the change
    weight = layer.weight.detach().clone()
    if hasattr(layer, "weight_mask"):
        assert (weight[:, ::2] == 0).all() and (weight[:, 1::2] != 0).all()
        prune.remove(layer, "weight")
    else:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    with th.no_grad():
        layer.weight.copy_(weight)
    assert np.allclose(sample_of(model.policy, observations), actions, atol=1e-6)


@pytest.mark.parametrize("whom", ["actor.features_extractor", "critic_target", "critic_target.features_extractor", ""])
def test_prediction_is_in_evaluation_mode_whoever_trained_a_part(algorithm: Algorithm, whom: str) -> None:
    model = make_model(algorithm, policy_kwargs=dict(features_extractor_class=SmallExtractor)).learn(20)
    observation = model.observation_space.sample()
    expected, _ = model.predict(observation, deterministic=True)
    state = {name: value.clone() for name, value in model.policy.state_dict().items()}
    for _ in range(10):
        model.policy.get_submodule(whom).train()
        assert np.array_equal(model.predict(observation, deterministic=True)[0], expected)
        model.policy.get_submodule(whom).train()
        model.predict(observations_for(model))
    assert not any(module.training for module in model.policy.modules())
    assert_equal(state, dict(model.policy.state_dict()))
    model.policy.train()
    model.train(1, batch_size=8)
    assert model.actor.training and not any(module.training for module in model.critic_target.modules())


class NormalisedWeights(BaseFeaturesExtractor):
    """Layers whose weights are parametrized, as users build them."""

    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, 5)
        self.layers = nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(observation_space.shape[0], 6)),
            parametrizations.weight_norm(nn.Linear(6, 5)),
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


@pytest.mark.parametrize("share", [False, True])
def test_extractors_with_parametrized_layers_train_and_are_saved(algorithm: Algorithm, share: bool, tmp_path: Path) -> None:
    policy_kwargs = dict(features_extractor_class=NormalisedWeights, share_features_extractor=share)
    model = make_model(algorithm, policy_kwargs=policy_kwargs, seed=0).learn(12)
    before = model.actor.features_extractor.layers[0].weight.clone()
    model.learn(10, reset_num_timesteps=False)
    assert not th.equal(model.actor.features_extractor.layers[0].weight, before)
    model.save(tmp_path / "model")
    observations = observations_for(model)
    loaded = algorithm.load(tmp_path / "model", env=RandomEnv(), device="cpu")
    for deterministic in (False, True):
        actions = []
        for one in (model, loaded):
            th.manual_seed(0)
            actions.append(one.predict(observations, deterministic=deterministic)[0])
        assert np.array_equal(*actions)
    loaded.learn(15)


class ReplaceWeights(BaseCallback):
    """Puts other weights in place in the middle of training, as population-based training does."""

    def __init__(self, weights: dict[str, th.Tensor]):
        super().__init__()
        self.weights = weights

    def _on_step(self) -> bool:
        if self.num_timesteps == 15:
            self.model.policy.load_state_dict(self.weights)
        return True


def test_weights_that_a_callback_puts_in_place_are_trained_on(algorithm: Algorithm) -> None:
    """With a learning rate of nothing they stay, but for the targets, which follow. A fixed range has no scale to follow."""
    settings: dict[str, Any] = dict(learning_rate=0.0, policy_kwargs=dict(value_init="narrow", v_min=-100, v_max=100))
    weights = copy.deepcopy(make_model(algorithm, seed=1, **settings).policy.state_dict())
    model = make_model(algorithm, seed=0, **settings).learn(20, callback=ReplaceWeights(weights))
    for name, value in model.policy.state_dict().items():
        assert th.allclose(value, weights[name], atol=1e-6), name
    assert model._n_updates == 10


class FrozenNorm(SmallExtractor):
    """Statistics that stay as they are in training, too."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.layers[1].eval()
        return self


def test_parts_may_decide_on_their_mode(algorithm: Algorithm) -> None:
    model = make_model(algorithm, policy_kwargs=dict(features_extractor_class=FrozenNorm)).learn(20)
    assert (model.actor.features_extractor.layers[1].running_mean == 0).all()
    model.policy.set_training_mode(True)
    assert model.actor.features_extractor.layers[2].training and not model.actor.features_extractor.layers[1].training


ACTIVATIONS: dict[str, Any] = {
    "in place": partial(nn.ReLU, inplace=True),
    "with weights": nn.PReLU,
    "random": nn.RReLU,
    "dropout": partial(nn.Dropout, 0.2),
    "of all units": partial(nn.Softmax, dim=-1),
    "none": nn.Identity,
}


class OwnOptimizer(th.optim.Optimizer):
    """Of a user: positional arguments, nothing fused."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, dict(lr=lr))

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


OPTIMIZERS_OF_USERS: dict[str, dict[str, Any]] = {
    "SGD": dict(optimizer_class=th.optim.SGD, optimizer_kwargs=dict(momentum=0.9)),
    "AMSGrad": dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(amsgrad=True)),
    "NAdam": dict(optimizer_class=th.optim.NAdam),
    "of a user": dict(optimizer_class=OwnOptimizer),
    "partial": dict(optimizer_class=partial(th.optim.Adam, betas=(0.5, 0.9))),
}


@pytest.mark.parametrize("policy_kwargs", [dict(activation_fn=one) for one in ACTIVATIONS.values()], ids=list(ACTIVATIONS))
def test_activations(algorithm: Algorithm, policy_kwargs: dict[str, Any]) -> None:
    _trains(algorithm, policy_kwargs)


@pytest.mark.parametrize("policy_kwargs", OPTIMIZERS_OF_USERS.values(), ids=list(OPTIMIZERS_OF_USERS))
def test_optimizers(algorithm: Algorithm, policy_kwargs: dict[str, Any]) -> None:
    _trains(algorithm, policy_kwargs)


def _trains(algorithm: Algorithm, policy_kwargs: dict[str, Any]) -> None:
    """Every trained network moves, and acts."""
    model = make_model(algorithm, policy_kwargs=policy_kwargs, seed=0).learn(10)
    layers = [model.actor.network.input_layer, model.critic.q_networks[0].input_layer]
    before = [layer.weight.clone() for layer in layers]
    model.learn(10, reset_num_timesteps=False)
    assert not any(th.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    assert np.isfinite(model.predict(observations_for(model), deterministic=True)[0]).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantized_policy_acts_nearly_the_same(algorithm: Algorithm) -> None:
    """Eight bits for weights and activations: the actor's actions stay close for the same noise."""
    model = make_model(algorithm, seed=0).learn(20)
    observations = observations_for(model, 50)
    quantized = th.ao.quantization.quantize_dynamic(copy.deepcopy(model.policy))
    assert any("quantized" in type(module).__module__ for module in quantized.modules())
    actions = sample_of(model.policy, observations)
    difference = np.abs(sample_of(quantized, observations) - actions)
    # Those at a bound may stay there
    assert 0 < np.median(difference[np.abs(actions) < 1]) < 0.05
    for deterministic in (False, True):
        actions, _ = quantized.predict(observations, deterministic=deterministic)
        assert np.isfinite(actions).all() and np.abs(actions).max() <= 1


def test_a_part_may_be_frozen(algorithm: Algorithm) -> None:
    model = make_model(algorithm, policy_kwargs=dict(features_extractor_class=SmallExtractor), seed=0).learn(12)
    extractor, network = model.actor.features_extractor.requires_grad_(False), model.actor.network
    before = extractor.layers[0].weight.clone(), network.input_layer.weight.clone()
    extractor.zero_grad(set_to_none=True)
    model.learn(10, reset_num_timesteps=False)
    assert th.equal(before[0], extractor.layers[0].weight) and not th.equal(before[1], network.input_layer.weight)


# Callbacks, logging, evaluation


def test_callbacks(algorithm: Algorithm, tmp_path: Path) -> None:
    evaluation = EvalCallback(
        Monitor(RandomEnv()),
        eval_freq=20,
        n_eval_episodes=2,
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        verbose=0,
    )
    checkpoints = CheckpointCallback(save_freq=20, save_path=str(tmp_path), save_replay_buffer=True)
    make_model(algorithm).learn(40, callback=CallbackList([evaluation, checkpoints]))
    for name in ("best_model.zip", "evaluations.npz", "rl_model_20_steps.zip", "rl_model_replay_buffer_40_steps.pkl"):
        assert (tmp_path / name).exists()
    algorithm.load(tmp_path / "best_model").predict(np.zeros(3, np.float32), deterministic=True)


def test_training_stops_early(algorithm: Algorithm) -> None:
    model = make_model(algorithm).learn(1000, callback=StopTrainingOnMaxEpisodes(3))
    assert model.num_timesteps == 21
    stop = EvalCallback(
        Monitor(RandomEnv()), eval_freq=10, callback_on_new_best=StopTrainingOnRewardThreshold(-1e9), verbose=0, warn=False
    )
    assert make_model(algorithm).learn(1000, callback=stop).num_timesteps == 10


def test_progress_bar(algorithm: Algorithm) -> None:
    make_model(algorithm).learn(20, progress_bar=True)


def test_tensorboard(algorithm: Algorithm, tmp_path: Path) -> None:
    make_model(algorithm, tensorboard_log=str(tmp_path)).learn(40, log_interval=1)
    events = EventAccumulator(str(tmp_path / f"{algorithm.__name__}_1")).Reload()
    logged = {tag.removeprefix("train/") for tag in events.Tags()["scalars"] if tag.startswith("train/")}
    assert logged == METRICS[algorithm] - {"n_updates"}


@pytest.mark.parametrize("n_envs, gradient_steps, expected", [(1, 1, 1.0), (3, -1, 1.0), (3, 6, 2.0), (1, 2, 2.0)])
def test_logged_quantities(algorithm: Algorithm, n_envs: int, gradient_steps: int, expected: float) -> None:
    model = make_model(algorithm, DummyVecEnv([RandomEnv] * n_envs), gradient_steps=gradient_steps)
    model.set_logger(configure(None, []))
    model.learn(30, log_interval=None)
    logged = {name.removeprefix("train/"): value for name, value in model.logger.name_to_value.items() if "train/" in name}
    assert set(logged) == METRICS[algorithm]
    assert all(np.isfinite(value) for value in logged.values())
    assert logged["updates_per_step"] == expected
    assert 1 <= logged["ess_gaussian"] <= (4 if algorithm is MFPO else 5)
    if algorithm is MFPO:
        assert 1 <= logged["ess_policy"] <= 3
        assert 0 <= logged["policy_proposal_weight"] <= 1
    assert 0 <= logged["clipped_target_mass"] <= 1


def test_evaluate_policy(algorithm: Algorithm) -> None:
    returns, lengths = evaluate_policy(
        make_model(algorithm), Monitor(RandomEnv()), n_eval_episodes=3, return_episode_rewards=True
    )
    assert lengths == [7, 7, 7]
    assert np.isfinite(returns).all()


# Variants, by arguments alone


SHARED_VARIANTS: list[dict[str, Any]] = [
    dict(policy_kwargs=dict(critic_type="scalar")),
    dict(policy_kwargs=dict(critic_type="scalar"), critic_reduction="mean"),
    dict(critic_reduction="mean"),
    dict(policy_kwargs=dict(n_action_candidates=1)),
    dict(policy_kwargs=dict(sampling_steps=5)),
    dict(equal_time_share=0.0),
    dict(equal_time_share=1.0),
    dict(intervals="any", uniform_time_share=0.0),
    dict(intervals="any", uniform_time_share=1.0),
    dict(policy_kwargs=dict(action_fourier_dim=0)),
    dict(policy_kwargs=dict(sampling_power=1.0)),
    dict(policy_kwargs=dict(n_critics=1)),
    dict(policy_kwargs=dict(n_critics=4)),
    dict(policy_kwargs=dict(layer_norm=False)),
]
VARIANTS: dict[Algorithm, list[dict[str, Any]]] = {
    MFPO: [
        dict(policy_kwargs=dict(actor_type="flow_matching")),
        dict(policy_kwargs=dict(divergence_type="flow_matching")),
        dict(policy_kwargs=dict(divergence_type="exact")),
        MFPO.PAPER,
        dict(n_policy_samples=0),
        dict(n_local_samples=0),
        dict(n_policy_samples=5, n_gaussian_samples=0, n_local_samples=0),
        dict(ent_coef_rate=0.5),
        dict(actor_tau=1.0),
        dict(ent_coef=0.3),
        dict(n_probes=4),
    ],
    SOM: [
        dict(path="vp"),
        dict(score_estimator="gradient"),
        dict(score_norm=3.0),
        dict(adaptive_loss=True),
        dict(normalize_q=False),
        dict(inverse_temperature=100.0),
        dict(n_samples=1),
        dict(path="vp", score_estimator="gradient", score_norm=5.0, adaptive_loss=True),
    ],
}


@pytest.mark.parametrize(
    "algorithm, kwargs",
    [(algorithm, kwargs) for algorithm, own in VARIANTS.items() for kwargs in own + SHARED_VARIANTS],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_variants_train_save_and_load(algorithm: Algorithm, tmp_path: Path, kwargs: dict[str, Any]) -> None:
    model = make_model(algorithm, seed=0, **kwargs).learn(30)
    assert all(th.isfinite(p).all() for p in model.policy.parameters())
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    assert all(getattr(loaded, name) == value for name, value in kwargs.items() if name != "policy_kwargs")
    observations = observations_for(model)
    expected, _ = model.predict(observations, deterministic=True)
    assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)
    assert_equal(state_of(model), state_of(loaded))


def test_narrow_start_of_the_values(algorithm: Algorithm) -> None:
    """All values are 0 at first, whatever the state and the action; they differ, and move, once something was learned."""
    model = make_model(algorithm, policy_kwargs=dict(value_init="narrow", v_min=-100, v_max=100))
    observations, actions = th.randn(50, 3), th.rand(50, 2) * 2 - 1
    with th.no_grad():
        before = th.stack(model.policy.critic(observations, actions))
    assert before.abs().max() < 1e-4
    model.learn(80)
    with th.no_grad():
        after = th.stack(model.policy.critic(observations, actions))
    assert after.std(dim=1).min() > 1e-3


def test_scalar_critic_regresses_on_the_soft_value(algorithm: Algorithm) -> None:
    """One terminal transition, many steps: both critics learn its reward."""
    model = make_model(
        algorithm,
        RandomEnv(episode_length=1, terminates=True),
        policy_kwargs=dict(critic_type="scalar"),
        learning_rate=1e-2,
        seed=0,
    )
    model.learn(10)
    batch = model.replay_buffer.sample(8)
    for _ in range(300):
        model._gradient_step(batch)
    predicted = th.cat(model.critic(batch.observations, batch.actions), dim=1)
    assert th.allclose(predicted, batch.rewards.expand(8, 2), atol=0.1)


def test_flatten_extractor_is_the_default(algorithm: Algorithm) -> None:
    assert isinstance(make_model(algorithm).actor.features_extractor, FlattenExtractor)


def test_gym_id_string(algorithm: Algorithm) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = algorithm(
            "MlpPolicy",
            "Pendulum-v1",
            buffer_size=100,
            policy_kwargs=SMALL_POLICY,
            learning_starts=5,
            batch_size=4,
        )
    assert isinstance(model.get_env().envs[0].unwrapped, gym.Env)
    model.learn(8)
