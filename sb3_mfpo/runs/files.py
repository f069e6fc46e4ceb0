"""Writing files so that a crash leaves the old file or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Suffix of the name of a file that is being written
UNFINISHED = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """
    Open a new file for writing. It takes its name, and replaces an older file, only when it is complete and on the disk.

    :param path: The file's path; its folder exists
    """
    temporary = path.with_name(path.name + UNFINISHED)
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The name has to reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
