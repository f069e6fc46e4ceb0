"""
The shipped functions and networks against numbers recorded inside the authors' implementation.

``data/golden.npz`` holds the numbers, ``data/golden.md`` says what they are and how close they must be met. The environment
variable SB3_MFPO_GOLDEN names another file of the same format to run on instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_mfpo import MFPO
from sb3_mfpo.maths import boltzmann, categorical, mean_flow, paths
from sb3_mfpo.maths.categorical import reduce_values
from sb3_mfpo.maths.divergence import exact_divergence, hutchinson_divergence
from sb3_mfpo.maths.paths import linear_path
from sb3_mfpo.mfpo import mfpo as mfpo_module
from sb3_mfpo.mfpo.mfpo import GradientStepDraws, MeanFlowDraws
from sb3_mfpo.nets.flow import MeanFlowMLP, PairLinear, embed_grid
from sb3_mfpo.nets.layers import MultiInputMLP
from tests.helpers import RandomEnv

DATA = Path(__file__).parent / "data"
FILE = Path(os.environ.get("SB3_MFPO_GOLDEN", DATA / "golden.npz"))
RAW = dict(np.load(FILE))
GOLDEN = {name: th.as_tensor(value) for name, value in RAW.items()}
PARAMETERS = ("actor/", "adn/", "critic_1/", "critic_2/", "target_critic_1/", "target_critic_2/")
REDUCTIONS = {"cdq": "min", "mean": "mean"}


def read_tolerances() -> dict[str, float]:
    """Largest absolute difference allowed for each output, from the tables of golden.md."""
    rows = re.findall(r"^\| `([^`]+)` \|.*\| ([^|]+) \|$", (DATA / "golden.md").read_text(), flags=re.MULTILINE)
    outputs = {name: kind for name, kind in rows if kind != "input" and not name.startswith((*PARAMETERS, "meta/"))}
    return {name: 0.0 if kind == "exact" else float(kind) for name, kind in outputs.items()}


TOLERANCES = read_tolerances()


def meta(name: str) -> Any:
    return RAW[f"meta/{name}"].item()


# From Flax's names and layout to ours


def flax_parameters(module: nn.Module, gradients: bool = False) -> dict[str, th.Tensor]:
    """Parameters of one of our networks, or their gradients, as views with the names and the layout of the golden file."""

    def of(parameter: nn.Parameter) -> th.Tensor:
        return parameter.grad if gradients else parameter.data

    named = {}
    assert isinstance(module, MultiInputMLP)
    layers = [module.input_layer, *module.body]
    dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
    norms = [layer for layer in layers if isinstance(layer, nn.LayerNorm)]
    for i, layer in enumerate(dense):
        # The output layer of a critic has a name of its own
        prefix = "head" if i == len(dense) - 1 and not isinstance(module, MeanFlowMLP) else f"mlp/dense{i}"
        named |= {f"{prefix}/kernel": of(layer.weight).T, f"{prefix}/bias": of(layer.bias)}
    for i, norm in enumerate(norms):
        named |= {f"mlp/layernorm{i}/scale": of(norm.weight), f"mlp/layernorm{i}/bias": of(norm.bias)}
    if isinstance(module, MeanFlowMLP):
        for k, name in enumerate(("t_embedder", "h_embedder")):
            named[f"{name}/fourier_kernel"] = of(module.embed.frequencies)[k].view(-1, 1)
            for i, layer in enumerate(layer for layer in module.embed.mlp if isinstance(layer, PairLinear)):
                named |= {f"{name}/dense{i}/kernel": of(layer.weight)[k], f"{name}/dense{i}/bias": of(layer.bias)[k, 0]}
    return named


def networks(model: MFPO) -> dict[str, nn.Module]:
    return {
        "actor": model.actor.network,
        "adn": model.divergence,
        **{f"critic_{i + 1}": model.critic.q_networks[i] for i in range(2)},
        **{f"target_critic_{i + 1}": model.critic_target.q_networks[i] for i in range(2)},
    }


def golden_model(n_equal: int = 0) -> MFPO:
    """MFPO with the paper's settings at the sizes of the golden file, holding its parameters."""
    env = RandomEnv(
        spaces.Box(-np.inf, np.inf, (meta("obs_dim"),), np.float32), spaces.Box(-1, 1, (meta("act_dim"),), np.float32)
    )
    settings = dict(
        learning_rate=meta("lr"),
        buffer_size=10,
        batch_size=meta("batch"),
        tau=meta("tau"),
        gamma=meta("discount"),
        ent_coef=f"auto_{meta('temperature')!r}",
        target_entropy=meta("target_entropy"),
        device="cpu",
        n_policy_samples=meta("K1"),
        n_gaussian_samples=meta("K2"),
        n_probes=meta("N"),
        equal_time_share=n_equal / meta("batch"),
        policy_kwargs=dict(
            MFPO.PAPER["policy_kwargs"],
            net_arch=[meta("hidden")] * meta("n_hidden"),
            time_fourier_dim=meta("time_dim"),
            time_embedding_dim=meta("embed_hidden"),
            sampling_steps=meta("T"),
            n_atoms=meta("atoms"),
            v_min=meta("v_min"),
            v_max=meta("v_max"),
        ),
    )
    model = MFPO("MlpPolicy", env, **{**MFPO.PAPER, **settings})
    with th.no_grad():
        for prefix, network in networks(model).items():
            for name, parameter in flax_parameters(network).items():
                parameter.copy_(GOLDEN[f"{prefix}/{name}"])
    model.actor_target.load_state_dict(model.actor.state_dict())
    return model


def count_equal(t: th.Tensor, r: th.Tensor) -> int:
    """Number of leading rows with r = t."""
    return int((t == r).flatten().long().cumprod(dim=0).sum())


def record_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Keep what a function returns; it still runs."""
    results: list[Any] = []
    function = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, recorded)
    return results


def golden_batch() -> ReplayBufferSamples:
    return ReplayBufferSamples(
        observations=GOLDEN["batch/obs"],
        actions=GOLDEN["batch/act"],
        next_observations=GOLDEN["batch/next_obs"],
        dones=1 - GOLDEN["batch/mask"].unsqueeze(1),
        rewards=GOLDEN["batch/reward"].unsqueeze(1),
    )


def losses_of_a_step(
    model: Any, draws: GradientStepDraws, proposals: tuple[th.Tensor, th.Tensor], monkeypatch: pytest.MonkeyPatch
) -> dict[str, th.Tensor]:
    """Of the shipped gradient step with given samples of the policy and their log-probabilities; no weight changes."""
    losses: dict[str, th.Tensor] = {}
    sample = model.policy.sample

    def given(features: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return sample(features, noise) if noise.dim() == 2 else proposals

    with monkeypatch.context() as patch:
        patch.setattr(model.policy, "sample", given)
        patch.setattr(model, "_descend", lambda name, loss, optimizer: losses.setdefault(name, loss))
        model._update(golden_batch(), draws, update_target=False)
    return losses


# The outputs, section by section. Each is computed from stored inputs and stored upstream outputs.

Outputs = dict[str, th.Tensor]


def forward_passes(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    model = golden_model()
    actor, out = model.actor.network, {}
    out["fwd/actor/fourier_t"], out["fwd/actor/fourier_h"] = actor.embed.fourier_features(g["fwd/t"], g["fwd/h"])
    out["fwd/actor/embed_t"], out["fwd/actor/embed_h"] = actor.embed.mlp(actor.embed.fourier_features(g["fwd/t"], g["fwd/h"]))
    features = model.actor.encode(g["fwd/obs"])
    for name, network in {"actor/u": actor, "adn/out": model.divergence}.items():
        out[f"fwd/{name}"] = network(features, g["fwd/act"], network.embed(g["fwd/t"], g["fwd/h"]))
    for prefix, critic in {"critic": model.critic, "target_critic": model.critic_target}.items():
        features = critic.encode(g["fwd/obs"])
        for i in range(2):
            out[f"fwd/{prefix}_{i + 1}/logits"] = critic.outputs(features, g["fwd/critic_act"])[i]
            out[f"fwd/{prefix}_{i + 1}/q"] = critic.q_values(features, g["fwd/critic_act"])[i]
    norm = MultiInputMLP([1], 0, 1, [len(g["ops/layernorm_scale"])], nn.Identity, layer_norm=True).body[0]
    norm.load_state_dict({"weight": g["ops/layernorm_scale"], "bias": g["ops/layernorm_bias"]})
    out["ops/layernorm_out"] = norm(g["ops/layernorm_in"])
    out["ops/gelu_out"] = model.policy.activation_fn()(g["ops/gelu_in"])
    return out


def sampling(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    policy = golden_model().policy
    features, noise = policy.actor_target.encode(g["sample/obs"]), g["sample/noise"]
    out = {"sample/noise_logp": mean_flow.standard_normal_log_prob(noise)}
    for steps in {int(name.split("/")[1][1:]) for name in g if re.match(r"sample/T\d+/", name)}:
        policy.sampling_steps = steps
        intervals = embed_grid(policy.actor.network, policy.actor.sampling_times)
        before_clip, _ = mean_flow.few_step_sample(
            lambda actions, k, intervals=intervals: policy.actor.network(features, actions, intervals[k]),
            noise,
            policy.actor.sampling_times,
        )
        out[f"sample/T{steps}/action_preclip"] = before_clip
        out[f"sample/T{steps}/action"], out[f"sample/T{steps}/logp"] = policy.sample(features, noise)
    return out


def times(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    out = {}
    for case in ("time/a", "time/b"):
        normal = th.cat([g[f"{case}/normal_1"], g[f"{case}/normal_2"]], dim=1)
        mean, std = g["time/mean"].item(), g["time/std"].item()
        out[f"{case}/t"], out[f"{case}/r"] = mean_flow.logit_normal_times(normal, mean, std, int(g[f"{case}/n_equal"]))
    return out


def projections(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    out = {}
    for case in ("small", "default", "inexact"):
        probs = g[f"proj/{case}/next_prob"]
        atoms = th.linspace(g[f"proj/{case}/v_min"].item(), g[f"proj/{case}/v_max"].item(), probs.shape[1])
        out[f"proj/{case}/out"] = categorical.project(probs, g[f"proj/{case}/target_atoms"], atoms)
    return out


def critic_target(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    model = golden_model()
    policy, atoms, out = model.policy, model.critic_target.atoms, {}
    features = policy.actor.encode(g["batch/next_obs"])
    out["target/next_action"], out["target/next_logp"] = policy.sample(features, g["target/noise"])
    positions = categorical.bellman_atoms(
        g["batch/reward"].unsqueeze(1),
        g["meta/discount"] * g["batch/mask"].unsqueeze(1),
        -g["meta/temperature"] * g["target/next_logp"].unsqueeze(1),
        atoms,
    )
    out["target/target_atoms"] = positions.clamp(atoms[0], atoms[-1])
    logits = model.critic_target.outputs(model.critic_target.encode(g["batch/next_obs"]), g["target/next_action"])
    for i in (1, 2):
        out[f"target/next_logits_{i}"] = logits[i - 1]
        projected = categorical.project(g[f"target/next_logits_{i}"].softmax(1), g["target/target_atoms"], atoms)
        out[f"target/proj_{i}"] = projected
        out[f"target/value_{i}"] = categorical.expected_value(g[f"target/proj_{i}"], atoms)
    both = th.stack([g["target/proj_1"], g["target/proj_2"]])
    for case, reduction in REDUCTIONS.items():
        out[f"target/{case}/dist"] = categorical.reduce_distributions(both, atoms, reduction)
    return out


def critic_gradients(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    out = {}
    for case in REDUCTIONS:
        model = golden_model()
        losses = record_calls(monkeypatch, categorical, "cross_entropy")
        loss, _ = model.critic.loss(model.critic(g["batch/obs"], g["batch/act"], raw=True), g[f"target/{case}/dist"])
        loss.backward()
        for i, network in enumerate(model.critic.q_networks):
            out[f"target/{case}/loss_{i + 1}"] = losses[-1][i]
            gradients = flax_parameters(network, gradients=True)
            prefix = f"grad_critic_{i + 1}_{case}"
            out |= {f"{prefix}/{name}": value for name, value in gradients.items() if f"{prefix}/{name}" in g}
            if f"{prefix}/global_norm" in g:
                out[f"{prefix}/global_norm"] = th.cat([value.flatten() for value in gradients.values()]).norm()
    return out


def critic_at_default_support(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    out = {}
    n_atoms = g["target101/logits_1"].shape[1]
    # The default support is that of the paper's settings
    model = MFPO("MlpPolicy", RandomEnv(), buffer_size=10, device="cpu", **MFPO.PAPER)
    atoms = model.critic.atoms
    assert len(atoms) == n_atoms
    positions = categorical.bellman_atoms(
        g["target101/reward"].unsqueeze(1),
        g["target101/discount"] * g["target101/mask"].unsqueeze(1),
        -g["target101/temperature"] * g["target101/next_logp"].unsqueeze(1),
        atoms,
    )
    out["target101/target_atoms"] = positions.clamp(atoms[0], atoms[-1])
    for i in (1, 2):
        probs = g[f"target101/next_logits_{i}"].softmax(dim=1)
        out[f"target101/proj_{i}"] = categorical.project(probs, g["target101/target_atoms"], atoms)
        out[f"target101/value_{i}"] = categorical.expected_value(g[f"target101/proj_{i}"], atoms)
    both = th.stack([g["target101/proj_1"], g["target101/proj_2"]])
    for case, reduction in REDUCTIONS.items():
        out[f"target101/{case}/dist"] = categorical.reduce_distributions(both, atoms, reduction)
        for i in (1, 2):
            logits = g[f"target101/logits_{i}"].clone().requires_grad_()
            loss = categorical.cross_entropy(logits, g[f"target101/{case}/dist"])
            out[f"target101/{case}/loss_{i}"] = loss
            # The file stores these gradients for "cdq" alone
            if f"target101/{case}/dloss_dlogits_{i}" in g:
                out[f"target101/{case}/dloss_dlogits_{i}"] = th.autograd.grad(loss, logits)[0]
    return out


def snis(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    model, out, t = golden_model(), {}, g["snis/t"]
    features = model.actor.encode(g["batch/obs"]).unsqueeze(1)
    out["snis/policy_actions"], out["snis/policy_logp"] = model.policy.sample(features, g["snis/policy_noise"])
    out["snis/entropy"] = -g["snis/policy_logp"].mean()
    policy_actions, clean_actions, noisy = g["snis/policy_actions"], g["snis/clean_actions"], g["snis/noisy_actions"]
    out["snis/noisy_actions"] = paths.interpolate(policy_actions[:, 0], g["snis/noise"], *linear_path(t))
    out["snis/clean_actions"] = paths.actions_from_noise(noisy.unsqueeze(1), g["gprop/noise"], *linear_path(t.unsqueeze(1)))
    critic_features = model.critic.encode(g["batch/obs"]).unsqueeze(1)
    q_values = model.critic.q_values(critic_features, th.cat([policy_actions, clean_actions], dim=1))
    out["snis/q_1"], out["snis/q_2"] = q_values
    for case, reduction in REDUCTIONS.items():
        out[f"snis/{case}/q"] = reduce_values(th.stack([g["snis/q_1"], g["snis/q_2"]]), reduction)
    for case, q_case, temperature in (
        ("cdq", "cdq", g["snis/temperature"]),
        ("mean", "mean", g["snis/temperature"]),
        ("sharp", "cdq", g["snis/sharp/temperature"]),
    ):
        policy_q, clean_q = g[f"snis/{q_case}/q"].split([meta("K1"), meta("K2")], dim=1)
        out[f"snis/{case}/log_weight_policy"] = boltzmann.policy_log_weights(
            policy_q, g["snis/policy_logp"], policy_actions, noisy, t, temperature
        )
        out[f"snis/{case}/log_weight_clean"] = clean_q / temperature
        for kind, actions in (("policy", policy_actions), ("clean", clean_actions)):
            weights = g[f"snis/{case}/log_weight_{kind}"].softmax(dim=1)
            out[f"snis/{case}/weight_{kind}"] = weights
            mean_action, size = boltzmann.snis_mean(weights, actions)
            out[f"snis/{case}/velocity_{kind}"] = paths.linear_velocity(noisy, mean_action, t)
            out[f"snis/{case}/ess_{kind}"] = size.squeeze(1)
        velocity, shares = boltzmann.combine_by_sample_size(
            [g[f"snis/{case}/velocity_policy"], g[f"snis/{case}/velocity_clean"]],
            [g[f"snis/{case}/ess_policy"].unsqueeze(1), g[f"snis/{case}/ess_clean"].unsqueeze(1)],
        )
        out[f"snis/{case}/velocity"], out[f"snis/{case}/mix_policy"] = velocity, shares[0]
    return out


def gaussian_proposal(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    out = {}
    for prefix, noisy, t in (
        ("gprop", g["snis/noisy_actions"], g["snis/t"]),
        ("gprop_ext", g["gprop_ext/noisy_actions"], g["gprop_ext/t"]),
    ):
        noisy, t = noisy.unsqueeze(1), t.unsqueeze(1)
        for name, bound in zip(("lower", "upper"), paths.truncated_noise_bounds(noisy, *linear_path(t)), strict=True):
            out[f"{prefix}/{name}"] = bound.expand_as(g[f"{prefix}/{name}"])
    out["gprop/noise"] = boltzmann.truncated_normal(g["gprop/uniform01"], g["gprop/lower"], g["gprop/upper"])
    out["gprop_ext/clean_actions"] = paths.actions_from_noise(noisy, g["gprop_ext/noise"], *linear_path(t))
    return out


def actor_loss(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    t, r, noisy = g["snis/t"], g["snis/r"], g["snis/noisy_actions"]
    model, out = golden_model(), {}
    features = model.actor.encode(g["batch/obs"])
    with th.no_grad():
        out["meanflow/u_pred"] = model.actor.network(features, noisy, model.actor.network.embed(t, t - r))
    velocity = g["snis/cdq/velocity"]
    _, jvp = model.actor.linearize(features, noisy, t, t - r)
    out["meanflow/du_dt"] = jvp(velocity, th.ones_like(t))
    out["meanflow/target"] = mean_flow.mean_flow_target(velocity, t - r, g["meanflow/du_dt"])
    out["meanflow/loss_per_row"] = (g["meanflow/u_pred"] - g["meanflow/target"]).square().mean(dim=1)
    # The shipped step, from proposals to gradient
    for reduction, loss_name in (("mean", "meanflow/mean_case/loss"), ("min", "meanflow/loss")):
        model = golden_model()
        model.policy.critic_reduction = reduction
        draws = MeanFlowDraws(t, r, count_equal(t, r), g["snis/noise"])
        draws = model._draw(meta("batch"))._replace(actor=draws, uniform=g["gprop/uniform01"])
        with th.no_grad():
            model.log_ent_coef.copy_(g["snis/temperature"].log())
        proposals = g["snis/policy_actions"], g["snis/policy_logp"]
        out[loss_name] = losses_of_a_step(model, draws, proposals, monkeypatch)["actor_loss"]
        out[loss_name].backward()
    out |= {f"grad_actor/{name}": value for name, value in flax_parameters(model.actor.network, gradients=True).items()}
    return out


def adn_loss(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    t, r, noise = g["adn_loss/t"], g["adn_loss/r"], g["adn_loss/noise"]
    model, out = golden_model(), {}
    features = model.actor.encode(g["batch/obs"])
    out["adn_loss/noisy_actions"] = paths.interpolate(g["adn_loss/clean_actions"], noise, *linear_path(t))
    noisy, probes = g["adn_loss/noisy_actions"], g["adn_loss/probes"].transpose(0, 1)
    with th.no_grad():
        out["adn_loss/velocity"], jacobian_product = model.actor.linearize_velocity(features, noisy, t)
        products = jacobian_product(probes)
        out["adn_loss/probe_jvp"] = products.transpose(0, 1)
        out["adn_loss/divergence"] = hutchinson_divergence(probes, products)
        out["adn_loss/divergence_exact"] = exact_divergence(jacobian_product, noisy)
        out["adn_loss/pred"] = model.divergence(features, noisy, model.divergence.embed(t, t - r))
        velocity, divergence = g["adn_loss/velocity"], g["adn_loss/divergence"]
        _, jvp = model.divergence.linearize(features, noisy, t, t - r)
        out["adn_loss/du_dt"] = jvp(velocity, th.ones_like(t))
        out["adn_loss/target"] = mean_flow.mean_flow_target(divergence, t - r, g["adn_loss/du_dt"])
        out["adn_loss/loss_per_row"] = (g["adn_loss/pred"] - g["adn_loss/target"]).square().squeeze(1)
    # The shipped step
    draws = MeanFlowDraws(t, r, count_equal(t, r), noise)
    draws = model._draw(meta("batch"))._replace(divergence=draws, probes=probes)
    proposals = g["adn_loss/clean_actions"].unsqueeze(1), th.zeros(meta("batch"), 1)
    model.n_policy_samples = 0
    out["adn_loss/loss"] = losses_of_a_step(model, draws, proposals, monkeypatch)["divergence_loss"]
    out["adn_loss/loss"].backward()
    out |= {f"grad_adn/{name}": value for name, value in flax_parameters(model.divergence, gradients=True).items()}
    # The divergence's loss must not reach the actor
    assert all(parameter.grad is None for parameter in model.actor.parameters())
    return out


def temperature(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    columns = defaultdict(list)
    for log_temp, entropy in zip(g["temp/log_temp"], g["temp/entropy"], strict=True):
        model = golden_model()
        model.target_entropy = g["temp/target_entropy"].item()
        with th.no_grad():
            model.log_ent_coef.fill_(log_temp)
        proposals = th.zeros(meta("batch"), 1, meta("act_dim")), -entropy.expand(meta("batch"), 1)
        loss = losses_of_a_step(model, model._draw(meta("batch")), proposals, monkeypatch)["ent_coef_loss"]
        columns["temp/temperature"].append(model.log_ent_coef.detach().exp().squeeze())
        columns["temp/loss"].append(loss.detach())
        type(model)._descend(model, "ent_coef_loss", loss, model.ent_coef_optimizer)
        columns["temp/grad"].append(model.log_ent_coef.grad.squeeze())
        columns["temp/log_temp_after_adam"].append(model.log_ent_coef.detach().squeeze())
    return {name: th.stack(values) for name, values in columns.items()}


def selection(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    policy, out = golden_model().policy, {}
    observation, noise = g["select/obs"].unsqueeze(0), g["select/noise"]
    candidates, _ = policy.sample(policy.actor.encode(observation), noise)
    out["select/candidates"] = candidates
    q_values = policy.critic_target.q_values(policy.critic_target.encode(observation), candidates)
    out["select/q_1"], out["select/q_2"] = q_values
    policy.candidate_noise = noise
    for reduction in ("min", "mean"):
        values = reduce_values(th.stack([g["select/q_1"], g["select/q_2"]]), reduction)
        out[f"select/q_{reduction}"], out[f"select/index_{reduction}"] = values, values.argmax()
        policy.critic_reduction = reduction
        out[f"select/action_{reduction}"] = policy._predict(observation, deterministic=True)[0]
    return out


def whole_update(g: Outputs, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    actor_draws, adn_draws = (
        MeanFlowDraws(t, r, count_equal(t, r), noise)
        for t, r, noise in ([g[f"update/{kind}_{name}"] for name in ("t", "r", "noise")] for kind in ("actor", "adn"))
    )
    model, out = golden_model(), {}

    # The file stores truncated noise where the algorithm draws uniform numbers: go back through the distribution function
    with th.no_grad():
        actions, _ = model.policy.sample(model.actor.encode(g["batch/obs"]).unsqueeze(1), g["update/policy_noise"])
    noisy = paths.interpolate(actions[:, 0], actor_draws.noise, *linear_path(actor_draws.t)).double()
    lower, upper = paths.truncated_noise_bounds(noisy.unsqueeze(1), *linear_path(actor_draws.t.double().unsqueeze(1)))
    below, above = th.special.ndtr(lower), th.special.ndtr(upper)
    uniform = (th.special.ndtr(g["update/proposal_noise"].double()) - below) / (above - below)

    draws = GradientStepDraws(
        next_noise=g["update/critic_noise"],
        policy_noise=g["update/policy_noise"],
        local_noise=th.empty(0, 0, meta("act_dim")),
        uniform=uniform.clamp(0, 1),
        actor=actor_draws,
        divergence=adn_draws,
        probes=g["update/probes"].transpose(0, 1),
    )
    batch = golden_batch()
    losses = record_calls(monkeypatch, categorical, "cross_entropy")
    samples = record_calls(monkeypatch, model.policy, "sample")
    velocities = record_calls(monkeypatch, model, "_boltzmann_velocity")
    divergences = record_calls(monkeypatch, mfpo_module, "hutchinson_divergence")
    metrics = model._update(batch, draws)

    out["update/velocity"], out["update/divergence"] = velocities[0][0], divergences[0]
    out["update/metric/critic_loss_1"], out["update/metric/critic_loss_2"] = losses[0]
    out["update/metric/next_logp_mean"] = samples[0][1].mean()
    for golden_name, name in {
        "actor_loss": "actor_loss",
        "adn_loss": "divergence_loss",
        "entropy": "entropy",
        "temperature_loss": "ent_coef_loss",
    }.items():
        out[f"update/metric/{golden_name}"] = metrics[name]
    for prefix, network in networks(model).items():
        for name, parameter in flax_parameters(network).items():
            if f"update/after/{prefix}/{name}" in g:
                out[f"update/after/{prefix}/{name}"] = parameter
    out["update/after/log_temp"] = model.log_ent_coef.squeeze()
    return out


SECTIONS: dict[str, Callable[[Outputs, pytest.MonkeyPatch], Outputs]] = {
    "forward passes": forward_passes,
    "sampling": sampling,
    "times": times,
    "projections": projections,
    "critic target": critic_target,
    "critic gradients": critic_gradients,
    "critic, default support": critic_at_default_support,
    "importance sampling": snis,
    "Gaussian proposal": gaussian_proposal,
    "actor loss": actor_loss,
    "ADN loss": adn_loss,
    "temperature": temperature,
    "selection": selection,
    "whole update": whole_update,
}


@pytest.mark.parametrize("section", SECTIONS)
def test_section(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = SECTIONS[section](GOLDEN, monkeypatch)
    errors = {}
    for name, value in outputs.items():
        expected = GOLDEN[name]
        assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
        error = (value.detach().double() - expected.double()).abs().max().item()
        errors[name] = (error, TOLERANCES[name])
    failed = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    worst = max(errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-12))
    largest = max(error for error, _ in errors.values())
    print(f"\n{section}: {len(errors)} outputs, largest error {largest:.1e}; closest to its tolerance {worst} {errors[worst]}")
    assert not failed, f"(error, tolerance): {failed}"


def test_every_output_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for section in SECTIONS.values() for name in section(GOLDEN, monkeypatch)]
    assert len(names) == len(set(names))
    assert set(names) == set(TOLERANCES)
    assert len(names) == 228


def test_another_file_can_be_named(tmp_path: Path) -> None:
    """With SB3_MFPO_GOLDEN the numbers of that file count: one output off by twice its tolerance is found."""
    name = "snis/cdq/velocity_clean"
    np.savez(tmp_path / "other.npz", **{**RAW, name: RAW[name] + 2 * TOLERANCES[name]})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_section", "-k", "importance"]
    for file, code in ((tmp_path / "other.npz", 1), (FILE, 0)):
        run = subprocess.run(
            command, cwd=DATA.parent.parent, env={**os.environ, "SB3_MFPO_GOLDEN": str(file)}, capture_output=True, text=True
        )
        assert run.returncode == code, run.stdout
        assert (name in run.stdout) == bool(code)
