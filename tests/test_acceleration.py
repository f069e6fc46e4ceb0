"""The fast gradient step does what the plain one does: exact savings, compiled, without waiting."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from plain import PlainMFPO
from speed import CountOperators, path_of_a_gpu

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.nets import layers
from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm
from tests.helpers import ALGORITHMS, DEVICES, SMALL, SMALL_POLICY, Algorithm, RandomEnv, make_model


def weights(model: MeanFlowAlgorithm) -> th.Tensor:
    """All weights in double precision on the CPU, and the logarithm of a temperature."""
    temperature = [model.log_ent_coef] if isinstance(model, MFPO) else []
    values = [value.detach().flatten().cpu() for value in (*model.policy.parameters(), *temperature)]
    return th.cat(values).double()


def train(model: MeanFlowAlgorithm, steps: int, seed: int = 0, batch_size: int = 16) -> None:
    """Gradient steps with given batches and noise."""
    np.random.seed(seed)
    th.manual_seed(seed)
    model.train(steps, batch_size=batch_size)


def relative_difference(first: MeanFlowAlgorithm, second: MeanFlowAlgorithm, start: th.Tensor) -> float:
    """Of what training has changed since the start."""
    return ((weights(first) - weights(second)).norm() / (weights(second) - start).norm()).item()


# Exact savings


@pytest.mark.parametrize("reduction", ["min", "mean"])
@pytest.mark.parametrize("sizes", ["small", "many rows"])
def test_ten_steps_are_those_of_the_plain_formulation(sizes: str, reduction: str) -> None:
    """
    Same batches, same randomness, the paper's settings: losses and weights agree up to rounding, which ten Adam steps amplify.
    With many rows all fast paths are taken (chunks, the other form of GELU).
    """
    kwargs: dict[str, Any] = {**SMALL[MFPO], **MFPO.PAPER, **dict(seed=0, critic_reduction=reduction, learning_starts=100)}
    if sizes == "small":
        kwargs |= dict(n_policy_samples=3, n_gaussian_samples=4)
    many = dict(net_arch=[64, 64, 64], n_atoms=101) if sizes == "many rows" else {}
    kwargs["policy_kwargs"] = {**SMALL_POLICY, **MFPO.PAPER["policy_kwargs"], "net_arch": SMALL_POLICY["net_arch"], **many}
    models = [algorithm("MlpPolicy", RandomEnv(), **kwargs).learn(100) for algorithm in (MFPO, PlainMFPO)]
    batch_size = 64
    assert batch_size * models[0].n_gaussian_samples > layers.CACHED_ROWS or sizes == "small"
    start = weights(models[0])
    assert th.equal(start, weights(models[1]))
    for step in range(10):
        batch = models[0].replay_buffer.sample(batch_size)
        draws = models[0]._draw(batch_size)
        shipped, plain = (model._update(batch, draws) for model in models)
        for name, value in plain.items():
            assert shipped[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-4), (step, name)
    difference = relative_difference(*models, start)
    print(f"relative difference of ten updates {difference:.1e}")
    assert difference < 1e-3


@pytest.mark.parametrize(
    "algorithm, kwargs, bound",
    [(MFPO, MFPO.PAPER, 800), (MFPO, {}, 1050), (SOM, {}, 800)],
    ids=["MFPO, paper", "MFPO", "SOM"],
)
def test_a_step_on_a_gpu_has_few_operators_and_never_waits(algorithm: Algorithm, kwargs: dict[str, Any], bound: int) -> None:
    """Counted on the path that a GPU takes: nothing is cut into chunks, losses are not looked at."""
    policy_kwargs = {**kwargs.get("policy_kwargs", {}), "net_arch": [16, 16, 16]}
    model = make_model(algorithm, **{**kwargs, "policy_kwargs": policy_kwargs}).learn(20)
    with path_of_a_gpu(), CountOperators() as counter:
        model.train(1, batch_size=8)
    print(len(counter.names))
    assert len(counter.names) <= bound
    # A number that is read makes the CPU wait: here that is one list of numbers, for the log
    assert counter.names.count("aten._local_scalar_dense.default") == 0


def test_default_optimizers_are_fused(algorithm: Algorithm) -> None:
    model = make_model(algorithm)
    assert all(group["fused"] for optimizer in model._optimizers() for group in optimizer.param_groups)
    chosen = make_model(algorithm, policy_kwargs=dict(optimizer_kwargs=dict(foreach=True)))
    assert chosen.actor.optimizer.param_groups[0]["foreach"] and not chosen.actor.optimizer.param_groups[0]["fused"]
    make_model(algorithm, policy_kwargs=dict(optimizer_class=th.optim.RMSprop)).learn(20)


# Losses that are looked at late


NETWORKS: dict[Algorithm, list[str]] = {MFPO: ["critic", "actor", "divergence", "temperature"], SOM: ["critic", "actor"]}


@pytest.mark.parametrize("algorithm, network", [(algorithm, name) for algorithm, names in NETWORKS.items() for name in names])
def test_on_other_devices_a_broken_loss_skips_all_later_steps(
    algorithm: Algorithm, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of five steps goes wrong: `train` ends with an error that says so, and no trained weight has moved since."""
    monkeypatch.setattr(algorithm, "_looks_at_losses_late", lambda self, optimizer: True)
    model = make_model(algorithm, seed=0).learn(20)
    losses, descend, names = [], model._descend, NETWORKS[algorithm]
    before: list[th.Tensor] = []

    def trained() -> th.Tensor:
        parameters = [p for optimizer in model._optimizers() for group in optimizer.param_groups for p in group["params"]]
        return th.cat([parameter.detach().flatten() for parameter in parameters])

    def broken(name: str, loss: th.Tensor, optimizer: th.optim.Optimizer) -> th.Tensor:
        losses.append(loss)
        if len(losses) == 2 * len(names) + names.index(network) + 1:
            before.append(trained())
            with th.no_grad():
                loss.mul_(np.nan)
        return descend(name, loss, optimizer)

    monkeypatch.setattr(model, "_descend", broken)
    name = {"temperature": "ent_coef"}.get(network, network)
    with pytest.raises(ValueError, match=rf"`{name}_loss` is nan at gradient step 13 \(environment step 20\)"):
        model.train(5, batch_size=8)
    assert len(losses) == 5 * len(names)
    assert th.equal(trained(), before[0]) and th.isfinite(before[0]).all()
    # The next call trains again
    monkeypatch.setattr(model, "_descend", descend)
    model.train(1, batch_size=8)
    assert not th.equal(trained(), before[0])


# Compiled and captured


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def pair(request: pytest.FixtureRequest, device: str) -> tuple[Any, Any]:
    """The same small model, eager and compiled; the latter has done some steps."""
    kwargs: dict[str, Any] = dict(seed=0, batch_size=16, device=device, policy_kwargs=dict(net_arch=[16]))
    models = [make_model(request.param, **kwargs, compile_step=compile_step).learn(60) for compile_step in (False, True)]
    models[1].replay_buffer = models[0].replay_buffer
    return models[0], models[1]


@pytest.mark.parametrize("change", ["nothing", "batch size", "sampling steps", "policy delay"])
def test_compiled_steps_are_the_eager_ones(pair: tuple[Any, Any], change: str) -> None:
    """Ten updates, also after a change that needs other kernels or graphs."""
    eager, compiled = pair
    sampling_steps = eager.policy.sampling_steps
    for model in pair:
        model.policy.sampling_steps = 3 if change == "sampling steps" else sampling_steps
        model.policy_delay = 2 if change == "policy delay" else 1
    batch_size = 24 if change == "batch size" else 16
    # SB3's parameters of optimizers are not copies
    compiled.set_parameters(copy.deepcopy(eager.get_parameters()))
    if isinstance(eager, MFPO):
        compiled.log_ent_coef.data.copy_(eager.log_ent_coef)
    assert th.equal(weights(eager), weights(compiled))
    start = weights(eager)
    for step in range(10):
        for model in pair:
            train(model, 1, seed=step, batch_size=batch_size)
    assert "_compiled" in vars(compiled) and "_compiled" not in vars(eager)
    difference = relative_difference(compiled, eager, start)
    print(f"{change}: relative difference of ten updates {difference:.1e}")
    assert difference < 1e-4
    for model in pair:
        model.policy.sampling_steps, model.policy_delay = sampling_steps, 1


def test_compiled_steps_draw_fresh_noise(pair: tuple[Any, Any]) -> None:
    """The same batch again and again: losses differ, and the actions stay spread out."""
    _, compiled = pair
    batch = compiled.replay_buffer.sample(16)
    th.manual_seed(0)
    losses = [compiled._gradient_step(batch)["actor_loss"].item() for _ in range(20)]
    assert len(set(losses)) == 20
    observations = np.zeros((256, 3), np.float32)
    spread = compiled.predict(observations)[0].std(axis=0)
    print(f"spread of the actions {spread}")
    assert (spread > 0.2).all()


def test_compiled_steps_follow_the_learning_rate(pair: tuple[Any, Any]) -> None:
    _, compiled = pair
    rate, start = compiled.lr_schedule, weights(compiled)
    compiled.lr_schedule = lambda progress: 0.0
    # The targets follow whatever the learning rate is
    compiled.tau, compiled.actor_tau, taus = 0.0, 0.0, (compiled.tau, compiled.actor_tau)
    train(compiled, 5)
    assert th.equal(weights(compiled), start)
    compiled.lr_schedule, (compiled.tau, compiled.actor_tau) = rate, taus
    train(compiled, 5)
    assert not th.equal(weights(compiled), start)


def test_compiled_models_are_saved_and_copied(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """Eager from compiled and compiled from eager, by file, copy and pickle; the names of the parameters are the same."""
    eager, compiled = pair
    assert list(compiled.policy.state_dict()) == list(eager.policy.state_dict())
    for model in pair:
        model.save(tmp_path / "model")
        for compile_step in (False, True):
            loaded = type(model).load(tmp_path / "model", device="cpu", compile_step=compile_step)
            assert loaded.compile_step == compile_step
            assert th.equal(weights(loaded), weights(model))
    for copied in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert copied.compile_step and "_compiled" not in vars(copied)
        assert th.equal(weights(copied), weights(compiled))
    # A model from a checkpoint of the compiled one trains on as the original does
    loaded = type(compiled).load(tmp_path / "model", env=RandomEnv(), device=compiled.device, compile_step=False)
    loaded.replay_buffer = compiled.replay_buffer
    loaded._logger = compiled.logger
    start = weights(loaded)
    for model in (loaded, compiled):
        train(model, 1)
    assert relative_difference(loaded, compiled, start) < 1e-4
