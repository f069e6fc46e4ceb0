"""The bases without a flow: an actor that draws noise on the way, as a diffusion chain does, its policy and its algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mfpo.nets.actor import GenerativeActor
from sb3_mfpo.training.actor_critic import ActorCriticAlgorithm
from sb3_mfpo.training.policy import GenerativePolicy
from tests.helpers import RandomEnv


class Chain(GenerativeActor):
    """Two steps towards zero, each with a draw of its own."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.action_dim, self.noise_dim = self.noise_dim, 3 * self.noise_dim
        self.scale = th.nn.Linear(self.features_extractor.features_dim, 1)

    def act(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        action, *draws = noise.split(self.action_dim, dim=-1)
        for draw in draws:
            action = 0.5 * action + self.scale(features) * draw
        return action.clamp(-1, 1)


class ChainPolicy(GenerativePolicy):
    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box, lr_schedule: Any, **kwargs: Any):
        super().__init__(observation_space, action_space, **kwargs)
        self._build(lr_schedule)

    def make_actor(self, net_arch: Sequence[int]) -> Chain:
        return Chain(self.observation_space, self.action_space, self.make_features_extractor())

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | dict(lr_schedule=self._dummy_schedule)


class ChainActorCritic(ActorCriticAlgorithm):
    """The chain is followed by the gradient of its actions' values."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": ChainPolicy}
    policy_base = ChainPolicy

    def __init__(self, *args: Any, _init_setup_model: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if _init_setup_model:
            self._setup_model()

    def _draw(self, batch_size: int) -> th.Tensor:
        return th.randn(2, batch_size, self.actor.noise_dim)

    def _update(
        self, batch: ReplayBufferSamples, draws: th.Tensor, update_target: bool = True, improve_policy: bool = True
    ) -> dict[str, th.Tensor]:
        with th.no_grad():
            next_actions = self.policy.act(self.actor_target.encode(batch.next_observations), draws[0])
        loss, metrics = self._td_loss(batch, next_actions, entropy_bonus=th.zeros(()))
        metrics["critic_loss"] = self._descend("critic_loss", loss, self.critic.optimizer)
        if update_target:
            self._update_target(self.critic_target, self.critic, self.tau)
        if improve_policy:
            actions = self.actor.act(self.actor.encode(batch.observations), draws[1])
            loss = -self.critic.q_values(self.critic.encode(batch.observations), actions).mean()
            metrics["actor_loss"] = self._descend("actor_loss", loss, self.actor.optimizer)
            self._update_target(self.actor_target, self.actor, self.actor_tau)
        return metrics


def test_an_algorithm_without_a_flow_learns_and_comes_back(tmp_path: Path) -> None:
    """Rewards ask for small actions. Nothing of mean flows is there, also not among what is saved."""
    policy_kwargs = dict(net_arch=[32], critic_type="scalar")
    kwargs: dict[str, Any] = dict(learning_starts=50, gamma=0.0, buffer_size=1000, policy_kwargs=policy_kwargs, seed=0)
    model = ChainActorCritic("MlpPolicy", RandomEnv(), learning_rate=1e-2, **kwargs)
    observations = th.rand(200, 3) * 2 - 1
    before = model.actor.scale(observations).abs().mean().item()
    model.learn(400)
    after = model.actor.scale(observations).abs().mean().item()
    print(f"noise on the way {before:.2f}, then {after:.2f}")
    assert after < 0.3 * before
    assert not [name for name in vars(model) if "time_mean" in name or "equal_time" in name]
    model.save(tmp_path / "model")
    loaded = ChainActorCritic.load(tmp_path / "model")
    expected, _ = model.predict(observations.numpy(), deterministic=True)
    assert np.array_equal(loaded.predict(observations.numpy(), deterministic=True)[0], expected)


@pytest.mark.parametrize("candidates", [1, 6])
def test_an_actor_may_use_more_noise_than_an_action_has_coordinates(tmp_path: Path, candidates: int) -> None:
    """Its policy has candidates that are as long, acts by the best of them, and comes back from a file."""
    action_space = spaces.Box(-3, 3, (2,), np.float32)
    policy = ChainPolicy(
        spaces.Box(-1, 1, (4,), np.float32),
        action_space,
        lr_schedule=lambda _: 1e-3,
        net_arch=[8],
        n_action_candidates=candidates,
    )
    assert policy.candidate_noise.shape == (candidates, 6)
    observations = np.random.RandomState(0).randn(5, 4).astype(np.float32)
    policy.save(str(tmp_path / "policy"))
    loaded = ChainPolicy.load(str(tmp_path / "policy"), device="cpu")
    best, _ = policy.predict(observations, deterministic=True)
    assert np.array_equal(loaded.predict(observations, deterministic=True)[0], best)
    with th.no_grad():
        features = th.as_tensor(observations)
        actions = [policy.act(features, noise.expand(5, 6)) for noise in policy.candidate_noise]
        values = th.stack([th.cat(policy.critic_target(features, action), dim=1).amin(dim=1) for action in actions])
    expected = th.stack(actions)[values.argmax(dim=0), th.arange(5)]
    assert np.allclose(best, 3 * expected.numpy(), atol=1e-5)
    assert policy.predict(observations)[0].shape == (5, 2)
    policy.export(tmp_path / "policy.pt2", deterministic=False)
    with th.no_grad():
        expected = 3 * policy.act(features, noise := th.randn(5, 6))
    assert th.allclose(th.export.load(tmp_path / "policy.pt2").module()(features, noise), expected, atol=1e-5)
