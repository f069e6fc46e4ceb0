"""What docs/normalization.md says: its lines are run, and then what they are said to do is looked at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch as th

MANUAL = (Path(__file__).parent.parent / "docs" / "normalization.md").read_text()
TRAIN, SAVE_AND_LOAD, ACT, EXPORT = re.findall(r"```python\n(.*?)```", MANUAL, flags=re.DOTALL)


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    names: dict[str, Any] = {}
    code = TRAIN.replace("10_000", "450").replace("eval_freq=1000", "eval_freq=200, n_eval_episodes=1")
    exec(code.replace('"MlpPolicy", env', '"MlpPolicy", env, seed=0'), names)
    return names


def test_everything_is_stored_as_the_environment_returns_it(trained: dict[str, Any]) -> None:
    buffer, scale = trained["model"].replay_buffer, trained["model"].return_scale
    # A cosine, a sine, and a speed of up to 8; rewards of down to -16
    assert np.allclose(np.linalg.norm(buffer.observations[:450, 0, :2], axis=-1), 1, atol=1e-5)
    assert buffer.rewards[:450].min() < -5
    returns, total = [], 0.0
    for reward, done in zip(buffer.rewards[:450, 0], buffer.dones[:450, 0], strict=True):
        returns.append(total := float(reward) + 0.99 * total)
        total *= 1 - done
    assert scale.value == pytest.approx(np.std(returns), rel=1e-3)


def test_a_gradient_step_sees_the_statistics_of_now(trained: dict[str, Any]) -> None:
    env, model = trained["env"], trained["model"]
    samples = model.replay_buffer._get_samples(np.arange(450), env=env)
    raw = model.replay_buffer.observations[:450, 0]
    assert np.allclose(samples.observations, (raw - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + 1e-8), atol=1e-4)
    assert th.allclose(samples.observations.std(dim=0), th.ones(3), atol=0.05)
    assert np.array_equal(samples.rewards.numpy(), model.replay_buffer.rewards[:450])


def test_an_evaluation_uses_the_statistics_and_changes_nothing(trained: dict[str, Any]) -> None:
    """The last evaluation was at step 400: its statistics are of 400 steps and the first reset."""
    moments, evaluated = trained["env"].obs_rms, trained["evaluation_env"].obs_rms
    assert round(evaluated.count) == 401 and round(moments.count) == 451
    assert trained["model"].return_scale.moments.count == 450


def test_saved_loaded_and_exported(trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = dict(trained)
    observation, _ = gym.make("Pendulum-v1").reset(seed=0)
    expected, _ = names["model"].predict(names["env"].normalize_obs(observation), deterministic=True)
    for code in (SAVE_AND_LOAD, ACT, EXPORT):
        exec(code, names)
    assert names["model"] is not trained["model"] and names["env"] is not trained["env"]
    assert np.array_equal(names["action"], expected)
    assert names["model"].return_scale.value == trained["model"].return_scale.value
    file = onnxruntime.InferenceSession("policy.onnx")
    assert np.allclose(file.run(["action"], {"observation": observation[None]})[0][0], expected, atol=1e-5)

    names["model"].get_env().reset()
    names["model"].get_env().step(np.zeros((1, 1), np.float32))
    assert names["env"].obs_rms.count == trained["env"].obs_rms.count
