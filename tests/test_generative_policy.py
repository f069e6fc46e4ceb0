"""The policy base without a flow: an actor that draws noise on the way, as a diffusion chain does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mfpo.nets.actor import GenerativeActor
from sb3_mfpo.training.policy import GenerativePolicy


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
    def __init__(self, *args: Any, lr_schedule: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._build(lr_schedule)

    def make_actor(self, net_arch: Sequence[int]) -> Chain:
        return Chain(self.observation_space, self.action_space, self.make_features_extractor())

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | dict(lr_schedule=self._dummy_schedule)


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
