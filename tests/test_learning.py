"""The algorithms learn a control task: each part of them is needed to pass."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.maths.entropy import nearest_neighbour_entropy
from tests.helpers import Algorithm


def learn_to_reach(algorithm: Algorithm, compile_step: bool = False) -> tuple[Any, float, float]:
    """
    Reacher: bring a finger to a target, 50 steps. Random actions return about -43, standing still about -11.

    :return: The model; mean returns of single samples and of the best of ten
    """
    model = algorithm(
        "MlpPolicy",
        "Reacher-v5",
        learning_rate=1e-3,
        learning_starts=500,
        batch_size=128,
        tau=0.02,
        gamma=0.9,
        policy_kwargs=dict(net_arch=[64, 64]),
        buffer_size=5000,
        seed=0,
        device="cpu",
        compile_step=compile_step,
    ).learn(3500)
    env = make_vec_env("Reacher-v5", seed=1)
    th.manual_seed(0)
    single_sample, _ = evaluate_policy(model, env, n_eval_episodes=20, deterministic=False)
    best_of_ten, _ = evaluate_policy(model, env, n_eval_episodes=20, deterministic=True)
    print(f"single sample {single_sample:.1f}, best of ten {best_of_ten:.1f}")
    return model, single_sample, best_of_ten  # type: ignore[return-value]


@pytest.mark.parametrize("compile_step", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["eager", "compiled"])
def test_mfpo_learns_to_reach(compile_step: bool) -> None:
    """
    A broken critic or actor leaves a single sample of the policy near random (best-of-N alone, with a good critic, would
    hide a broken actor). The temperature starts too high and must bring the entropy to its target, here that of many more
    samples than a gradient step has.
    """
    model, single_sample, best_of_ten = learn_to_reach(MFPO, compile_step)
    batch = model.replay_buffer.sample(256)
    with th.no_grad():
        features = model.actor_target.encode(batch.observations).unsqueeze(1)
        entropy = nearest_neighbour_entropy(model.actor_target.flow(features, th.randn(256, 200, 2))).mean().item()
    print(f"entropy {entropy:.2f}", model._temperature())

    assert single_sample > -15
    assert best_of_ten > -11
    assert np.isclose(entropy, model.target_entropy, atol=0.35)


@pytest.mark.nightly
def test_som_learns_to_reach() -> None:
    """With a frozen actor or critic, with scores that ignore the values or point away from them, a sample gets below -40."""
    _, single_sample, best_of_ten = learn_to_reach(SOM)
    assert single_sample > -15
    assert best_of_ten > -11


def test_the_defaults_learn_the_test_of_sb3(algorithm: Algorithm) -> None:
    """
    SB3's own for SAC: 400 steps of an environment that rewards the repetition of its observation. An ordinary run warns of
    nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = algorithm("MlpPolicy", DummyVecEnv([lambda: IdentityEnvBox(eps=0.5)]), seed=0, device="cpu").learn(400)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20, warn=False)
    assert mean > 90
