"""What a measurement was made on, to be written beside its numbers."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from sb3_mfpo import __version__

PACKAGES = ("torch", "stable-baselines3", "sb3-contrib", "gymnasium", "mujoco", "numpy")


def versions() -> dict[str, str]:
    """
    :return: Of Python and of the packages that results depend on
    """
    # The one that is imported, which need not be installed
    ours = {"sb3-mfpo": __version__}
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES} | ours


def processor() -> str:
    """
    :return: Name of the processor
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
