"""A policy is a PyTorch module like any other: what PyTorch allows with modules works, as with SAC."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from tests.helpers import Algorithm, RandomEnv, make_model

OBSERVATIONS = np.random.RandomState(0).uniform(-1, 1, (5, 3)).astype(np.float32)


def actions_of(policy: Any, deterministic: bool, observations: np.ndarray = OBSERVATIONS) -> np.ndarray:
    th.manual_seed(0)
    return policy.predict(observations, deterministic=deterministic)[0]


def double(module: nn.Module) -> dict[str, th.Tensor]:
    return {name: 2 * value.clone() for name, value in module.state_dict().items()}


# Weights that change in whatever way


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("way", ["load_state_dict", "assign", "data", "one number", "optimizer"])
def test_actions_follow_the_weights(algorithm: Algorithm, way: str, deterministic: bool) -> None:
    """A fresh copy knows nothing of what was predicted before."""
    policy = make_model(algorithm, seed=0).learn(20).policy
    before = actions_of(policy, deterministic)
    if way == "load_state_dict":
        policy.actor.load_state_dict(double(policy.actor))
    elif way == "assign":
        policy.actor.load_state_dict(double(policy.actor), assign=True)
    elif way == "data":
        for parameter in policy.actor.parameters():
            parameter.data = 2 * parameter.data
    elif way == "one number":
        policy.actor.network.time_embedding.mlp[-1].bias.data.numpy()[-1] += 3
    else:
        for parameter in policy.actor.parameters():
            parameter.grad = th.ones_like(parameter)
        policy.actor.optimizer.param_groups[0]["lr"] = 0.1
        policy.actor.optimizer.step()
    after = actions_of(policy, deterministic)
    assert not np.array_equal(after, before)
    assert np.array_equal(after, actions_of(copy.deepcopy(policy), deterministic))


def test_functional_call(algorithm: Algorithm) -> None:
    """It swaps the weights for one call."""
    policy, other = (make_model(algorithm, seed=seed).learn(20).policy for seed in (0, 1))
    observations = th.as_tensor(OBSERVATIONS)
    policy.set_training_mode(False)
    other.set_training_mode(False)
    with th.no_grad():
        before = policy(observations, deterministic=True)
        swapped = th.func.functional_call(policy, dict(other.named_parameters()), (observations,), {"deterministic": True})
        assert th.equal(swapped, other(observations, deterministic=True)) and not th.equal(swapped, before)
        assert th.equal(policy(observations, deterministic=True), before)


def test_inference_mode(algorithm: Algorithm, tmp_path: Path) -> None:
    """Loading and predicting within it leave models that go on to predict and to train."""
    model = make_model(algorithm, seed=0).learn(20)
    expected = actions_of(model.policy, True)
    with th.inference_mode():
        assert np.array_equal(actions_of(model.policy, True), expected)
    for parameter in model.policy.parameters():
        parameter.data.mul_(1.5)
    with th.inference_mode():
        inside = actions_of(model.policy, True)
    assert np.array_equal(actions_of(model.policy, True), inside) and not np.array_equal(inside, expected)
    model.learn(10, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    with th.inference_mode():
        loaded = algorithm.load(tmp_path / "model")
        # PyTorch multiplies tensors that were made within it by other kernels
        assert np.allclose(actions_of(loaded.policy, True), actions_of(model.policy, True), atol=1e-5)
    assert np.allclose(actions_of(loaded.policy, True), actions_of(model.policy, True), atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_tracing_serves_every_batch_size(algorithm: Algorithm, deterministic: bool) -> None:
    policy = make_model(algorithm, seed=0).learn(20).policy
    policy.set_training_mode(False)

    class Act(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.policy(observations, deterministic=deterministic)

    with th.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = th.jit.trace(Act(), th.as_tensor(OBSERVATIONS[:2]), check_trace=False)
        for n_rows in (1, 2, 5, 300):
            observations = th.as_tensor(np.resize(OBSERVATIONS, (n_rows, 3)))
            th.manual_seed(0)
            actions = traced(observations)
            th.manual_seed(0)
            assert actions.shape == (n_rows, 2)
            assert th.allclose(actions, policy(observations, deterministic=deterministic), atol=1e-5)


def test_export_serves_every_batch_size(algorithm: Algorithm) -> None:
    policy = make_model(algorithm, seed=0).learn(20).policy
    policy.set_training_mode(False)

    class Act(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.policy(observations, deterministic=True)

    with th.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = th.export.Dim("rows", min=1)
        program = th.export.export(Act(), (th.as_tensor(OBSERVATIONS),), dynamic_shapes=({0: rows},)).module()
        for n_rows in (2, 5, 300):
            observations = th.as_tensor(np.resize(OBSERVATIONS, (n_rows, 3)))
            assert th.allclose(program(observations), policy(observations, deterministic=True), atol=1e-5)


# Evaluation mode


class Extractor(BaseFeaturesExtractor):
    """Batch normalisation and dropout."""

    def __init__(self, observation_space: Any):
        super().__init__(observation_space, 8)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("part", ["policy", "actor.features_extractor", "critic_target", "critic"])
def test_predict_puts_every_part_into_evaluation_mode(algorithm: Algorithm, part: str, share: bool) -> None:
    policy_kwargs = dict(features_extractor_class=Extractor, share_features_extractor=share)
    model = make_model(algorithm, policy_kwargs=policy_kwargs, seed=0).learn(20)
    expected = actions_of(model.policy, True)
    module = model.policy if part == "policy" else model.policy.get_submodule(part)
    module.train()
    before = copy.deepcopy(model.policy.state_dict())
    assert all(np.array_equal(model.predict(OBSERVATIONS, deterministic=True)[0], expected) for _ in range(5))
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    assert not any(child.training for child in model.policy.critic_target.modules())


def test_target_critics_stay_in_evaluation_mode_while_training(algorithm: Algorithm) -> None:
    model = make_model(algorithm, policy_kwargs=dict(features_extractor_class=Extractor)).learn(20)
    model.policy.train()
    model.train(1, batch_size=8)
    assert not any(child.training for child in model.critic_target.modules())
    assert all(child.training for child in (*model.actor.modules(), *model.critic.modules()))


# Hooks


def leaves(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if not list(child.children())}


@pytest.mark.parametrize("deterministic", [False, True])
def test_hooks_of_every_layer_run_in_prediction(algorithm: Algorithm, deterministic: bool) -> None:
    model = make_model(algorithm, seed=0).learn(20)
    modules = {"": model.actor} | {name: child for name, child in model.actor.named_modules() if name}
    seen: set[str] = set()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    model.predict(OBSERVATIONS, deterministic=deterministic)
    assert seen == set(modules)


def test_hooks_of_every_layer_run_in_training(algorithm: Algorithm) -> None:
    model = make_model(algorithm, seed=0).learn(20)
    networks = {"actor": model.actor, "critic": model.critic, "critic_target": model.critic_target}
    if hasattr(model, "divergence"):
        networks["divergence"] = model.divergence
    modules = {f"{network}.{name}": leaf for network, whole in networks.items() for name, leaf in leaves(whole).items()}
    seen: set[str] = set()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    model.train(1, batch_size=8)
    assert seen == set(modules)


def test_global_hooks_see_every_layer(algorithm: Algorithm) -> None:
    model, seen = make_model(algorithm, seed=0).learn(20), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model.predict(OBSERVATIONS)
    finally:
        handle.remove()
    assert {id(leaf) for leaf in leaves(model.actor).values()} <= {id(module) for module in seen}


def test_a_hook_that_replaces_an_output_acts(algorithm: Algorithm) -> None:
    """Ablations: of the actor, of its first layer, of one within."""
    model = make_model(algorithm, seed=0).learn(20)
    network = model.actor.network.mlp
    expected = actions_of(model.policy, False)
    for module in (model.actor, network.input_layer, network.body[-1]):
        handle = module.register_forward_hook(lambda module, inputs, output: 0 * output)
        assert not np.array_equal(actions_of(model.policy, False), expected)
        handle.remove()
    assert np.array_equal(actions_of(model.policy, False), expected)


def test_a_pruned_layer_is_used_as_pruned(algorithm: Algorithm) -> None:
    """Also after it was trained on: what is pruned stays so, and the weights in use are those that were trained."""
    model = make_model(algorithm, seed=0).learn(20)
    layer = model.actor.network.mlp.input_layer
    prune.l1_unstructured(layer, "weight", amount=0.5)
    before = layer.weight_orig.detach().clone()
    model.learn(20, reset_num_timesteps=False)
    assert not th.equal(layer.weight_orig, before)
    actions = actions_of(model.policy, False)
    assert th.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    prune.remove(layer, "weight")
    assert np.allclose(actions_of(model.policy, False), actions, atol=1e-6)


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers(algorithm: Algorithm, kind: Any) -> None:
    """The reference is the same network with the weights that come out."""
    model = make_model(algorithm, seed=0).learn(20)
    layers = [model.actor.network.mlp.input_layer, model.actor.network.mlp.body[-1]]
    # Averages are taken of parameters by their order, as in SAC: targets get what critics get
    critics = [critic.q_networks[0].input_layer for critic in (model.critic, model.critic_target)]
    for layer in (*layers, *critics):
        kind(layer)
    for module, optimizer in ((model.actor, model.actor.optimizer), (model.critic, model.critic.optimizer)):
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        optimizer.add_param_group({"params": [new for new in module.parameters() if id(new) not in known]})
    before = layers[0].weight.detach().clone()
    model.learn(10, reset_num_timesteps=False)
    assert not th.equal(layers[0].weight, before)
    actions = actions_of(model.policy, False)
    for layer in (*layers, *critics):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert np.allclose(actions_of(model.policy, False), actions, atol=1e-5)


# Autocast


def test_autocast_leaves_nothing_behind(algorithm: Algorithm) -> None:
    policy = make_model(algorithm, seed=0).learn(20).policy
    for parameter in policy.parameters():
        parameter.data.mul_(1.01)
    clean = copy.deepcopy(policy)
    for deterministic in (False, True):
        with th.autocast("cpu", dtype=th.bfloat16):
            inside = actions_of(policy, deterministic)
        assert inside.dtype == np.float32 and np.isfinite(inside).all()
        assert np.array_equal(actions_of(policy, deterministic), actions_of(clean, deterministic))


def test_learning_under_autocast(algorithm: Algorithm) -> None:
    with th.autocast("cpu", dtype=th.bfloat16):
        model = make_model(algorithm, seed=0).learn(30)
    assert all(th.isfinite(parameter).all() and parameter.dtype == th.float32 for parameter in model.policy.parameters())


# Batches


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_empty_batch_gives_no_actions(algorithm: Algorithm, deterministic: bool) -> None:
    """As with SAC."""
    empty = np.empty((0, 3), np.float32)
    expected = SAC("MlpPolicy", RandomEnv(), buffer_size=10).predict(empty, deterministic=deterministic)[0]
    assert make_model(algorithm).predict(empty, deterministic=deterministic)[0].shape == expected.shape == (0, 2)
