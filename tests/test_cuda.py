"""What only a CUDA device can show: that nothing waits for it, that steps are captured, that runs go on there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_mfpo import MFPO, RunCheckpointCallback
from tests.helpers import Algorithm, RandomEnv, make_model

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("compile_step", [False, True], ids=["eager", "captured"])
def test_a_gradient_step_never_waits_for_the_device(algorithm: Algorithm, compile_step: bool) -> None:
    """Four steps, of which one improves the policy; PyTorch raises an error at whatever makes the CPU wait."""
    model = make_model(algorithm, device="cuda", policy_delay=4, compile_step=compile_step).learn(20)
    # Compiled, warmed up and captured
    model.train(12, batch_size=8)
    batches = [model.replay_buffer.sample(8) for _ in range(4)]
    model.policy.set_training_mode(True)
    loss = th.ones((), device="cuda")
    th.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()
        metrics = [model._gradient_step(batch) for batch in batches]
    finally:
        th.cuda.set_sync_debug_mode("default")
    assert "actor_loss" in {name for one in metrics for name in one}
    assert all(th.isfinite(value).all() for one in metrics for value in one.values())


def test_a_compiled_step_is_captured(algorithm: Algorithm) -> None:
    def launches(compile_step: bool) -> dict[str, int]:
        model = make_model(algorithm, device="cuda", compile_step=compile_step).learn(20)
        model.train(12, batch_size=8)
        with th.profiler.profile() as profile:
            model.train(4, batch_size=8)
            th.cuda.synchronize()
        events = profile.key_averages()
        return {name: sum(event.count for event in events if name in event.key) for name in ("GraphLaunch", "LaunchKernel")}

    eager, captured = launches(False), launches(True)
    print(f"{eager} eager, {captured} captured")
    assert eager["GraphLaunch"] == 0 and captured["GraphLaunch"] >= 4
    assert captured["LaunchKernel"] < eager["LaunchKernel"] / 2


@pytest.mark.parametrize("compile_step", [False, True], ids=["eager", "captured"])
def test_a_run_goes_on_from_its_checkpoint(algorithm: Algorithm, tmp_path: Path, compile_step: bool) -> None:
    """Up to the order in which the device adds numbers."""
    kwargs: dict[str, Any] = dict(device="cuda", seed=0, compile_step=compile_step)
    whole = make_model(algorithm, **kwargs).learn(60)
    make_model(algorithm, **kwargs).learn(40, callback=RunCheckpointCallback(20, tmp_path))
    resumed = algorithm.resume(tmp_path, RandomEnv(), device="cuda").learn(60)
    assert (resumed.num_timesteps, resumed._n_updates, resumed.device.type) == (60, whole._n_updates, "cuda")
    observations = np.zeros((16, 3), np.float32)
    actions = [model.predict(observations, deterministic=True)[0] for model in (resumed, whole)]
    np.testing.assert_allclose(*actions, atol=1e-2)


def test_a_broken_loss_on_the_device_is_reported() -> None:
    model = make_model(MFPO, device="cuda", seed=0).learn(20)
    before = [parameter.clone() for parameter in model.actor.parameters()]
    with th.no_grad():
        next(model.critic.parameters()).fill_(th.nan)
    with pytest.raises(ValueError, match="`critic_loss` is nan at gradient step 11"):
        model.train(4, batch_size=8)
    assert all(th.equal(*pair) for pair in zip(before, model.actor.parameters(), strict=True))
