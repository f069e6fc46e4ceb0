"""Models on the Hugging Face hub: our card for our models, and what rl_zoo3's commands need with the installed packages."""

from __future__ import annotations

import importlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import huggingface_sb3
import numpy as np
import yaml
from huggingface_hub import repocard
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_sb3 import EnvironmentName, ModelName
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_mfpo.training.mean_flow import MeanFlowAlgorithm
from sb3_mfpo.zoo.doctor import PACKAGES, installed_version

# By name, because the package also exports a function of the module's name
push_to_hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
original_evaluate = push_to_hub._evaluate_agent
original_save_metadata = repocard.metadata_save
original_load = huggingface_sb3.load_from_hub

CARD = """
# **{algorithm}** agent playing **{env_id}**

A model of {algorithm} after {steps} steps, trained with `sb3-mfpo`: mean-flow policies for
[Stable-Baselines3](https://github.com/DLR-RM/stable-baselines3), in the [RL Zoo](https://github.com/DLR-RM/rl-baselines3-zoo).

## Evaluation

| way of acting | mean return | standard deviation | episodes |
|---|---|---|---|
{rows}

Number of training seeds: 1 (seed {seed}). The standard deviations are over episodes of this one model. Both ways of acting
begin with the same seed of the environment.

Evaluated with {versions}.

## Usage

```bash
pip install "sb3-mfpo[zoo,mujoco,dmc]"
# The variable allows a pickle to be loaded, which can run any code: set it if you trust the model's author
TRUST_REMOTE_CODE=True python -m sb3_mfpo.zoo load-from-hub {model} {repository} -f logs/
python -m sb3_mfpo.zoo enjoy {model} -f logs/
```

## Training

With the hyperparameters below:

```bash
python -m sb3_mfpo.zoo train {model} --seed {seed} -f logs/
python -m sb3_mfpo.zoo push-to-hub {model} {repository} -f logs/
```

"""


def prepare_hub() -> None:
    """
    Let rl_zoo3's ``push_to_hub`` and ``load_from_hub`` work with the installed packages, and write our card for our models.

    Call it before either of them is imported.
    """
    # rl_zoo3 2.9.2 imports a function that its dependency sb3-team-hf-integration 3.2 has renamed, and that now returns an
    # object
    if not hasattr(push_to_hub, "generate_metadata"):
        push_to_hub.generate_metadata = lambda *args: push_to_hub._generate_metadata(*args).to_dict()
    push_to_hub._evaluate_agent = evaluate_both_ways
    repocard.metadata_save = save_card
    huggingface_sb3.load_from_hub = load_from_hub


def evaluate_both_ways(
    model: BaseAlgorithm, eval_env: VecEnv, n_eval_episodes: int, is_deterministic: bool, local_path: Path
) -> tuple[float, float]:
    """
    huggingface_sb3's ``_evaluate_agent``, which evaluates a model and writes ``results.json``. It evaluates our models in both
    ways of acting, and ``ways_of_acting`` in the file has both results.

    :param model: A trained model
    :param eval_env: Where it acts
    :param n_eval_episodes: Number of episodes of each evaluation
    :param is_deterministic: The way that is asked for
    :param local_path: Folder of the file
    :return: Mean and standard deviation of the returns in the way that is asked for
    """
    if not isinstance(model, MeanFlowAlgorithm):
        return original_evaluate(model, eval_env, n_eval_episodes, is_deterministic, local_path)
    file = local_path / "results.json"
    # From the generator that the command has seeded
    seed = int(np.random.randint(2**31))
    results = []
    # The way that is asked for comes last, so that its results are those of the file
    for deterministic in (not is_deterministic, is_deterministic):
        eval_env.seed(seed)
        mean_and_std = original_evaluate(model, eval_env, n_eval_episodes, deterministic, local_path)
        results.append(json.loads(file.read_text()))
    facts = dict(n_action_candidates=model.policy.n_action_candidates, num_timesteps=model.num_timesteps)
    file.write_text(json.dumps({**results[-1], "ways_of_acting": results, **facts}))
    return mean_and_std


def save_card(local_path: str | Path, data: dict[str, Any]) -> None:
    """
    huggingface_hub's ``metadata_save``, which adds a model's metadata to the card that rl_zoo3 has written. Before, our card
    takes the place of rl_zoo3's if the model is one of ours.

    :param local_path: Of the card, in the folder that will be uploaded
    :param data: The metadata
    """
    readme = Path(local_path)
    file = readme.parent / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    if "ways_of_acting" in results:
        readme.write_text(our_card(readme, results), encoding="utf-8")
    original_save_metadata(readme, data)


def our_card(readme: Path, results: dict[str, Any]) -> str:
    """
    :param readme: rl_zoo3's card, in the folder with the model's other files
    :param results: Content of ``results.json``
    :return: Our card, with the hyperparameters and environment arguments of rl_zoo3's
    """
    theirs = readme.read_text(encoding="utf-8")
    command = re.search(r"load_from_hub --algo (\S+) --env (\S+) -orga (\S+)", theirs)
    assert command is not None, "rl_zoo3's card names the command that loads the model"
    algorithm, env_id, organization = command.groups()
    repository = f"-orga {organization}"
    if readme.parent.name != ModelName(algorithm, EnvironmentName(env_id)):
        repository += f" -name {readme.parent.name}"
    # Of the user's own run. rl_zoo3 writes Python objects.
    arguments = yaml.unsafe_load((readme.parent / "args.yml").read_text())
    ways = sorted(results["ways_of_acting"], key=lambda way: way["is_deterministic"], reverse=True)
    ours = CARD.format(
        algorithm=algorithm.upper(),
        env_id=env_id,
        steps=results["num_timesteps"],
        rows="\n".join(_row(way, results["n_action_candidates"]) for way in ways),
        seed=arguments["seed"],
        versions=", ".join(_versions()),
        model=f"--algo {algorithm} --env {env_id}",
        repository=repository,
    )
    _, heading, hyperparameters = theirs.partition("## Hyperparameters")
    return ours + heading + hyperparameters


def load_from_hub(repo_id: str, filename: str) -> str:
    """
    huggingface_sb3's function of this name. rl_zoo3 2.9.2 expects an error of requests where a file is missing, such as
    ``vec_normalize.pkl`` of a model without normalization. huggingface_hub raises one of its own.

    :param repo_id: Id of the repository
    :param filename: Name of the file
    :return: Path of the downloaded file
    :raises requests.exceptions.HTTPError: If there is no such file
    """
    try:
        return original_load(repo_id, filename)
    except RemoteEntryNotFoundError as error:
        from requests.exceptions import HTTPError

        raise HTTPError(str(error)) from error


def _row(way: dict[str, Any], candidates: int) -> str:
    name = f"deterministic: the best of {candidates}" if way["is_deterministic"] else "single samples"
    return f"| {name} | {way['mean_reward']:.2f} | {way['std_reward']:.2f} | {way['n_eval_episodes']} |"


def _versions() -> list[str]:
    names = [name for extra in ("", "mujoco", "dmc") for name in PACKAGES[extra]] + ["rl_zoo3"]
    versions = {name: installed_version(name) for name in names}
    return [f"python {platform.python_version()}", *(f"{name} {version}" for name, version in versions.items() if version)]
