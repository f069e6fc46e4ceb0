"""rl_zoo3 with our algorithms: the real commands on small budgets, in processes of their own."""

import argparse
import csv
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3
import rl_zoo3.plots
import torch as th
import yaml
from rl_zoo3 import hyperparams_opt, utils
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import SAC
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_mfpo import MFPO, SOM, RunCheckpointCallback
from sb3_mfpo.envs import NO_RENDERER, ReadyEntryPoint, register_dm_control
from sb3_mfpo.zoo.__main__ import COMMANDS, main
from sb3_mfpo.zoo.hub import evaluate_both_ways
from sb3_mfpo.zoo.manager import Hyperparameters, Manager, create_test_env, merged
from sb3_mfpo.zoo.registration import ALGORITHMS, hyperparameter_file, register
from tests.helpers import make_model
from tests.test_envs import OwnTask, bare, bare_environment, needs_renderer, write_humanoid_bench  # noqa: F401

TASK = "Reacher-v5"
HYPERPARAMS = {name: yaml.safe_load(hyperparameter_file(name).read_text()) for name in ALGORITHMS}


def start(folder: Path, command: str, **environment: str) -> subprocess.Popen:
    """Run a command of the zoo in a folder, one thread each, on a machine without a display."""
    variables = bare_environment(WANDB_MODE="offline", WANDB_SILENT="true", **environment)
    line = [sys.executable, "-m", "sb3_mfpo.zoo", *command.split()]
    return subprocess.Popen(line, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def zoo(folder: Path, command: str, code: int = 0, **environment: str) -> str:
    process = start(folder, command, **environment)
    output, _ = process.communicate()
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short runs of MFPO, one of SOM and two of SAC, the first with everything that can be recorded."""
    folder = tmp_path_factory.mktemp("runs")
    common = f"--env {TASK} -n 620 --eval-freq 300 --eval-episodes 2 -params learning_starts:600"
    zoo(folder, f"train --algo mfpo --seed 0 --progress -tb tb --track --save-freq 600 --save-replay-buffer {common}")
    zoo(folder, f"train --algo mfpo --seed 1 {common}")
    zoo(folder, f"train --algo som --seed 0 {common}")
    for seed in (0, 1):
        zoo(folder, f"train --algo sac --seed {seed} {common}")
    return folder


def test_training_leaves_what_rl_zoo3_leaves(runs: Path) -> None:
    run = runs / "logs" / "mfpo" / f"{TASK}_1"
    names = {path.name for path in run.iterdir()}
    assert {"0.monitor.csv", "best_model.zip", "evaluations.npz", f"{TASK}.zip", "rl_model_600_steps.zip"} <= names
    assert "replay_buffer.pkl" in names
    config = yaml.unsafe_load((run / TASK / "config.yml").read_text())
    assert config["learning_starts"] == 600
    assert config["policy_kwargs"] == HYPERPARAMS["mfpo"][TASK]["policy_kwargs"]
    model = MFPO.load(run / f"{TASK}.zip")
    assert model.num_timesteps == 620 and model.gamma == HYPERPARAMS["mfpo"][TASK]["gamma"]
    assert model.policy.net_arch == [64, 64] and model.return_scale is not None
    # TensorBoard and, offline, Weights & Biases, which takes the logs to its own folder
    assert list((runs / "runs").rglob("events.out.tfevents.*"))
    assert list((runs / "wandb").glob("offline-run-*"))


def test_the_papers_settings_are_a_configuration_of_the_zoo(tmp_path: Path) -> None:
    task = "HalfCheetah-v5"
    zoo(tmp_path, f"train --algo mfpo --env {task} --conf-file sb3_mfpo.zoo.paper -n 10 --eval-freq -1")
    model = MFPO.load(tmp_path / "logs" / "mfpo" / f"{task}_1" / f"{task}.zip", buffer_size=1)
    assert (model.batch_size, model.learning_starts, model.critic_reduction, model.ent_coef) == (
        256,
        10_000,
        "mean",
        "auto_0.01",
    )
    assert (model.policy.v_min, model.policy.v_max, model.policy.value_init) == (-1600, 1600, "uniform")
    assert all(getattr(model, name) == value for name, value in MFPO.PAPER.items() if name != "critic_reduction")


def test_enjoy(runs: Path) -> None:
    for model in ("", "--load-best", "--load-checkpoint 600"):
        output = zoo(runs, f"enjoy --algo mfpo --env {TASK} --exp-id 1 -f logs --no-render -n 100 {model}")
        assert "Mean reward" in output and "2 Episodes" in output
    assert "SAC" not in output
    for other in ("som", "sac"):
        assert "Mean reward" in zoo(runs, f"enjoy --algo {other} --env {TASK} -f logs --no-render -n 100")
    model = SOM.load(runs / "logs" / "som" / f"{TASK}_1" / f"{TASK}.zip")
    assert model.num_timesteps == 620 and model.gamma == HYPERPARAMS["som"][TASK]["gamma"]


def test_train_continues_a_trained_model(runs: Path, tmp_path: Path) -> None:
    trained = runs / "logs" / "mfpo" / f"{TASK}_1" / f"{TASK}.zip"
    output = zoo(tmp_path, f"train --algo mfpo --env {TASK} -n 10 --eval-freq -1 -i {trained} -params learning_starts:0")
    assert "Loading pretrained agent" in output and "Loading replay buffer" in output
    model = MFPO.load(tmp_path / "logs" / "mfpo" / f"{TASK}_1" / f"{TASK}.zip")
    assert model._n_updates == 20 + 10


@needs_renderer
def test_record_video(runs: Path) -> None:
    zoo(runs, f"record-video --algo mfpo --env {TASK} --exp-id 1 -f logs -o videos -n 30")
    (video,) = (runs / "videos").glob("*.mp4")
    assert count_frames(video) in (30, 31)


@needs_renderer
@pytest.mark.nightly
def test_record_training(runs: Path) -> None:
    zoo(runs, f"record-training --algo mfpo --env {TASK} --exp-id 1 -f logs -n 20")
    video = runs / "logs" / "mfpo" / f"{TASK}_1" / "videos" / "training.mp4"
    # The checkpoint, the best and the last model
    assert count_frames(video) >= 3 * 20


@needs_renderer
def test_a_dm_control_task_from_pixels(tmp_path: Path) -> None:
    """A task of shimmy's under another id, cut to four steps, which rl_zoo3 finds in its module for tasks of one's own."""
    (tmp_path / "custom_envs.py").write_text("""
import gymnasium as gym
import shimmy

gym.register("dm_control/short-v0", gym.spec("dm_control/cartpole-balance-v0").entry_point, max_episode_steps=4)
""")
    (tmp_path / "pixels.yml").write_text("""
default:
  n_timesteps: 10
  policy: CnnPolicy
  learning_starts: 6
  buffer_size: 20
  batch_size: 4
  policy_kwargs: "dict(net_arch=[8])"
  env_kwargs: {pixels: True, image_size: 40}
""")
    command = "train --algo mfpo --env dm_control/short-v0 --conf-file pixels.yml --eval-freq 5 --eval-episodes 1"
    zoo(tmp_path, command, PYTHONPATH=str(tmp_path))
    run = tmp_path / "logs" / "mfpo" / "dm_control-short-v0_1"
    assert np.load(run / "evaluations.npz")["ep_lengths"].tolist() == [[4], [4]]
    assert MFPO.load(run / "dm_control-short-v0.zip", buffer_size=1).observation_space.shape == (3, 40, 40)
    output = zoo(tmp_path, "enjoy --algo mfpo --env dm_control/short-v0 -f logs -n 8", PYTHONPATH=str(tmp_path))
    assert "No display" in output and "2 Episodes" in output
    zoo(tmp_path, "record-video --algo mfpo --env dm_control/short-v0 -f logs -o videos -n 6", PYTHONPATH=str(tmp_path))
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert count_frames(video) in (6, 7)


def save_untrained(algorithm: type[MFPO], task: str, folder: Path) -> None:
    model = make_model(algorithm, gym.make(task))
    (path := folder / "logs" / algorithm.__name__.lower() / f"{task.replace('/', '-')}_1").mkdir(parents=True)
    model.save(path / task.replace("/", "-"))


@needs_renderer
def test_record_video_of_a_dm_control_task_from_states(tmp_path: Path) -> None:
    register_dm_control()
    register()
    save_untrained(MFPO, "dm_control/cartpole-balance-v0", tmp_path)
    zoo(tmp_path, "record-video --algo mfpo --env dm_control/cartpole-balance-v0 -f logs -o videos -n 6")
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert count_frames(video) in (6, 7)


def test_record_video_of_classic_control_needs_no_renderer(tmp_path: Path) -> None:
    """No renderer of MuJoCo works for this platform of PyOpenGL."""
    save_untrained(MFPO, "Pendulum-v1", tmp_path)
    zoo(tmp_path, "record-video --algo mfpo --env Pendulum-v1 -f logs -o videos -n 6", PYOPENGL_PLATFORM="nonsense")
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert count_frames(video) in (6, 7)


def test_record_video_where_nothing_renders(tmp_path: Path) -> None:
    save_untrained(MFPO, TASK, tmp_path)
    command = f"record-video --algo mfpo --env {TASK} -f logs -n 6"
    output = zoo(tmp_path, command, code=2, PYOPENGL_PLATFORM="nonsense")
    assert output.strip().splitlines()[-1] == f"error: {NO_RENDERER}"


def count_frames(video: Path) -> int:
    from moviepy import VideoFileClip

    with VideoFileClip(str(video)) as clip:
        frames = [frame for frame in clip.iter_frames()]
    assert frames[0].std() > 1
    return len(frames)


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_plots(runs: Path, tmp_path: Path) -> None:
    logs = runs / "logs"
    output = zoo(tmp_path, f"plot-train -a som -e {TASK} -f {logs} -w 2", MPLBACKEND="agg")
    assert "saved figure_1.png" in output and is_png(tmp_path / "figure_1.png")
    (tmp_path / "figure_1.png").unlink()
    output = zoo(tmp_path, f"all-plots -a mfpo sac -e {TASK} -f {logs} -o results", MPLBACKEND="agg")
    assert "MFPO" in output and "SAC" in output and is_png(tmp_path / "figure_1.png")
    zoo(tmp_path, "plot-from-file -i results.pkl -o curves.png --format png", MPLBACKEND="agg")
    assert is_png(tmp_path / "curves.png")


@pytest.mark.nightly
def test_two_processes_work_on_one_study(tmp_path: Path) -> None:
    """A journal file; then a run takes the hyperparameters of one of the trials."""
    study = "--storage study/reacher.log --study-name reacher"
    search = (
        f"train --algo mfpo --env {TASK} -n 40 -optimize --n-trials 2 --n-startup-trials 1 --n-evaluations 2 {study} "
        "--eval-episodes 1 --no-optim-plots -params learning_starts:30 batch_size:8"
    )
    processes = [start(tmp_path, search) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study/reacher.log")))
    trials = optuna.load_study(storage=storage, study_name="reacher").trials
    assert len(trials) == 4
    assert all(trial.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED) for trial in trials)
    reports = list((tmp_path / "logs" / "mfpo").glob("report_*.csv"))
    assert reports and len(list(csv.DictReader(reports[0].open()))) >= 2

    zoo(tmp_path, f"train --algo mfpo --env {TASK} -n 20 --eval-freq -1 {study} --trial-id 1 -f best")
    model = MFPO.load(tmp_path / "best" / "mfpo" / f"{TASK}_1" / f"{TASK}.zip")
    assert model.policy.sampling_steps == trials[1].params["sampling_steps"]
    assert model.policy_delay == trials[1].params["policy_delay"]


def test_trials_that_end_with_an_error_are_pruned(tmp_path: Path) -> None:
    """A task of another package, whose rewards become NaN: MFPO stops with a ValueError."""
    (tmp_path / "broken_tasks.py").write_text("""
import gymnasium as gym
import numpy as np

class Broken(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    steps = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), np.nan if self.steps > 12 else 0.0, False, False, {}

gym.register("Broken-v0", Broken, max_episode_steps=50)
""")
    search = "train --algo mfpo --env Broken-v0 --gym-packages broken_tasks -n 20 -optimize --n-trials 1 --n-evaluations 1"
    # rl_zoo3 ends with an error when no trial is left
    output = zoo(tmp_path, f"{search} --storage study.log --study-name broken", code=1, PYTHONPATH=str(tmp_path))
    assert "Environment 0 returned a non-finite reward" in output
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
    (trial,) = optuna.load_study(storage=storage, study_name="broken").trials
    assert trial.state == optuna.trial.TrialState.PRUNED


def test_a_study_in_a_database(tmp_path: Path) -> None:
    search = f"train --algo som --env {TASK} -n 4 -optimize --n-trials 1 --n-evaluations 1 --eval-episodes 1 --no-optim-plots"
    zoo(tmp_path, f"{search} --storage sqlite:///study.db --study-name reacher")
    assert len(optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="reacher").trials) == 1


def test_a_dm_control_task(tmp_path: Path) -> None:
    task = "dm_control/cartpole-balance-v0"
    small = 'policy_kwargs:"dict(net_arch=[8])"'.replace('"', "")
    output = zoo(tmp_path, f"train --algo mfpo --env {task} -n 1010 --eval-freq -1 -params learning_starts:1005 {small}")
    assert "Using 'default' hyperparameters" in output
    output = zoo(tmp_path, f"enjoy --algo mfpo --env {task} -f logs --no-render -n 1000")
    assert "Episode Length 1000" in output


def test_normalisation_of_a_task_that_is_not_listed(tmp_path: Path) -> None:
    task = "MountainCarContinuous-v0"
    params = "-params learning_starts:100 normalize:True policy_kwargs:dict(net_arch=[8])"
    zoo(tmp_path, f"train --algo mfpo --env {task} -n 110 --eval-freq -1 {params}")
    assert (tmp_path / "logs" / "mfpo" / f"{task}_1" / task / "vecnormalize.pkl").exists()
    output = zoo(tmp_path, f"enjoy --algo mfpo --env {task} -f logs --no-render -n 20")
    assert "Loading running average" in output


def test_options_are_read_as_rl_zoo3_reads_them(tmp_path: Path) -> None:
    """Shortened, with a dash, with an equals sign; a file and a task of one's own."""
    (tmp_path / "own_tasks.py").write_text("import gymnasium as gym\ngym.register('Own-v0', 'tests.test_envs:OwnTask')")
    (tmp_path / "own.yml").write_text("Own-v0: {policy: MlpPolicy, n_timesteps: 20, gamma: 0.123}")
    command = "train --al som --env=Own-v0 --gym-pack own_tasks --conf own.yml --eval-f -1 --hyper learning_starts:18"
    zoo(tmp_path, command, PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)]))
    run = tmp_path / "logs" / "som" / "Own-v0_1"
    model = SOM.load(run / "Own-v0.zip", buffer_size=1)
    assert (model.gamma, model.learning_starts, model.num_timesteps) == (0.123, 18, 20)
    assert yaml.unsafe_load((run / "Own-v0" / "args.yml").read_text())["conf_file"] == "own.yml"


BAD_FILES = {
    "broken.yml": b"Reacher-v5: [unclosed",
    "empty.yml": b"Hopper-v5: {}",
    "nothing.yml": b"",
    "latin.yml": "Reacher-v5: {policy: 'Größe'}".encode("latin-1"),
    "list.yml": b"Reacher-v5: [gamma, 0.9]",
    "steps.yml": b"default: {policy: MlpPolicy}",
    "settings.py": b"hyperparameters = {}",
    "failing.py": b"1 / 0",
    "failing_module.py": b"import no_such_package",
}
BAD_INPUT = {
    "train --algo mfpo --env Reacher-v5 -conf latin.yml": "error: --conf-file latin.yml: UnicodeDecodeError: 'utf-8' codec",
    "train --algo mfpo --env Reacher-v5 -conf .yml": "error: --conf-file .yml: IsADirectoryError: [Errno 21]",
    "train --algo mfpo --env Reacher-v5 --conf list.yml": "error: --conf-file list.yml: `Reacher-v5` must be a mapping",
    "train --algo mfpo --env Reacher-v5 --conf nothing.yml": "error: --conf-file nothing.yml: neither `Reacher-v5` nor",
    "train --algo sac --env Reacher-v5 -conf steps.yml": "error: --conf-file steps.yml: `default` has no `n_timesteps`",
    "train --algo mfpo --env Reacher-v5 -conf settings.py": "error: --conf-file settings.py: KeyError: 'hyperparams'",
    "train --algo mfpo --env Reacher-v5 -conf failing.py": "error: --conf-file failing.py: ZeroDivisionError: division",
    "train --algo mfpo --env Reacher-v5 -conf failing_module": "error: --conf-file failing_module: ModuleNotFoundError: No",
    "train --algo mfpo --env Reacher-v5 -conf sb3_mfpo.envs": "error: --conf-file sb3_mfpo.envs: AttributeError: module",
    "train --algo mfpo --env Reacher-v5 --eval 5": "sb3_mfpo.zoo train: error: ambiguous option: --eval could match",
    "train --algo mfpo --env Reacher-v5 -params policy:CnnPolicy": "error: arguments cannot be read (NameError: name 'Cnn",
    "train --algo mfpo --env Reacher-v5 -i none.zip": "error: --trained-agent none.zip: there is no such .zip file",
    "train --algo mfpo --env Reacher-v5 --trial-id 0": "error: --trial-id 0: also give --storage and --study-name",
    "train --algo mfpo --env Reacher-v55": "error: unknown task Reacher-v55, did you mean Reacher-v5?",
    "train --algo mfpo --env dm_control/dogrun-v0": "error: unknown task dm_control/dogrun-v0, did you mean dm_control/",
    "train --algo mfpo --env h1-walk-v0": "error: h1-walk-v0 is a task of HumanoidBench",
    "train --algo mfpo --env Reacher-v5 --gym-packages no_tasks": "error: --gym-packages no_tasks: No module named 'no_tasks'",
    "train --algo mfop --env Reacher-v5": "sb3_mfpo.zoo train: error: argument --algo: invalid choice: 'mfop'",
    "train --algo mfpo --env Reacher-v5 -conf broken.yml": "error: --conf-file broken.yml: ParserError: while parsing",
    "train --algo mfpo --env Reacher-v5 --conf-file none.yml": "error: --conf-file none.yml: FileNotFoundError: [Errno 2] No",
    "train --algo mfpo --env Reacher-v5 -conf empty.yml": "error: --conf-file empty.yml: neither `Reacher-v5` nor `default`",
    "trian --algo mfpo": "error: unknown command 'trian', choose from train, enjoy",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_done(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: they end before anything is done."""
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".yml").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sb3_mfpo.zoo", *command.split()])
    read_arguments = argparse.ArgumentParser.parse_args
    with pytest.raises(SystemExit) as end:
        main()
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and last_line.startswith(BAD_INPUT[command]), last_line
    assert not (tmp_path / "logs").exists()
    assert argparse.ArgumentParser.parse_args is read_arguments


def test_bad_input_ends_the_process(tmp_path: Path) -> None:
    output = zoo(tmp_path, "train --algo mfpo --env Reacher-v55", code=2)
    assert output.strip().splitlines()[-1] == "error: unknown task Reacher-v55, did you mean Reacher-v5?"


def test_a_task_of_humanoid_bench(tmp_path: Path) -> None:
    write_humanoid_bench(tmp_path)
    command = "train --algo mfpo --env h1-walk-v0 --gym-packages humanoid_bench -n 12 --eval-freq -1 -params learning_starts:8"
    zoo(tmp_path, command, PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)]))
    model = MFPO.load(tmp_path / "logs" / "mfpo" / "h1-walk-v0_1" / "h1-walk-v0.zip", buffer_size=1)
    assert model.num_timesteps == 12 and model.observation_space.shape == (2,)


@pytest.mark.skipif(importlib.util.find_spec("humanoid_bench") is not None, reason="HumanoidBench is installed")
def test_a_missing_humanoid_bench(tmp_path: Path) -> None:
    output = zoo(tmp_path, "train --algo mfpo --env h1-walk-v0 --gym-packages humanoid_bench", code=2)
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: --gym-packages humanoid_bench: Tasks of HumanoidBench need it") and "--no-deps -e" in last


@pytest.mark.parametrize("package, extra, task", [("rl_zoo3", "zoo", TASK), ("shimmy", "dmc", "dm_control/dog-run-v0")])
def test_a_missing_extra(package: str, extra: str, task: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('not here')")
    output = zoo(tmp_path, f"train --algo mfpo --env {task}", code=2, PYTHONPATH=str(tmp_path))
    assert f"sb3-mfpo[{extra}]" in output.strip().splitlines()[-1]


def test_help_lists_the_commands() -> None:
    for command in ("", "--help"):
        output = zoo(Path.cwd(), command)
        assert all(name in output for name in (*COMMANDS, "doctor"))
    assert "mfpo" in zoo(Path.cwd(), "load-from-hub --help")
    assert "mfpo" in zoo(Path.cwd(), "push-to-hub --help")


@needs_renderer
def test_the_commands_of_the_manual(tmp_path: Path) -> None:
    """As printed, with shorter episodes, fewer steps and no window."""
    root = Path(__file__).parent.parent
    block = re.findall(r"```bash\n(.*?)```", (root / "docs" / "zoo.md").read_text(), flags=re.DOTALL)[0]
    lines = block.strip().splitlines()
    assert len(lines) == 5
    assert "\n".join(lines[:2]) in (root / "README.md").read_text()
    for line in lines:
        command = line.removeprefix("python -m sb3_mfpo.zoo ").replace("HalfCheetah-v5", TASK).replace("-n 500", "-n 20")
        command = command.replace("dog-run", "cartpole-balance")
        if "-optimize" in command:
            command += (
                " -n 1010 --n-trials 1 --n-evaluations 1 --eval-episodes 1 --no-optim-plots -params learning_starts:1005"
            )
        elif command.startswith("train"):
            command += " -n 620 --eval-freq -1 -params learning_starts:600"
        elif command.startswith("enjoy"):
            command += " --no-render -n 50"
        elif command.startswith("plot"):
            command += " -w 2"
        zoo(tmp_path, command, MPLBACKEND="agg")
    assert is_png(tmp_path / "figure_1.png") and (tmp_path / "study.log").exists()
    assert list((tmp_path / "logs").rglob("*.mp4"))


def test_every_command_of_rl_zoo3_is_offered() -> None:
    """Every module that runs as a script, except the one that calls a file of rl_zoo3's repository by name."""
    scripts = set()
    for package in (rl_zoo3, rl_zoo3.plots):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            spec = importlib.util.find_spec(module.name)
            assert spec is not None and spec.origin is not None
            if not module.ispkg and '__name__ == "__main__"' in Path(spec.origin).read_text():
                scripts.add(module.name)
    assert scripts - {"rl_zoo3.benchmark", "rl_zoo3.cli"} <= set(COMMANDS.values()) <= scripts | {"rl_zoo3.plots.plot_train"}
    assert {"rl_zoo3.train", "rl_zoo3.enjoy", "rl_zoo3.record_video"} <= set(COMMANDS.values())


# In this process


def test_registration_adds_the_algorithms_to_rl_zoo3() -> None:
    register_dm_control()
    register()
    register()
    for name, algorithm in {"mfpo": MFPO, "som": SOM, "sac": SAC}.items():
        assert issubclass(utils.ALGOS[name], algorithm) and utils.ALGOS[name].__name__ == algorithm.__name__
    assert set(ALGORITHMS) <= set(hyperparams_opt.HYPERPARAMS_SAMPLER) & set(hyperparams_opt.HYPERPARAMS_CONVERTER)
    entry_point = gym.spec("dm_control/dog-run-v0").entry_point
    assert isinstance(entry_point, ReadyEntryPoint) and not isinstance(entry_point.entry_point, ReadyEntryPoint)
    assert gym.make("dm_control/dog-run-v0").observation_space.shape == (223,)


def test_the_model_card_of_the_hub(tmp_path: Path) -> None:
    """What `push-to-hub` writes before it uploads."""
    register()
    from rl_zoo3.push_to_hub import generate_model_card, save_model_card

    card, entries = generate_model_card("mfpo", "MFPO", "someone", TASK, -5.0, 1.0, {"gamma": 0.9}, {})
    save_model_card(tmp_path, card, entries)
    text = (tmp_path / "README.md").read_text()
    assert "**MFPO** Agent playing **Reacher-v5**" in text and "-5.00 +/- 1.00" in text


# The hub, as a folder: what rl_zoo3's commands ask huggingface_hub for
OFFLINE_HUB = """
import shutil, sys
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub.errors import RemoteEntryNotFoundError

hub = Path("hub_server").resolve()

def snapshot_download(self, repo_id, local_dir):
    (hub / repo_id).mkdir(parents=True, exist_ok=True)
    shutil.copytree(hub / repo_id, local_dir, dirs_exist_ok=True)

def upload_folder(self, repo_id, folder_path, commit_message):
    shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)

def hf_hub_download(repo_id, filename, **kwargs):
    path = hub / repo_id / filename
    if not path.is_file():
        request = httpx2.Request("GET", "https://huggingface.co")
        raise RemoteEntryNotFoundError("no such file", response=httpx2.Response(404, request=request))
    return str(path)

huggingface_hub.HfApi.create_repo = lambda self, repo_id, **kwargs: repo_id
huggingface_hub.HfApi.snapshot_download = snapshot_download
huggingface_hub.HfApi.upload_folder = upload_folder
huggingface_hub.hf_hub_download = hf_hub_download

from sb3_mfpo.zoo.__main__ import main

main()
"""
# It rewards the repetition of an action. Episodes have five and six steps in turn.
REPETITION = """
import gymnasium as gym
import numpy as np

class Repetition(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    # Some may be at a bound, never all
    action_space = gym.spaces.Box(-1, 1, (8,), np.float32)
    episodes = 0

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        self.steps, self.last = 0, None
        return np.zeros(2, np.float32), {}

    def step(self, action):
        repeated, self.last = self.last is not None and np.array_equal(action, self.last), action.copy()
        self.steps += 1
        return np.zeros(2, np.float32), float(repeated), self.steps == 5 + self.episodes % 2, False, {}

gym.register("Repetition-v0", Repetition)
"""


def hub_command(folder: Path, command: str) -> str:
    path = os.pathsep.join([str(folder), str(Path(__file__).parent.parent)])
    environment = bare_environment(PYTHONPATH=path, TRUST_REMOTE_CODE="True")
    line = [sys.executable, "-c", OFFLINE_HUB, *command.split()]
    run = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_a_model_on_the_hub(tmp_path: Path) -> None:
    """
    Pushed, loaded and played by the commands of its card. The best of ten candidates is the same action at every step, which
    is rewarded four and five times in turn; two samples are never the same.
    """
    # rl_zoo3 finds tasks of one's own in this module
    (tmp_path / "custom_envs.py").write_text(REPETITION)
    model = "--algo som --env Repetition-v0"
    small = "-params learning_starts:15 policy_kwargs:dict(net_arch=[8])"
    hub_command(tmp_path, f"train {model} --seed 7 -n 20 --eval-freq -1 {small} -f trained")
    hub_command(tmp_path, f"push-to-hub {model} -f trained -orga someone -name copy --no-render")

    card = (tmp_path / "hub_server/someone/copy/README.md").read_text()
    assert "| deterministic: the best of 10 | 4.50 | 0.50 | 10 |" in card
    assert "| single samples | 0.00 | 0.00 | 10 |" in card
    # The number that the hub lists
    assert "value: 4.50 +/- 0.50" in card
    assert "Number of training seeds: 1 (seed 7)" in card
    for name in ("sb3-mfpo", "stable-baselines3", "torch", "gymnasium", "rl_zoo3"):
        assert f"{name} {metadata.version(name)}" in card
    assert "after 20 steps" in card and "('learning_starts', 15)" in card
    assert "rl_zoo3." not in card
    commands = re.findall(r"python -m sb3_mfpo\.zoo (.*)", card)
    assert [command.split()[0] for command in commands] == ["load-from-hub", "enjoy", "train", "push-to-hub"]
    for command in commands[:2]:
        output = hub_command(tmp_path, command + " --no-render -n 12" * command.startswith("enjoy"))
    assert "Mean reward: 4.50" in output
    loaded, pushed = (tmp_path / f"{folder}/som/Repetition-v0_1/Repetition-v0.zip" for folder in ("logs", "trained"))
    weights = [SOM.load(path, buffer_size=1).policy.state_dict() for path in (loaded, pushed)]
    assert all(th.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("deterministic", [True, False])
def test_both_ways_of_acting_are_evaluated(deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of the file are those of the way that is asked for. Models of SB3 are evaluated as before."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "repetition.py").write_text(REPETITION)
    env = DummyVecEnv([lambda: Monitor(gym.make("repetition:Repetition-v0"))])
    expected = {True: (4.5, 0.5), False: (0.0, 0.0)}
    assert evaluate_both_ways(make_model(MFPO, env), env, 4, deterministic, tmp_path) == expected[deterministic]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["mean_reward"], results["is_deterministic"]) == (expected[deterministic][0], deterministic)
    ways = {way["is_deterministic"]: (way["mean_reward"], way["std_reward"]) for way in results["ways_of_acting"]}
    assert ways == expected and {way["n_eval_episodes"] for way in results["ways_of_acting"]} == {4}

    sac = SAC("MlpPolicy", env, policy_kwargs=dict(net_arch=[8]), buffer_size=10)
    evaluate_both_ways(sac, env, 2, deterministic, tmp_path)
    assert "ways_of_acting" not in json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_models_that_only_act_have_a_tiny_replay_buffer(name: str, tmp_path: Path) -> None:
    make_model(ALGORITHMS[name]).learn(20).save(tmp_path / "model")
    register(playing=True)
    try:
        model = utils.ALGOS[name].load(tmp_path / "model")
        assert model.replay_buffer.buffer_size == 1
        assert type(model) is ALGORITHMS[name] and utils.ALGOS[name].__name__ == name.upper()
    finally:
        register()


def entries_with_installed_tasks(name: str) -> list[str]:
    register_dm_control()
    return [task for task in HYPERPARAMS[name] if task in gym.registry]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_hyperparameter_files_list_the_tasks(name: str) -> None:
    mujoco = ("Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid", "InvertedPendulum", "InvertedDoublePendulum")
    wanted = {f"{name}-v5" for name in (*mujoco, "Reacher", "Swimmer")} | {"Pendulum-v1", "default"}
    hard = (
        "dog-stand",
        "dog-walk",
        "dog-trot",
        "dog-run",
        "humanoid-stand",
        "humanoid-walk",
        "humanoid-run",
        "humanoid_CMU-run",
    )
    easier = ("cheetah-run", "walker-run", "hopper-hop", "quadruped-run", "acrobot-swingup", "finger-turn_hard", "fish-swim")
    wanted |= {f"dm_control/{name}-v0" for name in (*hard, *easier)}
    assert wanted <= set(HYPERPARAMS[name])
    assert wanted - {"default"} <= set(entries_with_installed_tasks(name))
    for robot in ("h1-", "h1hand-"):
        assert any(task.startswith(robot) for task in HYPERPARAMS[name])


@pytest.mark.parametrize(
    "name, task", [(name, task) for name in ALGORITHMS for task in [*entries_with_installed_tasks(name), "default"]]
)
def test_every_entry_of_the_hyperparameter_files_trains(name: str, task: str) -> None:
    register()
    settings = dict(HYPERPARAMS[name][task])
    assert settings.pop("n_timesteps") >= 10_000
    settings = ExperimentManager._preprocess_schedules(settings)
    settings |= dict(policy_kwargs=eval(settings.get("policy_kwargs", "{}")), learning_starts=8, batch_size=4, buffer_size=50)
    env_id = "MountainCarContinuous-v0" if task == "default" else task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ALGORITHMS[name](env=gym.make(env_id), seed=0, **settings).learn(10)  # type: ignore[call-arg]
    assert model._n_updates == 2
    assert np.isfinite(model.predict(model.observation_space.sample())[0]).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_point_of_the_search_space_is_valid(name: str) -> None:
    """Sampled hyperparameters make a model, and those of a stored trial are the same."""
    register()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        extra = {"using_her_replay_buffer": False, "her_kwargs": {}}
        settings = hyperparams_opt.HYPERPARAMS_SAMPLER[name](trial, 0, 1, extra)
        assert hyperparams_opt.HYPERPARAMS_CONVERTER[name](trial.params) == settings
        model = ALGORITHMS[name]("MlpPolicy", "Pendulum-v1", buffer_size=10, **settings)  # type: ignore[call-arg]
        assert model.gamma == 1 - trial.params["one_minus_gamma"]
        assert model.policy_delay == trial.params["policy_delay"]
        if isinstance(model, MFPO):
            assert model.target_entropy == pytest.approx(-trial.params["rho"])
            assert model.policy.sampling_steps == trial.params["sampling_steps"]
        else:
            assert model.inverse_temperature == trial.params["inverse_temperature"]
            assert model.n_samples == trial.params["n_samples"]


def make_manager(folder: Path, **kwargs: Any) -> Manager:
    """rl_zoo3's experiment with our algorithm, the file "own.yml" and a short task."""
    register()
    if "Own-v0" not in gym.registry:
        gym.register("Own-v0", OwnTask, max_episode_steps=5)
    arguments = dict(algo="mfpo", env_id="Own-v0", eval_freq=-1, n_eval_episodes=1, device="cpu", seed=0, log_interval=-1)
    settings = {**arguments, "log_folder": str(folder / "logs"), "config": str(folder / "own.yml"), **kwargs}
    return Manager(argparse.Namespace(), **settings)


TRIAL = dict(learning_rate=1e-3, one_minus_gamma=0.1, tau=0.01, policy_delay=1, net_arch="small")
OWN_PARAMS = {"mfpo": dict(rho=0.5, n_gaussian_samples=12, n_local_samples=6, sampling_steps=3)}
OWN_PARAMS["som"] = dict(inverse_temperature=9.0, n_samples=8)
FILE = """
default:
  n_timesteps: 12
  policy: MlpPolicy
  learning_starts: 8
  batch_size: 4
  policy_kwargs: "dict(value_init='narrow', n_critics=3, n_atoms=11, activation_fn=nn.Tanh)"
  callback: [{sb3_mfpo.RunCheckpointCallback: {save_freq: 5, save_path: FOLDER}}]
"""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_trial_keeps_hyperparameters_that_it_has_not_sampled(name: str, tmp_path: Path) -> None:
    """The search, and training with a trial of it: the same hyperparameters, those of the file where nothing was sampled."""
    (tmp_path / "own.yml").write_text(FILE.replace("FOLDER", str(tmp_path / "checkpoints")))
    params = {**TRIAL, **OWN_PARAMS[name]}
    search = make_manager(tmp_path, algo=name, optimize_hyperparameters=True, optimization_log_path=str(tmp_path / "best"))
    assert search.setup_experiment() is None
    # Twice: each would be another run in the folder of checkpoints
    for number in range(2):
        search.objective(optuna.trial.FixedTrial(params, number=number))  # type: ignore[arg-type]
    assert not (tmp_path / "checkpoints").exists()
    searched = ALGORITHMS[name].load(tmp_path / "best" / "trial_0" / "best_model.zip")
    expected = dict(value_init="narrow", n_critics=3, n_atoms=11, activation_fn=th.nn.Tanh, net_arch=[64, 64])
    expected |= dict(sampling_steps=3) if name == "mfpo" else {}
    assert searched.policy_kwargs == expected
    assert (searched.gamma, searched.learning_starts, searched.batch_size) == (0.9, 8, 4)

    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=storage, study_name="own", direction="maximize")
    study.enqueue_trial(params)
    trial = study.ask()
    hyperparams_opt.HYPERPARAMS_SAMPLER[name](trial, 0, 1, {})
    study.tell(trial, 0.0)
    of_trial: dict[str, Any] = dict(algo=name, storage=storage, study_name="own", trial_id=0)
    results = make_manager(tmp_path, **of_trial).setup_experiment()
    assert results is not None
    model, saved = results
    assert model.policy_kwargs == saved["policy_kwargs"] == expected and model.gamma == 0.9

    # The command line overrides both
    results = make_manager(tmp_path, **of_trial, hyperparams=dict(gamma=0.5, policy_kwargs=dict(n_atoms=7))).setup_experiment()
    assert results is not None and results[0].gamma == 0.5
    assert results[0].policy_kwargs == dict(
        n_atoms=7, **{key: expected[key] for key in expected.keys() - {*UNSAMPLED, "n_atoms"}}
    )


def test_trial_0_of_an_algorithm_of_rl_zoo3_is_used(tmp_path: Path) -> None:
    """Its number is 0. Keyword arguments are replaced, as in rl_zoo3."""
    (tmp_path / "own.yml").write_text("default: {policy: MlpPolicy, n_timesteps: 9, policy_kwargs: 'dict(log_std_init=-3)'}")
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=storage, study_name="own")
    trial = study.ask()
    sampled = hyperparams_opt.HYPERPARAMS_SAMPLER["sac"](trial, 1, 1, dict(using_her_replay_buffer=False))
    study.tell(trial, 0.0)
    manager = make_manager(tmp_path, algo="sac", storage=storage, study_name="own", trial_id=0)
    hyperparams, _ = manager.read_hyperparameters()
    assert hyperparams["policy_kwargs"] == sampled["policy_kwargs"] and hyperparams["gamma"] == sampled["gamma"]


# ``-params policy_kwargs:...`` takes the place of the file's, as in rl_zoo3
UNSAMPLED = ("value_init", "n_critics", "activation_fn")


def test_merging_hyperparameters() -> None:
    below = dict(gamma=0.9, policy_kwargs="dict(a=1, b=nn.ReLU)", replay_buffer_kwargs=dict(c=1), train_freq=4, x=dict(d=1))
    above = dict(tau=0.1, policy_kwargs=dict(a=2), replay_buffer_kwargs="dict(e=2)", train_freq=[1, "episode"], x=None)
    expected = dict(gamma=0.9, tau=0.1, policy_kwargs=dict(a=2, b=th.nn.ReLU), replay_buffer_kwargs=dict(c=1, e=2))
    expected |= dict(train_freq=[1, "episode"], x=None)
    assert merged(below, above) == expected
    hyperparameters = Hyperparameters(below)
    trial = hyperparameters.copy()
    trial.update(above)
    assert dict(trial) == expected and dict(hyperparameters) == below


def test_a_resumed_run_keeps_its_hyperparameters_and_takes_outputs_from_the_call(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Outputs, device and steps are those of the call, hyperparameters and random state those of the run."""
    (tmp_path / "own.yml").write_text("default: {policy: MlpPolicy, n_timesteps: 60, gamma: 0.5, learning_starts: 0}")
    run = make_model(MFPO, OwnTask(), seed=3, gamma=0.8, verbose=1)
    run.learn(20, callback=RunCheckpointCallback(20, tmp_path))
    # Not the run's: with a model that is no run, rl_zoo3 would load it
    (tmp_path / "replay_buffer.pkl").write_bytes(b"of another run")
    manager = make_manager(
        tmp_path,
        trained_agent=str(tmp_path / "run_20_steps.zip"),
        hyperparams=dict(batch_size=100),
        tensorboard_log=str(tmp_path / "tb"),
        n_timesteps=30,
        verbose=0,
        seed=5,
    )
    results = manager.setup_experiment()
    assert results is not None
    output = capsys.readouterr().out
    assert "Going on with the run in" in output and "not applied: -params batch_size\n" in output
    model: Any = results[0]
    assert (model.gamma, model.batch_size, model.learning_starts, model.seed) == (0.8, 8, 10, 3)
    assert model.replay_buffer.size() == 20 and model._n_updates == run._n_updates
    manager.learn(model)
    assert model.num_timesteps == 30
    assert list((tmp_path / "tb" / "Own-v0").rglob("events.out.tfevents.*"))
    assert capsys.readouterr().out == ""


@needs_renderer
def test_environments_that_render_get_a_renderer(
    bare: None,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MuJoCo's, in training and in play; what does not render does not look for one."""
    (tmp_path / "own.yml").write_text("default: {policy: MlpPolicy, n_timesteps: 10}")
    silent = make_manager(tmp_path, env_id=TASK)
    silent.create_envs(1).reset()
    create_test_env(TASK, should_render=False, hyperparams={})
    assert "MUJOCO_GL" not in os.environ
    rendering = make_manager(tmp_path, env_id=TASK, env_kwargs=dict(render_mode="rgb_array"), eval_env_kwargs={})

    def is_rendered(env: VecEnv) -> bool:
        env.reset()
        frame = env.render()
        return frame is not None and frame.std() > 1

    assert is_rendered(rendering.create_envs(1))
    assert os.environ["MUJOCO_GL"] in ("egl", "osmesa", "glfw")
    monkeypatch.delenv("MUJOCO_GL")
    assert is_rendered(create_test_env(TASK, hyperparams=dict(env_kwargs=dict(render_mode="rgb_array"))))


def test_custom_tasks_under_dm_control_stay_as_they_are() -> None:
    register_dm_control()
    gym.register("dm_control/own-task-v0", OwnTask, kwargs=dict(scale=5.0), max_episode_steps=50)
    try:
        spec = gym.spec("dm_control/own-task-v0")
        register()
        assert gym.spec("dm_control/own-task-v0") is spec
        env = gym.make("dm_control/own-task-v0")
        env.reset()
        steps = [env.step(env.action_space.sample()) for _ in range(50)]
        assert {reward for _, reward, *_ in steps} == {5.0}
        assert [truncated for *_, truncated, _ in steps] == [False] * 49 + [True]
    finally:
        del gym.registry["dm_control/own-task-v0"]
