"""What is installed, what is wrong with it, and how to fix it."""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib import metadata
from pathlib import Path

import torch as th

from sb3_mfpo.envs import NO_RENDERER, find_renderer

PACKAGES = {
    "": ("sb3-mfpo", "stable-baselines3", "torch", "gymnasium", "numpy"),
    "mujoco": ("mujoco",),
    "dmc": ("dm_control", "shimmy"),
    "robotics": ("gymnasium-robotics",),
    "zoo": ("rl_zoo3", "sb3-contrib", "optuna", "seaborn", "rliable", "moviepy"),
}


@dataclasses.dataclass(frozen=True)
class Suite:
    """
    Tasks of a package on PyPI, as they were tried with the versions of ``constraints.txt``. Ids are patterns of
    :mod:`fnmatch`.

    :param version: Of the package that was tried
    :param module: Registers the tasks, with ``--gym-packages``
    :param works: Ids that are made, reset and stepped, with actions that our algorithms take
    :param fails: All other ids, with the reason
    :param needs: Further packages, if the package must be installed without those that it requires
    """

    version: str
    module: str
    works: tuple[str, ...] = ()
    fails: dict[str, str] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()


# A test of `make nightly` tries every id
SUITES = {
    # It requires pygame, which pygame-ce stands for, and an older OpenCV with a window
    "gym-pusht": Suite(
        "0.1.8", "gym_pusht", works=("gym_pusht/PushT-v0",), needs=("pymunk<7", "shapely", "opencv-python-headless")
    ),
    "ogbench": Suite(
        "1.2.2",
        "ogbench",
        works=(
            *("pointmaze-*", "antmaze-*", "humanoidmaze-*", "antsoccer-*", "cube-*", "scene-*", "puzzle-*"),
            *("visual-antmaze-*", "visual-humanoidmaze-*", "visual-cube-*", "visual-scene-*", "visual-puzzle-*"),
        ),
        fails={
            "humanoidmaze-teleport-*": "a material is missing",
            "visual-humanoidmaze-teleport-*": "a material is missing",
            "powderworld-*": "discrete actions",
        },
    ),
    "metaworld": Suite("3.1.1", "metaworld", fails={"Meta-World/*": "requires mujoco 3.3.0"}),
}


def doctor() -> int:
    """
    Print versions, device and renderer, what is known of other packages' tasks, and every problem with its solution.

    :return: The exit code: 1 if there are problems, else 0
    """
    versions = {name: installed_version(name) for names in PACKAGES.values() for name in names}
    print(f"python              {platform.python_version()} on {platform.platform()}")
    for name, version in versions.items():
        print(f"{name:19} {version or 'not installed'}")
    cuda = th.cuda.get_device_name() if th.cuda.is_available() else "none"
    print(f"CUDA device         {cuda}")
    print(f"threads             {th.get_num_threads()} of {available_cores()} cores")
    renderer = find_renderer() if versions["mujoco"] else None
    print(f"offscreen renderer  {renderer or 'none'}")
    print("\nTasks of other packages, as tried with the versions of constraints.txt:")
    for name, suite in SUITES.items():
        print("\n".join(described(name, suite, installed_version(name))))

    problems = [
        *missing_packages(versions),
        *broken_requirements("sb3-mfpo"),
        *broken_requirements("metaworld"),
        *incompatible_mujoco(versions["mujoco"], versions["dm_control"]),
        *unused_gpu(th.version.cuda is not None or th.version.hip is not None, Path("/proc/driver/nvidia/version").exists()),
        *unusable_renderer(versions["mujoco"] is not None, renderer, os.environ.get("MUJOCO_GL")),
        *too_many_threads(th.get_num_threads(), available_cores()),
    ]
    print("\nNo problems found." if not problems else "\n" + "\n".join(f"- {problem}" for problem in problems))
    return int(bool(problems))


def described(name: str, suite: Suite, version: str | None) -> list[str]:
    """
    :param name: Name of a distribution
    :param suite: Its tasks
    :param version: Its installed version, None if it is not installed
    :return: Lines that say what works
    """
    lines = [f"{name:19} {version or 'not installed'} ({suite.version} was tried)"]
    if suite.works:
        lines.append(f"    works: {', '.join(suite.works)}; --gym-packages {suite.module}")
    lines += [f"    fails: {ids}: {reason}" for ids, reason in suite.fails.items()]
    if suite.works and version is None:
        lines.append(f"    {installation(name, suite)}")
    return lines


def installation(name: str, suite: Suite) -> str:
    """
    :param name: Name of a distribution
    :param suite: Its tasks
    :return: The command that installs it beside our versions
    """
    if not suite.needs:
        return f"pip install -c constraints.txt {name}"
    needs = " ".join(f'"{package}"' for package in suite.needs)
    return f"pip install -c constraints.txt {needs} && pip install --no-deps {name}"


def installed_version(name: str) -> str | None:
    """
    :param name: Name of a distribution
    :return: Its version, None if it is not installed
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def available_cores() -> int:
    """
    :return: Number of cores that this process may use
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing_packages(versions: dict[str, str | None]) -> list[str]:
    """
    :param versions: Installed versions by name
    :return: One problem for each extra that is not complete
    """
    problems = []
    for extra, names in PACKAGES.items():
        missing = [name for name in names if versions[name] is None]
        if missing:
            target = f"sb3-mfpo[{extra}]" if extra else "sb3-mfpo"
            problems.append(f'{", ".join(missing)} not installed: `pip install "{target}"`.')
    return problems


def broken_requirements(distribution: str) -> list[str]:
    """
    :param distribution: Name of a distribution, which need not be installed
    :return: A problem for each of its requirements whose installed version does not fit
    """
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in metadata.requires(distribution) or []]
    except (ImportError, metadata.PackageNotFoundError):
        return []
    problems = []
    for requirement in requirements:
        version = installed_version(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and version is not None and not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{distribution} needs {requirement.name}{requirement.specifier}, but {version} is installed: "
                f'`pip install "{requirement.name}{requirement.specifier}"`, if necessary in a separate environment.'
            )
    return problems


def incompatible_mujoco(mujoco: str | None, dm_control: str | None) -> list[str]:
    """
    :param mujoco: Installed version
    :param dm_control: Installed version
    :return: A problem if dm_control cannot work with this mujoco
    """
    if mujoco is None or dm_control is None:
        return []
    if int(mujoco.split(".")[0]) >= 4 and tuple(int(part) for part in dm_control.split(".")[:3]) <= (1, 0, 50):
        return [f'dm_control {dm_control} does not work with mujoco {mujoco}: `pip install "mujoco<4"`.']
    return []


def unused_gpu(torch_has_gpu_support: bool, driver_found: bool) -> list[str]:
    """
    :param torch_has_gpu_support: Whether PyTorch was built for GPUs
    :param driver_found: Whether the machine has NVIDIA's driver
    :return: A problem if there is a GPU that PyTorch cannot use
    """
    if driver_found and not torch_has_gpu_support:
        return ["This machine has an NVIDIA GPU, but PyTorch is a CPU build: reinstall it as https://pytorch.org says."]
    return []


def unusable_renderer(has_mujoco: bool, renderer: str | None, chosen: str | None) -> list[str]:
    """
    :param has_mujoco: Whether mujoco is installed
    :param renderer: The renderer that works, None if none does
    :param chosen: The value of MUJOCO_GL
    :return: A problem if the chosen renderer, or every renderer, does not work
    """
    if not has_mujoco:
        return []
    if renderer is None:
        return [NO_RENDERER]
    if chosen is not None and renderer != chosen:
        return [f"MUJOCO_GL={chosen} does not render here, but {renderer} does: `export MUJOCO_GL={renderer}`."]
    return []


def too_many_threads(threads: int, cores: int) -> list[str]:
    """
    :param threads: Threads of PyTorch
    :param cores: Cores that the process may use
    :return: A problem if there are more threads than cores
    """
    if threads > cores:
        return [f"PyTorch uses {threads} threads on {cores} cores, which is slow: `export OMP_NUM_THREADS={cores}`."]
    return []
