"""A policy as one file that acts by itself: ONNX, or a graph of ``torch.export``."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from torch.utils._pytree import tree_map

from sb3_mfpo.runs.files import replacing

if TYPE_CHECKING:
    from sb3_mfpo.training.policy import GenerativePolicy

SUFFIXES = (".onnx", ".pt2")


class ActionGraph(nn.Module):
    """
    What an exported file computes: from observations to actions within the bounds of the action space.

    :param policy: Acts
    :param vec_normalize: Normalises the observations first, with its statistics of now
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, policy: GenerativePolicy, vec_normalize: VecNormalize | None):
        super().__init__()
        self.policy = policy
        self.register_buffer("low", th.as_tensor(policy.action_space.low))
        self.register_buffer("high", th.as_tensor(policy.action_space.high))
        # Mean and standard deviation by name of the input
        self.statistics: dict[str, tuple[th.Tensor, th.Tensor]] = {}
        if vec_normalize is not None and vec_normalize.norm_obs:
            self.clip_obs = vec_normalize.clip_obs
            moments: Any = vec_normalize.obs_rms
            for name, of_one in (moments if isinstance(moments, dict) else {"observation": moments}).items():
                std = np.sqrt(of_one.var + vec_normalize.epsilon)
                self.statistics[name] = th.as_tensor(of_one.mean), th.as_tensor(std)

    def forward(self, observation: PyTorchObs, noise: th.Tensor | None = None) -> th.Tensor:
        """
        :param observation: Batch of observations, each shape (B, ...)
        :param noise: Standard-normal noise to start from, shape (B, noise_dim); without it, the action of
            ``predict(deterministic=True)``
        :return: Actions in the bounds of the action space, shape (B, ...)
        """
        if isinstance(observation, dict):
            observation = {key: self._normalize(key, values) for key, values in observation.items()}
        else:
            observation = self._normalize("observation", observation)
        if noise is None:
            scaled_actions = self.policy(observation, deterministic=True)
        else:
            scaled_actions = self.policy.act(self.policy.actor_target.encode(observation), noise)
        scaled_actions = scaled_actions.reshape(-1, *self.low.shape)
        actions = self.low + 0.5 * (scaled_actions + 1.0) * (self.high - self.low)
        # Rounding alone could leave the bounds
        return actions.clamp(self.low, self.high)

    def _normalize(self, name: str, values: th.Tensor) -> th.Tensor:
        if name not in self.statistics:
            return values
        mean, std = self.statistics[name]
        # In float64, as `VecNormalize` does
        return ((values - mean) / std).clamp(-self.clip_obs, self.clip_obs).float()


def export_policy(policy: GenerativePolicy, path: Path, deterministic: bool, vec_normalize: VecNormalize | None) -> None:
    """
    See ``GenerativePolicy.export``.

    :param policy: Any policy, which stays as it is
    :param path: The file's path
    :param deterministic: Whether to act as ``predict(deterministic=True)`` does, instead of from noise that is given
    :param vec_normalize: Whose statistics of observations to fold in
    :raises ValueError: If the suffix is unknown, a key of the observations is another name in the file, or
        ``vec_normalize`` is no ``VecNormalize`` of these observations
    :raises FileNotFoundError: If the folder does not exist
    :raises ImportError: If ONNX is asked for, and a package that it needs is missing
    """
    space = policy.observation_space
    names = list(space) if isinstance(space, spaces.Dict) else ["observation"]
    _check(path, names, deterministic, space, vec_normalize)
    if not deterministic:
        names.append("noise")

    # The copy leaves out what only training needs
    for_training: dict[int, Any] = {id(network): None for network in policy._networks()}
    acting = copy.deepcopy(policy, for_training).cpu().eval().requires_grad_(False)
    inputs: list[Any] = [
        {key: _example(part) for key, part in space.items()} if isinstance(space, spaces.Dict) else _example(space)
    ]
    if not deterministic:
        inputs.append(th.zeros(2, acting.actor_target.noise_dim))
    batch = th.export.Dim("batch")
    any_batch = tree_map(lambda _: {0: batch}, inputs)
    with th.no_grad():
        program = th.export.export(ActionGraph(acting, vec_normalize), tuple(inputs), dynamic_shapes=any_batch)
    # They hold the paths of files on this machine
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    with replacing(path) as file:
        if path.suffix == ".pt2":
            th.export.save(program, file)
        else:
            file.write(_to_onnx(program, names, any_batch))


def _to_onnx(program: th.export.ExportedProgram, names: list[str], shapes: Any) -> bytes:
    with warnings.catch_warnings():
        # About torch's own code, and that all inputs share one batch size
        warnings.simplefilter("ignore")
        onnx_program = th.onnx.export(
            program, input_names=names, output_names=["action"], dynamic_shapes=shapes, dynamo=True, verbose=False
        )
    assert onnx_program is not None
    return onnx_program.model_proto.SerializeToString()


def _check(path: Path, keys: list[str], deterministic: bool, space: spaces.Space, vec_normalize: VecNormalize | None) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"`path` must end in {' or '.join(SUFFIXES)}, which chooses the format, not {str(path)!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must be in a folder that exists, not {str(path)!r}: create {str(path.parent)!r} first."
        )
    if vec_normalize is not None:
        if not isinstance(vec_normalize, VecNormalize):
            raise ValueError(
                f"`vec_normalize` must be a `VecNormalize`, such as `model.get_vec_normalize_env()`, not {vec_normalize!r}."
            )
        if vec_normalize.observation_space != space:
            raise ValueError(
                f"`vec_normalize` must have the policy's observation space, {space}, not {vec_normalize.observation_space}: "
                "give the one that the policy was trained with."
            )
    if path.suffix == ".onnx":
        for name in ["action"] if deterministic else ["action", "noise"]:
            if name in keys:
                raise ValueError(
                    f"`path={str(path)!r}`: {name!r} is a name of the ONNX file's own, and also a key of the observations. "
                    "Rename the key, or export to .pt2."
                )
        try:
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"`path={str(path)!r}` needs onnx and onnxscript ({error}): install `sb3-mfpo[export]`, or export to .pt2."
            ) from error


def _example(space: spaces.Space) -> th.Tensor:
    # Two rows: `torch.export` takes a size of one for a constant
    return th.as_tensor(np.zeros((2, *(space.shape or ())), space.dtype))
