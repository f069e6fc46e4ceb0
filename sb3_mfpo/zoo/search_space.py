"""The search space of ``train -optimize``."""

from __future__ import annotations

from typing import Any

import optuna

NET_ARCHS = {"small": [64, 64], "medium": [256, 256], "large": [256, 256, 256]}


def sample_mfpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    :param trial: Optuna's trial
    :param n_actions: Not used; rl_zoo3 gives it to every sampler
    :param n_envs: Not used
    :param additional_args: Not used
    :return: Keyword arguments of ``MFPO``
    """
    own = {
        # Minus the target entropy per action coordinate, in nats
        "rho": trial.suggest_float("rho", 0.0, 1.0),
        "n_gaussian_samples": trial.suggest_categorical("n_gaussian_samples", [6, 12, 36]),
        "n_local_samples": trial.suggest_categorical("n_local_samples", [0, 6, 12]),
        "sampling_steps": trial.suggest_int("sampling_steps", 1, 4),
    }
    return convert_mfpo_params(_sample_shared(trial) | own)


def convert_mfpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial, as Optuna stores them
    :return: Keyword arguments of ``MFPO``
    """
    params = _convert_shared(sampled_params)
    params["policy_kwargs"]["sampling_steps"] = params.pop("sampling_steps")
    params["target_entropy"] = f"auto_{params.pop('rho')!r}"
    return params


def sample_som_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    :param trial: Optuna's trial
    :param n_actions: Not used; rl_zoo3 gives it to every sampler
    :param n_envs: Not used
    :param additional_args: Not used
    :return: Keyword arguments of ``SOM``
    """
    own = {
        "inverse_temperature": trial.suggest_float("inverse_temperature", 1.0, 300.0, log=True),
        "n_samples": trial.suggest_categorical("n_samples", [8, 16, 32, 64]),
    }
    return convert_som_params(_sample_shared(trial) | own)


def convert_som_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial, as Optuna stores them
    :return: Keyword arguments of ``SOM``
    """
    return _convert_shared(sampled_params)


def _sample_shared(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.003, 0.1, log=True),
        "tau": trial.suggest_float("tau", 0.003, 0.05, log=True),
        "policy_delay": trial.suggest_categorical("policy_delay", [1, 2, 4, 8]),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
    }


def _convert_shared(sampled_params: dict[str, Any]) -> dict[str, Any]:
    params = dict(sampled_params)
    net_arch = list(NET_ARCHS[params.pop("net_arch")])
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["policy_kwargs"] = dict(net_arch=net_arch)
    return params
