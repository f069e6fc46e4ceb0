"""Command line: ``python -m sb3_mfpo.zoo <command> ...``, or ``sb3-mfpo-zoo <command> ...``."""

from __future__ import annotations

import argparse
import atexit
import difflib
import importlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from sb3_mfpo.envs import (
    INSTALL_HUMANOID_BENCH,
    NoRendererError,
    has_display,
    register_dm_control,
    register_humanoid_bench,
    register_robotics,
)

COMMANDS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record-video": "rl_zoo3.record_video",
    "record-training": "rl_zoo3.record_training",
    "plot-train": "rl_zoo3.plots.plot_train",
    "plot-from-file": "rl_zoo3.plots.plot_from_file",
    "all-plots": "rl_zoo3.plots.all_plots",
    "load-from-hub": "rl_zoo3.load_from_hub",
    "push-to-hub": "rl_zoo3.push_to_hub",
}
# These load a model to act with it
PLAYING = ("enjoy", "record-video", "push-to-hub")
# Packages whose tasks need a correction
REGISTER = {"gymnasium_robotics": register_robotics, "humanoid_bench": register_humanoid_bench}
PLOTTING = ("plot-train", "plot-from-file", "all-plots")
USAGE = f"""usage: python -m sb3_mfpo.zoo <command> [arguments]

rl_zoo3 (https://rl-baselines3-zoo.readthedocs.io) with --algo mfpo and --algo som. Commands:

  {", ".join(COMMANDS)}
      as in rl_zoo3; `<command> --help` lists the arguments
  doctor
      versions, device and renderer of this installation, its problems and how to fix them"""


class UserError(Exception):
    """A mistake that the user can correct, said in one line."""


def main() -> None:
    """Run a command; bad input ends with one line and exit code 2."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return
    try:
        if command == "doctor":
            from sb3_mfpo.zoo.doctor import doctor

            sys.exit(doctor())
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}, choose from {', '.join(COMMANDS)}, doctor")
        run(command, sys.argv[2:])
    except (UserError, NoRendererError) as error:
        # Keeps the order of what was printed where both streams go to one file
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(command: str, arguments: list[str]) -> None:
    """
    Run one of rl_zoo3's commands with our algorithms and tasks.

    :param command: One of ``COMMANDS``
    :param arguments: Its arguments
    :raises UserError: If something is missing or wrong that can be found before it runs
    """
    try:
        import rl_zoo3  # noqa: F401
    except ImportError as error:
        raise UserError(f"rl_zoo3 cannot be imported ({error}): install `sb3-mfpo[zoo]`") from error
    from sb3_mfpo.zoo.registration import register

    register(playing=command in PLAYING)
    if command in PLOTTING:
        save_figures_without_a_display()
    sys.argv = [f"sb3_mfpo.zoo {command}", *arguments]
    read_arguments = argparse.ArgumentParser.parse_args

    def read_and_prepare(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        # Only the first parser is the command's
        argparse.ArgumentParser.parse_args = read_arguments  # type: ignore[method-assign]
        try:
            options = read_arguments(parser, *args, **kwargs)
        except Exception as error:
            raise UserError(
                f"arguments cannot be read ({one_line(error)}): values of name:value are Python, strings need quotes of "
                "their own, as in policy:\"'CnnPolicy'\""
            ) from error
        prepare(command, options)
        return options

    argparse.ArgumentParser.parse_args = read_and_prepare  # type: ignore[method-assign,assignment]
    with warnings.catch_warnings():
        # The plots' package imports the module that is run
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        runpy.run_module(COMMANDS[command], run_name="__main__")


def prepare(command: str, options: argparse.Namespace) -> None:
    """
    Prepare what a command needs.

    :param command: One of ``COMMANDS``
    :param options: Its arguments as rl_zoo3 has read them; some are changed
    :raises UserError: If something is missing or wrong that can be found before the command runs
    """
    if command == "record-training":
        provide_ffmpeg()
        # It calls `python -m rl_zoo3.record_video`, which does not know our algorithms
        subprocess.call = record_video_with_us  # type: ignore[assignment]
    if command == "train" or command in PLAYING:
        # In all commands except `train` it is an object of rl_zoo3's
        env_id = getattr(options.env, "gym_id", options.env)
        register_task(env_id, getattr(options, "gym_packages", []))
    if command == "enjoy" and not options.no_render and not has_display():
        print("No display: nothing is shown, as with --no-render")
        options.no_render = True
    if command == "train":
        from sb3_mfpo.zoo.registration import ALGORITHMS, hyperparameter_file

        check_task(options.env)
        if options.conf_file is None and options.algo in ALGORITHMS:
            options.conf_file = str(hyperparameter_file(options.algo))
        if options.conf_file is not None:
            check_hyperparameters(options)
        check_origin(options)


def one_line(error: BaseException) -> str:
    """The error's kind and message."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def register_task(env_id: str, packages: list[str]) -> None:
    """
    :param env_id: Gymnasium id
    :param packages: Names of packages that register tasks
    :raises UserError: If a package, or what the task needs, cannot be imported
    """
    import gymnasium as gym

    from sb3_mfpo.zoo.registration import ready_dm_control

    for package in packages:
        try:
            if package in REGISTER:
                REGISTER[package]()
            else:
                importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"--gym-packages {package}: {error}") from error
    if env_id.startswith("dm_control/") and env_id not in gym.registry:
        try:
            register_dm_control()
        except ImportError as error:
            raise UserError(str(error)) from error
    ready_dm_control()


def check_task(env_id: str) -> None:
    """
    :param env_id: Gymnasium id
    :raises UserError: If there is no such task
    """
    import gymnasium as gym
    import rl_zoo3.import_envs  # noqa: F401

    if env_id in gym.registry:
        return
    if env_id.startswith(("h1-", "h1hand-")):
        raise UserError(
            f"{env_id} is a task of HumanoidBench, which is not on PyPI: {INSTALL_HUMANOID_BENCH}, and add "
            "`--gym-packages humanoid_bench`"
        )
    close = difflib.get_close_matches(env_id, gym.registry, n=1)
    hint = f", did you mean {close[0]}?" if close else "; tasks of other packages need `--gym-packages`"
    raise UserError(f"unknown task {env_id}{hint}")


def check_hyperparameters(options: argparse.Namespace) -> None:
    """
    :param options: Of ``train``, with a ``conf_file``
    :raises UserError: If the file cannot be read, or has nothing usable for the task
    """
    from rl_zoo3.exp_manager import ExperimentManager

    label = f"--conf-file {options.conf_file}"
    try:
        content = read_hyperparameters(options.conf_file)
    # A Python file may raise anything
    except Exception as error:
        raise UserError(f"{label}: {one_line(error)}") from error
    names = [options.env, *(["atari"] if ExperimentManager.is_atari(options.env) else []), "default"]
    name = next((name for name in names if name in content), None) if isinstance(content, dict) else None
    if name is None:
        raise UserError(f"{label}: neither {' nor '.join(f'`{name}`' for name in names)} is in it")
    if not isinstance(content[name], dict):
        raise UserError(f"{label}: `{name}` must be a mapping of hyperparameters to values, not {content[name]!r}")
    for needed in ("n_timesteps", "policy"):
        if needed not in {**content[name], **(options.hyperparams or {})}:
            raise UserError(f"{label}: `{name}` has no `{needed}`")


def read_hyperparameters(conf_file: str) -> Any:
    """
    :param conf_file: As rl_zoo3 takes it: a YAML file, a Python file, or the name of a module
    :return: The hyperparameters by task
    """
    if conf_file.endswith((".yml", ".yaml")):
        import yaml

        return yaml.safe_load(Path(conf_file).read_text())
    if conf_file.endswith(".py"):
        return runpy.run_path(conf_file)["hyperparams"]
    return importlib.import_module(conf_file).hyperparams


def check_origin(options: argparse.Namespace) -> None:
    """
    :param options: Of ``train``
    :raises UserError: If the model or the trial to begin with cannot exist
    """
    agent = options.trained_agent
    if agent and not (agent.endswith(".zip") and Path(agent).is_file()):
        raise UserError(f"--trained-agent {agent}: there is no such .zip file")
    if options.trial_id is not None and not (options.storage and options.study_name):
        raise UserError(f"--trial-id {options.trial_id}: also give --storage and --study-name of the trial's study")


def record_video_with_us(command: list[str], *args: Any, **kwargs: Any) -> int:
    """``subprocess.call``, with rl_zoo3's command to record a video replaced by ours."""
    if command[1:3] == ["-m", "rl_zoo3.record_video"]:
        command = [sys.executable, "-m", "sb3_mfpo.zoo", "record-video", *command[3:]]
    with subprocess.Popen(command, *args, **kwargs) as process:
        return process.wait()


def provide_ffmpeg() -> None:
    """
    Where the system has no ffmpeg, put moviepy's on the path.

    :raises UserError: If there is neither
    """
    if shutil.which("ffmpeg"):
        return
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        executable = get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UserError(f"no ffmpeg ({error}): install it with your system, or `pip install moviepy`") from error
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    os.symlink(executable, Path(folder.name) / "ffmpeg")
    os.environ["PATH"] = f"{folder.name}{os.pathsep}{os.environ['PATH']}"


def save_figures_without_a_display() -> None:
    """Where no window can be opened, ``plt.show`` writes every open figure to a PNG file in the current folder."""
    from matplotlib import pyplot as plt

    if plt.get_backend().lower() != "agg":
        return

    def save(*args: Any, **kwargs: Any) -> None:
        for number in plt.get_fignums():
            path = Path(f"figure_{number}.png")
            plt.figure(number).savefig(path, bbox_inches="tight")
            print(f"No display: saved {path}")

    plt.show = save


if __name__ == "__main__":
    main()
