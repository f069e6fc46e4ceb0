"""rl_zoo3 with our algorithms: the real commands on small budgets, in processes of their own."""

import csv
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3
import rl_zoo3.plots
import yaml
from rl_zoo3 import hyperparams_opt, utils
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import SAC

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.envs import ReadyEntryPoint, register_dm_control
from sb3_mfpo.zoo.__main__ import COMMANDS
from sb3_mfpo.zoo.registration import ALGORITHMS, hyperparameter_file, register
from tests.helpers import make_model
from tests.test_envs import needs_renderer

TASK = "Reacher-v5"
HYPERPARAMS = {name: yaml.safe_load(hyperparameter_file(name).read_text()) for name in ALGORITHMS}


def start(folder: Path, command: str, **environment: str) -> subprocess.Popen:
    """Run a command of the zoo in a folder, one thread each."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", **environment}
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
    assert model.policy.v_max == 10
    # TensorBoard and, offline, Weights & Biases, which takes the logs to its own folder
    assert list((runs / "runs").rglob("events.out.tfevents.*"))
    assert list((runs / "wandb").glob("offline-run-*"))


def test_settings_of_the_paper_by_name(tmp_path: Path) -> None:
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


def test_enjoy(runs: Path) -> None:
    for model in ("", "--load-best", "--load-checkpoint 600"):
        output = zoo(runs, f"enjoy --algo mfpo --env {TASK} --exp-id 1 -f logs --no-render -n 100 {model}")
        assert "Mean reward" in output and "2 Episodes" in output
    assert "SAC" not in output
    for other in ("som", "sac"):
        assert "Mean reward" in zoo(runs, f"enjoy --algo {other} --env {TASK} -f logs --no-render -n 100")
    model = SOM.load(runs / "logs" / "som" / f"{TASK}_1" / f"{TASK}.zip")
    assert model.num_timesteps == 620 and model.gamma == HYPERPARAMS["som"][TASK]["gamma"]


def test_resume(runs: Path, tmp_path: Path) -> None:
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
def test_record_training(runs: Path) -> None:
    zoo(runs, f"record-training --algo mfpo --env {TASK} --exp-id 1 -f logs -n 20")
    video = runs / "logs" / "mfpo" / f"{TASK}_1" / "videos" / "training.mp4"
    # The checkpoint, the best and the last model
    assert count_frames(video) >= 3 * 20


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


def test_two_processes_share_a_study(tmp_path: Path) -> None:
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
    assert model.policy.v_max == trials[1].params["value_range"]


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


def test_a_database_holds_a_study(tmp_path: Path) -> None:
    search = f"train --algo som --env {TASK} -n 4 -optimize --n-trials 1 --n-evaluations 1 --eval-episodes 1 --no-optim-plots"
    zoo(tmp_path, f"{search} --storage sqlite:///study.db --study-name reacher")
    assert len(optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="reacher").trials) == 1


def test_a_dm_control_task(tmp_path: Path) -> None:
    task = "dm_control/cartpole-balance-v0"
    small = 'policy_kwargs:"dict(net_arch=[8],v_min=-50,v_max=150)"'.replace('"', "")
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


BROKEN = "Reacher-v5: [unclosed"
BAD_INPUT = {
    "train --algo mfpo --env Reacher-v55": "error: unknown task Reacher-v55, did you mean Reacher-v5?",
    "train --algo mfpo --env dm_control/dogrun-v0": "error: unknown task dm_control/dogrun-v0, did you mean dm_control/",
    "train --algo mfpo --env h1-walk-v0": "error: h1-walk-v0 is a task of HumanoidBench",
    "train --algo mfpo --env Reacher-v5 --gym-packages humanoid_bench": "error: --gym-packages humanoid_bench: No module",
    "train --algo mfop --env Reacher-v5": "sb3_mfpo.zoo train: error: argument --algo: invalid choice: 'mfop'",
    "train --algo mfpo --env Reacher-v5 -conf broken.yml": "error: --conf-file broken.yml: while parsing",
    "train --algo mfpo --env Reacher-v5 --conf-file none.yml": "error: --conf-file none.yml: [Errno 2] No such file",
    "train --algo mfpo --env Reacher-v5 -conf empty.yml": "error: --conf-file empty.yml: neither Reacher-v5 nor `default`",
    "trian --algo mfpo": "error: unknown command 'trian', choose from train, enjoy",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input(command: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yml").write_text(BROKEN)
    (tmp_path / "empty.yml").write_text("Hopper-v5: {}")
    last_line = zoo(tmp_path, command, code=2).strip().splitlines()[-1]
    assert last_line.startswith(BAD_INPUT[command]), last_line
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("package, extra, task", [("rl_zoo3", "zoo", TASK), ("shimmy", "dmc", "dm_control/dog-run-v0")])
def test_a_missing_extra(package: str, extra: str, task: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('not here')")
    output = zoo(tmp_path, f"train --algo mfpo --env {task}", code=2, PYTHONPATH=str(tmp_path))
    assert f"sb3-mfpo[{extra}]" in output.strip().splitlines()[-1]


def test_help() -> None:
    for command in ("", "--help"):
        output = zoo(Path.cwd(), command)
        assert all(name in output for name in (*COMMANDS, "doctor"))
    assert "mfpo" in zoo(Path.cwd(), "load-from-hub --help")
    assert "mfpo" in zoo(Path.cwd(), "push-to-hub --help")


@needs_renderer
def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    """As printed, with shorter episodes, fewer steps and no window."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = re.findall(r"## Run experiments.*?```bash\n(.*?)```", readme, flags=re.DOTALL)
    lines = block.strip().splitlines()
    assert len(lines) == 5
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
    """Every module that runs as a script, but for the one that calls a file of rl_zoo3's repository by name."""
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


def test_registration() -> None:
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

    card, metadata = generate_model_card("mfpo", "MFPO", "someone", TASK, -5.0, 1.0, {"gamma": 0.9}, {})
    save_model_card(tmp_path, card, metadata)
    text = (tmp_path / "README.md").read_text()
    assert "**MFPO** Agent playing **Reacher-v5**" in text and "-5.00 +/- 1.00" in text


@pytest.mark.parametrize("name", ALGORITHMS)
def test_models_that_only_act_have_no_memory(name: str, tmp_path: Path) -> None:
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
def test_the_tasks_are_listed(name: str) -> None:
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
def test_every_entry_trains(name: str, task: str) -> None:
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
        assert model.policy.v_max == -model.policy.v_min == trial.params["value_range"]
        if isinstance(model, MFPO):
            assert model.target_entropy == pytest.approx(-trial.params["rho"])
            assert model.policy.sampling_steps == trial.params["sampling_steps"]
        else:
            assert model.inverse_temperature == trial.params["inverse_temperature"]
            assert model.n_samples == trial.params["n_samples"]
