"""The doctor: every problem it knows, and this installation."""

import fnmatch
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from sb3_mfpo.envs import NO_RENDERER, find_renderer
from sb3_mfpo.zoo import doctor


def test_this_installation_is_healthy(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    renderer = find_renderer()
    code = doctor.doctor()
    output = capsys.readouterr().out
    for name in ("torch", "mujoco", "dm_control", "rl_zoo3"):
        assert f"{name:19} {metadata.version(name)}" in output
    assert f"offscreen renderer  {renderer or 'none'}" in output
    if renderer:
        assert code == 0 and "No problems found." in output
    else:
        assert code == 1 and NO_RENDERER in output


def test_a_renderer_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    assert find_renderer() in ("egl", "osmesa", "glfw", None)
    (problem,) = doctor.unusable_renderer(True, "egl", "nonsense")
    assert "MUJOCO_GL=nonsense does not render" in problem and "export MUJOCO_GL=egl" in problem
    assert doctor.unusable_renderer(True, "egl", "egl") == doctor.unusable_renderer(True, "egl", None) == []
    assert doctor.unusable_renderer(False, None, None) == []
    assert doctor.unusable_renderer(True, None, None) == [NO_RENDERER]


@pytest.mark.parametrize(
    "mujoco, dm_control, broken",
    [("4.0.0", "1.0.50", True), ("3.17.0", "1.0.50", False), ("4.0.0", "1.0.51", False), (None, "1.0.50", False)],
)
def test_mujoco_4_with_an_old_dm_control_is_a_problem(mujoco: str | None, dm_control: str | None, broken: bool) -> None:
    problems = doctor.incompatible_mujoco(mujoco, dm_control)
    assert len(problems) == broken
    assert not broken or 'pip install "mujoco<4"' in problems[0]


def test_missing_packages_are_named_with_their_extra() -> None:
    versions: dict[str, str | None] = {name: "1" for names in doctor.PACKAGES.values() for name in names}
    assert doctor.missing_packages(versions) == []
    (problem,) = doctor.missing_packages({**versions, "shimmy": None, "dm_control": None})
    assert problem == 'dm_control, shimmy not installed: `pip install "sb3-mfpo[dmc]"`.'


def test_versions_that_another_package_does_not_accept_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HumanoidBench's: exact versions of what is installed in newer ones."""
    pins = ["gymnasium==0.29.1", "numpy", "mujoco==3.1.6; extra == 'none'", "not-installed==1.0"]
    monkeypatch.setattr(metadata, "requires", lambda name: pins)
    (problem,) = doctor.broken_requirements("humanoid-bench")
    assert problem.startswith(f"humanoid-bench needs gymnasium==0.29.1, but {metadata.version('gymnasium')} is installed")
    monkeypatch.undo()
    assert doctor.broken_requirements("no-such-package") == []
    assert doctor.broken_requirements("sb3-mfpo") == []


def test_an_unused_gpu_and_too_many_threads_are_problems() -> None:
    assert len(doctor.unused_gpu(torch_has_gpu_support=False, driver_found=True)) == 1
    assert doctor.unused_gpu(True, True) == doctor.unused_gpu(False, False) == []
    assert "export OMP_NUM_THREADS=2" in doctor.too_many_threads(4, 2)[0]
    assert doctor.too_many_threads(2, 2) == []


def test_it_runs_without_rl_zoo3(tmp_path) -> None:
    """It is most needed where something is missing."""
    (tmp_path / "rl_zoo3.py").write_text("raise ImportError")
    (tmp_path / "shimmy.py").write_text("raise ImportError")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "sb3_mfpo.zoo", "doctor"]
    run = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert run.returncode in (0, 1) and "offscreen renderer" in run.stdout, run.stderr


def test_tasks_of_other_packages_are_listed(capsys: pytest.CaptureFixture) -> None:
    doctor.doctor()
    output = capsys.readouterr().out
    assert "works: gym_pusht/PushT-v0; --gym-packages gym_pusht" in output
    assert "fails: Meta-World/*: requires mujoco 3.3.0" in output
    suite = doctor.Suite("1.0", "one", works=("one-*",))
    assert doctor.described("one", suite, None)[-1] == "    pip install -c constraints.txt one"
    assert len(doctor.described("one", suite, "1.1")) == 2


# What happens to each id that a module registers: "works", or the error
TRY_EVERY_TASK = """
import importlib, json, sys
import gymnasium as gym
import numpy as np

module, kwargs = sys.argv[1], json.loads(sys.argv[2])
before = set(gym.registry)
importlib.import_module(module)
results = {}
for env_id in sorted(set(gym.registry) - before):
    try:
        env = gym.make(env_id, **kwargs)
        assert isinstance(env.action_space, gym.spaces.Box), "discrete actions"
        observation, _ = env.reset(seed=0)
        assert env.observation_space.contains(observation)
        for _ in range(3):
            observation, reward, *_ = env.step(env.action_space.sample())
            assert env.observation_space.contains(observation) and np.isfinite(reward)
        env.close()
        results[env_id] = "works"
    except Exception as error:
        results[env_id] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
# Meta-World has ids for groups of tasks, which take the name of one
TASK_OF_GROUP = {"metaworld": dict(env_name="reach-v3", seed=0)}


@pytest.mark.nightly
@pytest.mark.parametrize("name", doctor.SUITES)
def test_the_list_of_tasks_is_true(name: str, tmp_path: Path) -> None:
    """Installed from PyPI beside our versions, in a folder of its own; every id does what the list says."""
    suite = doctor.SUITES[name]
    # pymunk needs the last two; nothing else may come along, such as another NumPy
    needs = [*suite.needs, "cffi", "pycparser"] if suite.needs else []
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "-c", str(CONSTRAINTS)]
    run = subprocess.run([*install, f"{name}=={suite.version}", *needs], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "MUJOCO_GL": find_renderer() or "egl"}
    line = [sys.executable, "-c", TRY_EVERY_TASK, suite.module, json.dumps(TASK_OF_GROUP.get(name, {}))]
    run = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert results
    for env_id, result in results.items():
        fails = any(fnmatch.fnmatchcase(env_id, pattern) for pattern in suite.fails)
        listed = fails or any(fnmatch.fnmatchcase(env_id, pattern) for pattern in suite.works)
        assert listed and (result != "works") == fails, f"{env_id}: {result}"
    if name == "metaworld":
        assert "could not broadcast" in results["Meta-World/MT1"]
