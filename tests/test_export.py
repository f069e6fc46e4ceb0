"""Exported policies, in onnxruntime and in torch, against ``predict``."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_mfpo import MFPO, SOM
from tests.helpers import Algorithm, RandomEnv, assert_equal, make_model

ROOT = Path(__file__).parent.parent
SUFFIXES = ["onnx", "pt2"]
ACTION_SPACE = spaces.Box(np.array([-2, 0], np.float32), np.array([1, 0.5], np.float32))
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
VECTOR = spaces.Box(-1, 1, (3,), np.float64)


class Extractor(BaseFeaturesExtractor):
    """A user's own, with layers that act otherwise in training."""

    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, features_dim=5)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations).relu()


class NotInONNX(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, features_dim=3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.special.bessel_j0(observations)


class Case(NamedTuple):
    algorithm: Algorithm
    space: spaces.Space
    policy: str = "MlpPolicy"
    policy_kwargs: dict[str, Any] | None = None
    critic_reduction: str = "min"
    deterministic: bool = True


CASES = {
    "MFPO, own extractor": Case(MFPO, VECTOR, policy_kwargs=dict(features_extractor_class=Extractor), critic_reduction="mean"),
    "MFPO, image, one candidate": Case(MFPO, IMAGE, "CnnPolicy", dict(n_action_candidates=1)),
    "MFPO, Dict, noise": Case(MFPO, spaces.Dict(z=VECTOR, a=spaces.MultiBinary(2)), "MultiInputPolicy", deterministic=False),
    "SOM, Dict": Case(
        SOM,
        spaces.Dict(vector=VECTOR, image=IMAGE, number=spaces.Discrete(3), numbers=spaces.MultiDiscrete([3, 4])),
        "MultiInputPolicy",
        dict(critic_type="scalar"),
    ),
}


def make(case: Case, env: Any = None) -> Any:
    """A model whose weights, statistics of batch normalisation included, are all different from where they start."""
    model = make_model(
        case.algorithm,
        env or RandomEnv(case.space, ACTION_SPACE),
        policy=case.policy,
        policy_kwargs=dict(case.policy_kwargs or {}),
        critic_reduction=case.critic_reduction,
        buffer_size=100,
        seed=0,
    )
    model.learn(15)
    with th.no_grad():
        for network in (model.policy.actor_target, model.policy.critic_target):
            for parameter in network.parameters():
                parameter.add_(0.1 * th.randn_like(parameter))
    return model


def sample(space: spaces.Space, n: int) -> Any:
    space.seed(n)
    if isinstance(space, spaces.Dict):
        return {key: sample(part, n) for key, part in space.items()}
    return np.stack([space.sample() for _ in range(n)])


def load(path: Path) -> Callable[..., np.ndarray]:
    """The file's function from observations, and noise if it has any, to actions."""

    def run_onnx(observations: Any, *noise: np.ndarray) -> np.ndarray:
        inputs = dict(observations) if isinstance(observations, dict) else {"observation": observations}
        (actions,) = session.run(["action"], inputs | dict(zip(["noise"], noise, strict=False)))
        return actions

    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        return run_onnx
    graph = th.export.load(path).module()
    return lambda *inputs: graph(*th.utils._pytree.tree_map(th.as_tensor, inputs)).numpy()


def state_of(model: Any) -> dict[str, Any]:
    """What an export in the middle of training could change."""
    return {
        "weights": copy.deepcopy(model.policy.state_dict()),
        "learned": [parameter.requires_grad for parameter in model.policy.parameters()],
        "modes": [module.training for module in model.policy.modules()],
        "random numbers": [th.get_rng_state(), np.random.get_state(), random.getstate()],
    }


class Exported(NamedTuple):
    case: Case
    model: Any
    folder: Path
    before: dict[str, Any]
    after: dict[str, Any]


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model in training mode, and its two files."""
    case, folder = request.param, tmp_path_factory.mktemp("exported")
    model = make(case)
    model.policy.set_training_mode(True)
    before = state_of(model)
    for suffix in SUFFIXES:
        model.policy.export(folder / f"policy.{suffix}", deterministic=case.deterministic)
    return Exported(case, model, folder, before, state_of(model))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_acts_as_predict(exported: Exported, suffix: str) -> None:
    """For any batch size, also one that ``predict`` evaluates in chunks."""
    case, model = exported.case, exported.model
    act = load(exported.folder / f"policy.{suffix}")
    for n in (1, 3, 100):
        observations = sample(case.space, n)
        th.manual_seed(n)
        noise = [] if case.deterministic else [th.randn(n, model.policy.actor_target.noise_dim).numpy()]
        th.manual_seed(n)
        expected, _ = model.predict(observations, deterministic=case.deterministic)
        actions = act(observations, *noise)
        assert actions.shape == expected.shape == (n, 2) and actions.dtype == expected.dtype
        assert np.abs(actions - expected).max() <= 1e-5
        assert (actions >= ACTION_SPACE.low).all() and (actions <= ACTION_SPACE.high).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_holds_nothing_of_this_machine(exported: Exported, suffix: str) -> None:
    content = (exported.folder / f"policy.{suffix}").read_bytes()
    assert str(ROOT).encode() not in content and b"site-packages" not in content
    assert {path.name for path in exported.folder.iterdir()} == {"policy.onnx", "policy.pt2"}


def test_export_leaves_the_run_as_it_is(exported: Exported) -> None:
    """A callback may export in the middle of training."""
    assert any(exported.before["modes"]) and any(exported.before["learned"])
    assert_equal(exported.after, exported.before)


@pytest.mark.parametrize(
    "space, policy, policy_kwargs, settings, suffix",
    [
        (VECTOR, "MlpPolicy", {}, dict(clip_obs=0.8, epsilon=0.3), "onnx"),
        (VECTOR, "MlpPolicy", {}, dict(norm_obs=False), "pt2"),
        (
            spaces.Dict(vector=VECTOR, number=spaces.Discrete(3), image=IMAGE),
            "MultiInputPolicy",
            {},
            dict(norm_obs_keys=["vector"], clip_obs=0.8),
            "pt2",
        ),
        # By default SB3 normalises all keys. The policy then sees the image as numbers around 0.
        (
            spaces.Dict(vector=VECTOR, image=IMAGE),
            "MultiInputPolicy",
            dict(normalize_images=False),
            dict(clip_obs=1.5),
            "pt2",
        ),
    ],
    ids=["vector", "no observations", "one key", "all keys"],
)
def test_statistics_of_observations_are_folded_in(
    tmp_path: Path, space: spaces.Space, policy: str, policy_kwargs: dict[str, Any], settings: dict[str, Any], suffix: str
) -> None:
    vec_normalize = VecNormalize(DummyVecEnv([lambda: RandomEnv(space, ACTION_SPACE)]), norm_reward=False, **settings)
    model = make(Case(MFPO, space, policy, policy_kwargs | dict(n_action_candidates=1)), vec_normalize)
    path = tmp_path / f"policy.{suffix}"
    model.policy.export(path, vec_normalize=model.get_vec_normalize_env())
    raw = sample(model.observation_space, 20)
    expected, _ = model.predict(vec_normalize.normalize_obs(raw), deterministic=True)
    assert np.abs(load(path)(raw) - expected).max() <= 1e-5
    if vec_normalize.norm_obs:
        assert np.abs(model.predict(raw, deterministic=True)[0] - expected).max() > 0.01


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(MFPO, policy_kwargs=dict(features_extractor_class=NotInONNX, n_action_candidates=1))


@pytest.mark.parametrize(
    "path, error, message",
    [
        ("policy.pt", ValueError, r"`path` must end in .onnx or .pt2, .* not '.*policy.pt'"),
        ("policy", ValueError, "`path` must end in"),
        ("missing/policy.onnx", FileNotFoundError, "`path` must be in a folder that exists, not .*: create '.*missing' first"),
    ],
)
def test_bad_paths_are_refused(model: Any, tmp_path: Path, path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model.policy.export(tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_statistics_of_other_observations_are_refused(model: Any, tmp_path: Path) -> None:
    others = VecNormalize(DummyVecEnv([lambda: RandomEnv(spaces.Box(-1, 1, (4,)))]))
    with pytest.raises(ValueError, match=r"`vec_normalize` must have the policy's observation space, .*\(3,\).* not .*\(4,\)"):
        model.policy.export(tmp_path / "policy.onnx", vec_normalize=others)
    with pytest.raises(ValueError, match=r"`vec_normalize` must be a `VecNormalize`, .* not 'stats.pkl'"):
        model.policy.export(tmp_path / "policy.onnx", vec_normalize="stats.pkl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, deterministic", [("action", True), ("noise", False)])
def test_keys_that_are_names_of_the_file(tmp_path: Path, name: str, deterministic: bool) -> None:
    model = make(Case(MFPO, spaces.Dict({name: VECTOR}), "MultiInputPolicy"))
    with pytest.raises(ValueError, match=f"'{name}' is a name .* a key .* Rename the key, or export to .pt2"):
        model.policy.export(tmp_path / "policy.onnx", deterministic)
    assert not list(tmp_path.iterdir())
    model.policy.export(tmp_path / "policy.pt2", deterministic)
    inputs = [sample(model.observation_space, 5)] + ([] if deterministic else [np.zeros((5, 2), np.float32)])
    assert load(tmp_path / "policy.pt2")(*inputs).shape == (5, 2)


def test_a_missing_extra_is_named(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ImportError, match=r"`path='.*policy.onnx'` needs .*onnxscript.* install `sb3-mfpo\[export\]`, or .* .pt2"
    ):
        model.policy.export(tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_the_old_file(model: Any, tmp_path: Path) -> None:
    """This features extractor has an operator that ONNX lacks; it says which."""
    path = tmp_path / "policy.onnx"
    path.write_bytes(b"old")
    with pytest.raises(th.onnx.OnnxExporterError, match="bessel_j0"):
        model.policy.export(path)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["policy.onnx"]
