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
USAGE = f"""usage: python -m sb3_mfpo.zoo <command> [arguments]

rl_zoo3 (https://rl-baselines3-zoo.readthedocs.io) with --algo mfpo and --algo som. Commands:

  {", ".join(COMMANDS)}
      as in rl_zoo3; `<command> --help` lists the arguments
  doctor
      versions, device and renderer of this installation, what is wrong with it and how to mend it"""


class UserError(Exception):
    """What the user can mend, said in one line."""


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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(command: str, arguments: list[str]) -> None:
    """
    Run one of rl_zoo3's commands with our algorithms and tasks.

    :param command: One of ``COMMANDS``
    :param arguments: Its arguments
    :raises UserError: If something is missing or wrong that can be seen beforehand
    """
    try:
        import rl_zoo3  # noqa: F401
    except ImportError as error:
        raise UserError(f"rl_zoo3 cannot be imported ({error}): install `sb3-mfpo[zoo]`") from error
    options = parse(arguments)
    helping = "-h" in arguments or "--help" in arguments
    if options.env.startswith("dm_control/"):
        from sb3_mfpo.envs import register_dm_control

        try:
            register_dm_control()
        except ImportError as error:
            raise UserError(str(error)) from error

    from sb3_mfpo.zoo.registration import ALGORITHMS, hyperparameter_file, register

    for package in options.gym_packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"--gym-packages {package}: {error}") from error
    register(playing=command in PLAYING)
    if command == "train" and not helping:
        check_task(options.env)
        if options.conf_file is None and options.algo in ALGORITHMS:
            options.conf_file = str(hyperparameter_file(options.algo))
            arguments = [*arguments, "--conf-file", options.conf_file]
        check_hyperparameters(options)

    sys.argv = [f"sb3_mfpo.zoo {command}", *arguments]
    if command in ("record-video", "record-training") and not helping:
        choose_renderer()
    if command == "record-training":
        provide_ffmpeg()
        # It calls `python -m rl_zoo3.record_video`, which does not know our algorithms
        subprocess.call = record_video_with_us  # type: ignore[assignment]
    if command in ("plot-train", "plot-from-file", "all-plots"):
        save_figures_without_a_display()
    with warnings.catch_warnings():
        # The package of the plots imports them
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        runpy.run_module(COMMANDS[command], run_name="__main__")


def parse(arguments: list[str]) -> argparse.Namespace:
    """What we have to know of rl_zoo3's arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo", default="ppo")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("-conf", "--conf-file")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    return parser.parse_known_args(arguments)[0]


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
            f"{env_id} is a task of HumanoidBench, which is not on PyPI: install it from "
            "https://github.com/carlosferrazza/humanoid-bench and add `--gym-packages humanoid_bench`"
        )
    close = difflib.get_close_matches(env_id, gym.registry, n=1)
    hint = f", did you mean {close[0]}?" if close else "; tasks of other packages need `--gym-packages`"
    raise UserError(f"unknown task {env_id}{hint}")


def check_hyperparameters(options: argparse.Namespace) -> None:
    """
    :param options: Of ``train``
    :raises UserError: If the file of hyperparameters cannot be read, or has nothing for the task
    """
    import yaml

    if options.conf_file is None or not options.conf_file.endswith((".yml", ".yaml")):
        return
    try:
        content = yaml.safe_load(Path(options.conf_file).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--conf-file {options.conf_file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.keys() & {options.env, "default"}:
        raise UserError(f"--conf-file {options.conf_file}: neither {options.env} nor `default` is in it")


def record_video_with_us(command: list[str], *args: Any, **kwargs: Any) -> int:
    """``subprocess.call``, but for rl_zoo3's command to record a video, which is replaced by ours."""
    if command[1:3] == ["-m", "rl_zoo3.record_video"]:
        command = [sys.executable, "-m", "sb3_mfpo.zoo", "record-video", *command[3:]]
    with subprocess.Popen(command, *args, **kwargs) as process:
        return process.wait()


def provide_ffmpeg() -> None:
    """
    Where the system has no ffmpeg, put the one that comes with moviepy on the path.

    :raises UserError: If there is none either
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


def choose_renderer() -> None:
    """
    Where no window can be opened, let MuJoCo render with what works.

    :raises UserError: If nothing does
    """
    if "MUJOCO_GL" in os.environ or "DISPLAY" in os.environ or sys.platform != "linux":
        return
    from sb3_mfpo.zoo.doctor import NO_RENDERER, find_renderer

    renderer = find_renderer()
    if renderer is None:
        raise UserError(NO_RENDERER)
    os.environ["MUJOCO_GL"] = renderer


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
