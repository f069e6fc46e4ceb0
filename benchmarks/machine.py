"""What a measurement was made on, to be written beside its numbers."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "stable-baselines3", "sb3-contrib", "sb3-mfpo", "gymnasium", "mujoco", "numpy")


def versions() -> dict[str, str]:
    """
    :return: Of Python and of the packages that results depend on
    """
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def processor() -> str:
    """
    :return: Name of the processor
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
