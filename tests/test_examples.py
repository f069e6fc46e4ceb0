"""Every example and benchmark runs, and the toy finds its modes."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import pytest
import speed
import torch as th
from minari.data_collector.episode_buffer import EpisodeBuffer
from stable_baselines3 import SAC

from sb3_mfpo import MFPO

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "quickstart": ["--steps", "520", "--output", "out"],
    "compare": [
        "--env",
        "Reacher-v5",
        "--algos",
        "mfpo",
        "td3",
        "--steps",
        "220",
        "--seeds",
        "0",
        "1",
        "--params",
        "learning_starts:200",
    ],
    "fetch_reach": ["--steps", "1002", "--every", "1002", "--output", "out/fetch"],
    "gates": ["--steps", "502", "--entropies", "-1", "--output", "out.png"],
    "mazes": ["--steps", "60", "--every", "30", "--rewards", "sparse", "--output", "out/mazes"],
    "multigoal": ["--steps", "8", "--algorithms", "MFPO", "TD3", "--output", "out/four"],
    "multimodal": ["--updates", "5", "--samples", "200", "--output", "out.png"],
    "offline_start": [
        *("--mediocre", "110", "--transitions", "250", "--gradient-steps", "9", "--steps", "120", "--every", "60"),
        *("--seeds", "0", "--output", "out.png"),
    ],
    "run_exported": ["policy.onnx", "Pendulum-v1"],
}


def load(name: str, folder: Path = EXAMPLES) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


def test_stop_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manual's lines begin a run, and the same lines resume it."""
    code = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "long_training.md").read_text(), flags=re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    for total in (103, 106):
        names: dict[str, Any] = {}
        exec(code.replace("1_000_000", str(total)).replace("10_000", "101"), names)
        assert (names["model"].num_timesteps, names["model"]._n_updates) == (total, total - 100)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"run_103_steps.zip", "run_106_steps.zip"}


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    load("quickstart").main(ARGUMENTS["quickstart"])
    assert is_png(tmp_path / "out" / "learning_curve.png")
    model = MFPO.load(tmp_path / "out" / "mfpo.zip")
    assert model.num_timesteps == 520
    assert len(np.load(tmp_path / "out" / "evaluations.npz")["timesteps"]) == 16
    assert "Random actions: return" in capsys.readouterr().out


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manual's lines, with fewer steps. Then, without PyTorch and this package, the file acts as the model does."""
    code = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "export.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for part in code:
        exec(part.replace("10_000", "120"), names)
        assert "actions" not in names or names.pop("actions").shape == (1, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"policy.onnx", "policy.pt2", "sampler.onnx"}

    script = f"""
import runpy, sys
sys.modules.update(torch=None, sb3_mfpo=None, stable_baselines3=None)
sys.argv = ["run_exported.py", *{ARGUMENTS["run_exported"]!r}]
runpy.run_path({str(EXAMPLES / "run_exported.py")!r})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    env, total = gym.make("Pendulum-v1"), 0.0
    observation, _ = env.reset(seed=0)
    for _ in range(200):
        observation, reward, *_ = env.step(names["model"].predict(observation, deterministic=True)[0])
        total += float(reward)
    assert float(run.stdout.split()[-1]) == pytest.approx(total, rel=1e-3)


def test_start_from_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in little, with curves from before the first step on. Then the manual's lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    example = load("offline_start")
    curves = example.main(ARGUMENTS["offline_start"])
    assert {name: runs.shape for name, runs in curves.items()} == {"from nothing": (1, 3), "from the data": (1, 3)}
    assert is_png(Path("out.png"))

    data, _ = example.collect(SAC("MlpPolicy", "Pendulum-v1"), "Pendulum-v1", 200)
    np.savez("pendulum.npz", **data)
    observations = np.concatenate([data["observations"], data["next_observations"][-1:]])
    episode = EpisodeBuffer(
        observations=list(observations),
        **{name: list(data[name]) for name in ("actions", "rewards", "terminations", "truncations")},
    )
    with pytest.warns(UserWarning):
        # About an author, a licence and such
        minari.create_dataset_from_buffers("pendulum/random-v0", [episode], env=gym.make("Pendulum-v1"))
    code = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "data.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    for part, size in zip(code, (320, 200), strict=True):
        exec(part.replace("3000", "2").replace("4000", "120"), names)
        assert names["model"].replay_buffer.pos == size


def test_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    table = load("compare").main(ARGUMENTS["compare"])
    assert set(table["algorithm"]) == {"MFPO", "TD3"} and set(table["seed"]) == {0, 1}
    # 20 evaluations at the same steps, for everybody
    assert (table.groupby(["algorithm", "seed"]).size() == 20).all()
    assert table["environment steps"].nunique() == 20
    assert is_png(tmp_path / "compare" / "comparison.png")
    capsys.readouterr()
    load("compare").main(ARGUMENTS["compare"])
    assert capsys.readouterr().out.count("done before") == 4
    # A run that was interrupted: its evaluations end early
    (path,) = Path("compare/seed_1/td3").glob("*/evaluations.npz")
    half = {name: values[:10] for name, values in np.load(path).items()}
    np.savez(path, **half)
    again = load("compare").main(ARGUMENTS["compare"])
    assert capsys.readouterr().out.count("done before") == 3
    pd.testing.assert_frame_equal(again, table)


def test_speed_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """That it works, not how fast it is."""
    output = tmp_path / "results" / "speed.json"
    speed.main(["--quick", "--output", str(output)])
    results = json.loads(output.read_text())
    (part,) = results["tasks"].values()
    algorithms = {"SAC", "TD3", "TQC", "MFPO", "MFPO, plain", "SOM"}
    loop = results["whole loop, HalfCheetah-v5"]
    assert algorithms <= set(part["8 gradient steps"]) == set(loop)
    timings = [part["8 gradient steps"], loop, *(part[f"action, batch of {batch}"] for batch in (1, 16, 256))]
    assert all(row["milliseconds"] > 0 for rows in timings for row in rows.values())
    assert {"MFPO, exported", "SOM, exported"} <= set(part["action, batch of 1"])
    assert sum(part["profile"].values()) == pytest.approx(1)
    assert set(part["profile"]) == {*speed.PARTS, "rest"}
    assert 0 < part["operators"]["SOM"] < part["operators"]["MFPO"] < part["operators"]["MFPO, plain"]
    assert part["peak memory in MB"] is None or part["peak memory in MB"] > 0
    assert results["versions"]["torch"] == th.__version__
    assert "HalfCheetah: 8 gradient steps" in capsys.readouterr().out


def test_soak_benchmark(tmp_path: Path) -> None:
    results = load("soak", EXAMPLES.parent / "benchmarks").main(["--steps", "600", "--output", str(tmp_path / "soak.csv")])
    assert len((tmp_path / "soak.csv").read_text().splitlines()) == 201
    for name in ("MFPO", "SOM"):
        part = results[f"{name}: first, lowest, highest after the warm-up"]
        assert part["open files"][0] == part["open files"][2]
        assert ("log_prob_error" in part) == (name == "MFPO")


def test_multimodal_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = load("multimodal").main(ARGUMENTS["multimodal"])
    assert is_png(tmp_path / "out.png")
    assert set(results) == {"six modes", "two moons"}
    for name, n_modes in (("six modes", 6), ("two moons", 2)):
        truth = results[name]["truth"]
        assert truth["modes"] == n_modes and truth["log_prob_error"] == 0 and truth["strays"] < 0.05
        assert len(results[name]) == 7
    (tmp_path / "out.png").unlink()
    assert len(load("multimodal").main([*ARGUMENTS["multimodal"], "--algorithms", "SOM"])["six modes"]) == 3
    assert is_png(tmp_path / "out.png")


def test_gates_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = load("gates").main(ARGUMENTS["gates"])
    assert is_png(tmp_path / "out.png")
    assert {name: list(by_entropy) for name, by_entropy in runs.items()} == {"MFPO": [-1.0], "SOM": [None], "SAC": [-1.0]}


def test_gates_count_what_passes() -> None:
    """Policies whose success and routes are known: one that takes all openings alike, one route, and noise."""
    gates = load("gates")

    class Known:
        def __init__(self, act: Any):
            self.act = act

        def predict(self, observations: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
            return self.act(len(observations))[:, None].astype(np.float32), None

    rng = np.random.default_rng(0)
    all_routes = gates.evaluate(Known(lambda n: rng.choice(gates.OPENINGS, n) + 0.09 * rng.uniform(-1, 1, n)), 5000)
    assert (all_routes.success, all_routes.routes) == (1, 27) and all_routes.effective == pytest.approx(27, abs=0.2)
    one_route = gates.evaluate(Known(lambda n: np.full(n, 0.55)))
    assert one_route[:3] == (1, 1, 1)
    # Openings are 0.6 of [-1, 1] = 0.3 of it
    noise = gates.evaluate(Known(lambda n: rng.uniform(-1, 1, n)), 50_000)
    assert noise.success == pytest.approx(0.3**3, abs=0.003)
    # The walls are those of the environment
    env = gates.Gates()
    env.reset()
    assert [env.step(np.array([x], np.float32))[2] for x in (0.51, -0.69, 0.09)] == [False, False, True]
    env.reset()
    assert env.step(np.array([0.25], np.float32))[1:3] == (pytest.approx(-0.25), True)


def test_mfpo_is_sharp_on_the_gates() -> None:
    """After 1 500 updates. With the paper's settings, after 3 500: 24 % on a single route."""
    gates = load("gates")
    result = gates.evaluate(gates.train("MFPO", steps=2000, seed=0))
    print(result[:3])
    assert result.success >= 0.4
    assert result.effective >= 12


def test_fetch_reach_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = load("fetch_reach")
    monkeypatch.setattr(example, "EPISODES", 2)
    table = example.main(ARGUMENTS["fetch_reach"])
    assert list(table["way"]) == ["chosen", "sample"] and table["success"].isin([0, 0.5, 1]).all()
    assert is_png(tmp_path / "out" / "fetch.png")


def test_mazes_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    example = load("mazes")
    monkeypatch.setattr(example, "EPISODES", 2)
    monkeypatch.setattr(example, "RANDOM_STEPS", 40)
    table = example.main(ARGUMENTS["mazes"])
    assert list(table["step"]) == [30, 30, 60, 60] and list(table["way"]) == ["chosen", "sample"] * 2
    assert is_png(tmp_path / "out" / "mazes.png")
    # What is there is not repeated
    capsys.readouterr()
    assert example.main([*ARGUMENTS["mazes"], "--seeds", "0"]).equals(table) and not capsys.readouterr().out
    # Shorter ones are
    longer = example.main([*ARGUMENTS["mazes"], "--steps", "100"])
    assert list(longer["step"]) == [30, 30, 60, 60, 90, 90]


@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_in_mazes_the_nearest_goal_counts(reward: str) -> None:
    """Pushed to the right, the point ends in the right arm, between its goal at (2, 0) and the wall behind."""
    example = load("mazes")
    example.register_robotics()
    env = example.make_env("point", reward, seed=0)
    env.reset()
    goals = env.get_attr("goals")[0]
    assert sorted(map(tuple, goals.round(6))) == [(-2, 0), (0, -2), (0, 2), (2, 0)]
    rewards, places, ended = [], [], []
    for _ in range(39):
        observation, paid, _, infos = env.step(np.array([[1.0, 0.0]]))
        rewards.append(paid[0])
        places.append(observation[0, -2:])
        ended.append(infos[0]["goal"])
    distances = np.linalg.norm(np.array(places)[:, None] - goals, axis=2).min(axis=1)
    expected = np.exp(-distances) if reward == "dense" else distances <= 0.45
    assert np.allclose(rewards, expected, atol=1e-6)
    assert ended[0] is None and tuple(goals[ended[-1]].round(6)) == (2, 0)


@pytest.mark.parametrize(
    "reward, steps, way, bound",
    [
        ("sparse", 5_000, "chosen", 20),
        pytest.param("sparse", 10_000, "sample", 30, marks=pytest.mark.nightly),
        pytest.param("dense", 10_000, "sample", 28, marks=pytest.mark.nightly),
    ],
)
def test_the_crossing_is_learned(reward: str, steps: int, way: str, bound: float) -> None:
    """
    With the sparse reward and the dense one, a policy that stands still returns 0 and 7, one that pushes against a wall 5 and
    21, one that goes straight to a goal 32 or more.
    """
    example = load("mazes")
    example.register_robotics()
    model = example.make_model("MFPO", "point", reward, 0, 0.0).learn(steps)
    returned, shares = example.evaluate(model, example.make_env("point", reward), example.WAYS[way])
    print(returned, shares)
    assert returned > bound and shares.sum() > 0.9


def test_multigoal_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    example = load("multigoal")
    monkeypatch.setattr(example, "RANDOM_STEPS", 100)
    monkeypatch.setattr(example, "FURTHER_STEPS", 0)
    monkeypatch.setitem(example.SHARED, "learning_starts", 100)
    table = example.main(ARGUMENTS["multigoal"])
    assert list(table["algorithm"]) == ["MFPO", "TD3"] and is_png(tmp_path / "out" / "four.png")
    assert np.allclose(table["missed"] + table[[f"goal {k}" for k in range(4)]].sum(axis=1), 1)
    # What is there is not repeated
    capsys.readouterr()
    again = example.main([*ARGUMENTS["multigoal"], "--seeds", "0", "1"])
    assert list(again["seed"]) == [0, 0, 1, 1] and capsys.readouterr().out.count("'seed': 0") == 0
    assert again.iloc[:2].equals(table)


def test_multigoal_counts_goals() -> None:
    """A policy that goes straight to one goal, one that goes to two of them, one that stands still."""
    example = load("multigoal")

    class Known:
        action_noise = None

        def __init__(self, *directions: list[float]):
            self.directions = np.array(directions)

        def predict(self, positions: np.ndarray) -> tuple[np.ndarray, None]:
            return self.directions[np.arange(len(positions)) % len(self.directions)], None

    pays = example.FourGoals().pays
    returned, shares, paths = example.evaluate(Known([0, 0.9]), pays)
    assert list(shares) == [0, 1, 0, 0] and paths.shape == (31, 200, 2)
    # Distances 4.1, 3.2, 2.3, 1.4, then 10, from a start with a spread of 0.1
    assert returned == pytest.approx(10 - 0.1 * 11, abs=0.05)
    assert list(example.evaluate(Known([0.9, 0], [0, -0.9]), pays)[1]) == [0.5, 0, 0, 0.5]
    returned, shares, _ = example.evaluate(Known([0.0, 0.0]), pays)
    assert shares.sum() == 0 and -0.1 * 30 * 5 < returned < -0.1 * 30 * 4.7
    # A goal that pays nothing is none; the walls and the reward are those of the environment
    assert example.evaluate(Known([0, 0.9]), np.array([10, 0, 10, 10]))[1].sum() == 0
    env = example.FourGoals()
    env.reset(seed=0)
    steps = [env.step(np.array([0.0, 0.9])) for _ in range(5)]
    assert [step[2] for step in steps] == [False] * 4 + [True] and steps[-1][1] == 10
    assert sum(step[1] for step in steps) == pytest.approx(10 - 0.1 * 11, abs=0.2)


def test_mfpo_keeps_four_goals() -> None:
    """After 4 000 steps of learning. A policy that has collapsed to some of the goals fails, and so does one that misses."""
    example = load("multigoal")
    model = example.make("MFPO", 0, 0.5).learn(example.RANDOM_STEPS + 4000)
    returned, shares, _ = example.evaluate(model, example.pays_of(model))
    print(returned, shares)
    assert returned > 7
    assert shares.min() >= 0.04


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm, target", [("SOM", "six modes"), ("SOM", "two moons"), ("MFPO", "six modes")])
def test_the_toy_at_full_size(algorithm: str, target: str, seed: int) -> None:
    """5 000 updates: modes, distance, strays, and MFPO's error of the log-probability in nats."""
    toy = load("multimodal")
    model = toy.train(algorithm, toy.TARGETS[target], updates=5000, seed=seed, device="cpu")
    bounds = {1: (0.06, 0.15, None)} if algorithm == "SOM" else {2: (0.04, 0.08, 0.6), 20: (0.03, 0.04, 0.4)}
    for steps, (distance, strays, error) in bounds.items():
        results = toy.evaluate(toy.TARGETS[target], *toy.sample_policy(model, 10_000, steps))
        print(algorithm, target, seed, steps, results)
        assert results["modes"] == (6 if target == "six modes" else 2)
        assert results["sliced_wasserstein"] <= distance
        assert results["strays"] <= strays
        assert error is None or results["log_prob_error"] <= error


# The toy with half the updates and half the width


def train_reduced(toy: ModuleType, algorithm: str, target: str, **kwargs: Any) -> Any:
    policy_kwargs = dict(net_arch=[128, 128])
    common = dict(updates=2500, seed=0, learning_rate=1e-3, device="cpu", policy_kwargs=policy_kwargs)
    model = toy.train(algorithm, toy.TARGETS[target], **common, **kwargs)
    th.manual_seed(0)
    return model


def test_mfpo_finds_all_modes_and_knows_its_density() -> None:
    """The bounds on the density are looser than those that the full toy meets."""
    toy = load("multimodal")
    model = train_reduced(toy, "MFPO", "six modes", n_gaussian_samples=9, n_local_samples=3)
    target = toy.TARGETS["six modes"]
    two, twenty = (toy.evaluate(target, *toy.sample_policy(model, 10_000, steps)) for steps in (2, 20))
    print(two, twenty)
    assert two["modes"] == twenty["modes"] == 6
    assert two["sliced_wasserstein"] <= 0.03
    assert twenty["sliced_wasserstein"] <= 0.03
    # Before training: 5 nats
    assert two["log_prob_error"] <= 0.7
    assert twenty["log_prob_error"] <= 0.4
    assert two["strays"] <= 0.1
    assert twenty["strays"] <= 0.05


@pytest.mark.parametrize("target, modes", [("six modes", 6), pytest.param("two moons", 2, marks=pytest.mark.nightly)])
def test_som_finds_all_modes_in_one_step(target: str, modes: int) -> None:
    toy = load("multimodal")
    model = train_reduced(toy, "SOM", target)
    one, two = (toy.evaluate(toy.TARGETS[target], *toy.sample_policy(model, 10_000, steps)) for steps in (1, 2))
    print(one, two)
    for results in (one, two):
        assert results["modes"] == modes
        assert results["sliced_wasserstein"] <= 0.06
        assert results["strays"] <= 0.15
