"""The command for a CUDA device, as far as a CPU shows it: a dry run with the listed packages alone, and going on."""

import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import venv
from argparse import Namespace
from importlib.metadata import distribution, requires
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import pandas as pd
import pytest
import suite as suites
import torch as th
from captured_sac import CapturedSAC
from packaging.requirements import Requirement
from stable_baselines3 import SAC

from tests.helpers import write_suite

BOTH: dict[str, Any] = {"MFPO": {"algo": "mfpo"}, "SAC": {"algo": "sac"}}


def arguments(folder: Path) -> list[str]:
    command = ["--device", "cpu", "--quick", "--suite", str(write_suite(folder, algorithms=BOTH)), "--tasks", "Pendulum-v1"]
    return [*command, "--output", str(folder / "out"), "--folder", str(folder / "runs"), "--gpus-per-run", "0.5"]


def with_dependencies(names: list[str]) -> set[str]:
    found: set[str] = set()
    while names:
        name, *names = names
        found.add(name)
        needed = [Requirement(text) for text in requires(name) or []]
        names += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
        names = [name for name in names if name not in found]
    return found


def bare_python(folder: Path) -> Path:
    """A Python with PyTorch, what it needs, and the listed packages without what they need."""
    lines = (
        line.split("#")[0].strip() for line in (gpu.ROOT / "benchmarks" / "gpu-requirements.txt").read_text().splitlines()
    )
    listed = {line for line in lines if line and not line.startswith("-")}
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    for name in listed | with_dependencies(["torch"]):
        files = distribution(name).files or []
        for entry in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / entry).exists():
                (packages / entry).symlink_to(Path(str(distribution(name).locate_file(entry))))
    return folder / "bin" / "python"


@pytest.mark.skipif(sys.platform == "win32", reason="links packages")
def test_a_dry_run_with_the_listed_packages_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = bare_python(tmp_path / "env")
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT), "OMP_NUM_THREADS": "1"}
    robots = "from sb3_mfpo.envs import register_dm_control as r; r(); import gymnasium as gym; "
    robots += "[gym.make(task).reset() for task in ('HalfCheetah-v5', 'dm_control/dog-run-v0')]"
    subprocess.run([python, "-W", "ignore", "-c", robots], env=environment, check=True)
    subprocess.run([python, gpu.__file__, *arguments(tmp_path)], env=environment, check=True)

    tests = pd.read_csv(tmp_path / "out" / "tests_quick.csv")
    assert all("test_cuda.py" in test or "-cuda" in test for test in tests["test"])
    assert {"test_cuda", "test_acceleration", "test_sb3_contract"} == {
        Path(test.split("::")[0]).stem for test in tests["test"]
    }
    speeds = pd.read_csv(tmp_path / "out" / "speed_quick.csv").set_index("what")
    assert set(speeds.loc["gradient step", "algorithm"]) == {"SAC", "MFPO", "SOM", "MFPO, paper"}
    acting = speeds.loc["action, deterministic"]
    assert set(acting["batch"]) == {1, 64, 1024} and (speeds["milliseconds"] > 0).all()
    curves = pd.read_csv(tmp_path / "out" / "learning_quick.csv")
    for name in ("MFPO", "SAC"):
        rows = curves[curves["algorithm"] == name]
        assert sorted(rows["step"]) == [100, 100, 200, 200, 200] and np.isfinite(rows["return"]).all()
        assert set(rows["mode"]) == {"deterministic", "sample", "training"}
    for part in gpu.PARTS:
        about = json.loads((tmp_path / "out" / f"{part}_quick.json").read_text())
        # Tests that were skipped are still to be done
        assert about["done"] == (part != "tests") and about["versions"]["torch"]

    # Nothing is done again
    monkeypatch.setattr(multiprocessing, "get_context", None)
    speed_file, log = tmp_path / "out" / "speed_quick.csv", tmp_path / "runs" / "MFPO" / "Pendulum-v1" / "seed_0" / "log.txt"
    before = [path.stat().st_mtime_ns for path in (speed_file, log)]
    assert gpu.main([*arguments(tmp_path), "--parts", "speed", "learning"]) == 0
    assert [path.stat().st_mtime_ns for path in (speed_file, log)] == before
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "learning_quick.csv"), curves)


def test_the_published_table_is_that_of_the_measurements() -> None:
    published = (gpu.run.RESULTS / "gpu" / "speed.md").read_text()
    assert published in (gpu.ROOT / "docs" / "speed.md").read_text()
    assert gpu.table(pd.read_csv(gpu.run.RESULTS / "gpu" / "speed.csv")) == published


def test_when_the_minutes_are_over_the_table_says_how_far_runs_are(tmp_path: Path) -> None:
    assert gpu.main([*arguments(tmp_path), "--parts", "learning", "--minutes", "0.001"]) == 0
    about = json.loads((tmp_path / "out" / "learning_quick.json").read_text())
    assert not about["done"] and about["runs"]["MFPO, Pendulum-v1, 0"] == "0 of 200 steps" and about["side_by_side"] == 2


def test_measurements_that_are_there_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, missing = gpu.measurements(quick=False)[:2]
    results = gpu.Results(tmp_path / "out", "speed")
    results.write(pd.DataFrame([dict(zip(gpu.KEY, key, strict=True)) for key in there.keys]), done=False)
    asked = []

    class Process:
        exitcode = 0

        def __init__(self, target: Any, args: tuple[gpu.Measurement, str, bool, Path]):
            asked.append(args[0])
            if args[0] == missing:
                args[3].write_text(json.dumps([dict(zip(gpu.KEY, key, strict=True)) for key in missing.keys]))
            else:
                args[3].with_suffix(".error").write_text("out of memory")

        def start(self) -> None: ...
        def join(self, timeout: float | None = None) -> None: ...
        def kill(self) -> None: ...

    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: Namespace(Process=Process))
    options = Namespace(output=tmp_path / "out", folder=tmp_path, quick=False, device="cuda")
    assert gpu.run_speed(options, float("inf")) == len(asked) - 1
    assert asked == gpu.measurements(quick=False)[1:] and not results.done
    assert "out of memory" in json.loads(results.json.read_text())["errors"].popitem()[1]
    # What has failed is tried again
    asked.clear()
    gpu.run_speed(options, float("inf"))
    assert asked == gpu.measurements(quick=False)[2:]


def test_the_captured_sac_takes_the_steps_of_sac() -> None:
    def weights(algorithm: type[SAC], **kwargs: Any) -> th.Tensor:
        policy_kwargs = {"net_arch": [32, 32]}
        model = algorithm("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", policy_kwargs=policy_kwargs, **kwargs).learn(150)
        assert model._n_updates == 50
        return th.cat([value.detach().flatten() for value in (*model.policy.parameters(), model.log_ent_coef)])

    th.testing.assert_close(weights(CapturedSAC, compile_step=False), weights(SAC), rtol=1e-4, atol=1e-5)


def test_what_pytest_reports(tmp_path: Path) -> None:
    test = tmp_path / "test_three.py"
    test.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['a b', 'c'])\n"
        "def test_one(x): assert x == 'c', 'not c'\n"
        "def test_two(): pytest.skip('no device')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", test.name]
    subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    rows = gpu.read_report(tmp_path / "report.xml").set_index("test")
    outcomes = {"test_one[a b]": "failed", "test_one[c]": "passed", "test_two": "skipped"}
    assert rows["outcome"].to_dict() == {f"test_three.py::{name}": outcome for name, outcome in outcomes.items()}
    assert "not c" in rows.loc["test_three.py::test_one[a b]", "message"] and "no device" in rows["message"].iloc[-1]
    # Its ids are those by which pytest leaves tests out
    output = subprocess.run([*command, f"--deselect={rows.index[1]}"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "1 failed, 1 skipped, 1 deselected" in output


def test_curves_of_runs_that_have_not_ended(tmp_path: Path) -> None:
    """Episodes of 1000 steps with the returns 1, 2, ...: five of them in each block."""
    suite = suites.read_suite(write_suite(tmp_path, algorithms=BOTH))
    run, _ = suites.runs_of(suite)
    place = suites.folder_of(run, tmp_path)
    logs = place / "mfpo" / "Pendulum-v1_1"
    logs.mkdir(parents=True)
    lines = ["#{}", "r,l,t", *(f"{i},1000,{10 * i}" for i in range(1, 13))]
    (logs / "0.monitor.csv").write_text("\n".join(lines))
    (place / "evaluations.csv").write_text("step,seconds,mode,return\n100,1.5,sample,-7\n")
    rows = gpu.curves(suite, tmp_path, tmp_path / "finished.csv")
    assert (rows[suites.KEYS] == ["MFPO", "Pendulum-v1", 0]).all(axis=None)
    training = rows[rows["mode"] == "training"]
    assert training[["step", "seconds", "return"]].values.tolist() == [[5000, 50, 3], [10_000, 100, 8], [12_000, 120, 11.5]]
    assert rows[rows["mode"] == "sample"][["step", "return"]].values.tolist() == [[100, -7]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--minutes", "0"], "`--minutes` must be above 0, not 0; without it"),
        (["--gpus-per-run", "2"], "`--gpus-per-run` must be above 0 and at most 1, not 2: 0.1 puts"),
        (["--tasks", "Hopper-v5"], "has the tasks ['Pendulum-v1'], not ['Hopper-v5']"),
        (["--suite", "nowhere.yml"], "nowhere.yml"),
    ],
)
def test_mistakes_end_the_command_before_any_work(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main([*arguments(tmp_path), *more])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_no_device(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([*arguments(tmp_path), "--device", "cuda"])
    assert "sees no CUDA device; for a dry run use `--device cpu --quick`" in capsys.readouterr().err
