"""Writing checkpoints during a training."""

from __future__ import annotations

import os
import signal
import threading
import warnings
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from sb3_mfpo.checks import check_integer
from sb3_mfpo.runs.checkpoint import checkpoints, read_run, run_id_of, steps_of, unfinished, write_run
from sb3_mfpo.runs.state import remember_start, run_state


class RunCheckpointCallback(BaseCallback):
    """
    Write checkpoints that hold a whole run: every ``save_freq`` steps, at the end, and on SIGTERM and SIGINT, which then end
    the training as usual (exit code 143; ``KeyboardInterrupt``). ``MFPO.resume`` and ``SOM.resume`` continue the run; ``load``
    reads the model alone.

    A checkpoint is written between two rollouts. It takes its name only when it is complete, and older ones are kept until
    then. If it cannot be written, because the disk is full for example, a warning says so and the training continues.

    Within ``EveryNTimesteps`` or ``EvalCallback`` it counts their events in place of steps, as SB3's callbacks do.

    :param save_freq: Save every so many calls of ``env.step()``, as in SB3's callbacks
    :param save_path: Folder for the checkpoints
    :param name_prefix: Their common prefix; files are called ``<prefix>_<steps>_steps.zip``
    :param keep: How many checkpoints of this run to keep, at least 1; with 2, one is left if the newest is damaged
    :param on_signals: Whether to save on SIGTERM and SIGINT (in the main thread only)
    :param verbose: Verbosity level: 0 for no output, 2 for indicating when a checkpoint is saved
    :raises ValueError: If an argument is out of range. When the training begins: if the folder holds checkpoints of another
        run, or if the algorithm is not one of this package
    """

    def __init__(
        self,
        save_freq: int,
        save_path: str | Path,
        name_prefix: str = "run",
        keep: int = 2,
        on_signals: bool = True,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        for name, value in (("save_freq", save_freq), ("keep", keep)):
            check_integer(name, value, minimum=1)
        self.save_freq = save_freq
        self.save_path = Path(save_path)
        self.name_prefix = name_prefix
        self.keep = keep
        self.on_signals = on_signals
        self._due = False
        # This run's checkpoints, the oldest first
        self._written: list[Path] = []

    def _init_callback(self) -> None:
        saver = getattr(self.model, "_saver", None)
        if not isinstance(saver, RunSaver):
            raise ValueError(
                f"`RunCheckpointCallback` saves runs of MFPO and SOM, which `resume` continues, not of "
                f"{type(self.model).__name__}: use SB3's `CheckpointCallback`."
            )
        self.save_path.mkdir(parents=True, exist_ok=True)
        self._due = False
        self._written = self._checkpoints_of_this_run()
        for path in unfinished(self.save_path, self.name_prefix):
            path.unlink()
        saver.callbacks.append(self)

    def _checkpoints_of_this_run(self) -> list[Path]:
        """
        :return: This run's checkpoints in the folder, the oldest first
        :raises ValueError: If ``resume`` could take another checkpoint in the folder for this run's newest
        """
        model: Any = self.model
        found = []
        for path in reversed(checkpoints(self.save_path, self.name_prefix)):
            run_id = run_id_of(path)
            if run_id == model._run_id and steps_of(path) <= model.num_timesteps:
                found.append(path)
            elif run_id is not None and (run_id != model._run_id or _is_whole(path)):
                raise ValueError(
                    f"`save_path` holds checkpoints of another run, or of later steps of this one: {path}. They would be "
                    f"taken for this run's. Continue that run (`{type(model).__name__}.resume`), choose another "
                    "`save_path` or `name_prefix`, or move them away."
                )
        return found

    def _on_step(self) -> bool:
        self._due = self._due or self.n_calls % self.save_freq == 0
        model: Any = self.model
        return model._saver.goes_on

    def save(self) -> None:
        """Write a checkpoint now, then remove this run's oldest ones beyond ``keep``."""
        self._due = False
        model: Any = self.model
        steps = model.num_timesteps
        path = self.save_path / f"{self.name_prefix}_{steps}_steps.zip"
        try:
            write_run(model, model._saver.state(), path)
        except OSError as error:
            warnings.warn(
                f"The checkpoint {path} could not be written ({error}); older ones are untouched. Training goes on; the next "
                f"attempt is in {self.save_freq} steps.",
                stacklevel=2,
            )
            return
        if self.verbose >= 2:
            print(f"Saving checkpoint of the run to {path}")
        self._written = [*(old for old in self._written if old != path), path]
        for old in self._written[: -self.keep]:
            old.unlink(missing_ok=True)
        del self._written[: -self.keep]


def _is_whole(path: Path) -> bool:
    try:
        read_run(path)
    except ValueError:
        return False
    return True


class RunSaver:
    """
    Saves an algorithm's run during ``learn``, as its checkpoint callbacks ask for it, and handles signals. Without such
    callbacks it does nothing. A copy or pickle of it starts empty: it must not hold signal handlers.

    :param model: The algorithm
    """

    def __init__(self, model: Any):
        self.model = model
        self.callbacks: list[RunCheckpointCallback] = []
        self.received: signal.Signals | None = None
        self._outermost: BaseCallback | None = None
        self._warned = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __reduce__(self) -> tuple[type[RunSaver], tuple[Any]]:
        return type(self), (self.model,)

    def begin(self, outermost: BaseCallback) -> None:
        """
        Take over the signals, if a callback asks for it. To be called when the training is set up.

        :param outermost: The callbacks of the training, as one
        """
        if not self.callbacks:
            return
        self._outermost = outermost
        remember_start(outermost)
        if any(callback.on_signals for callback in self.callbacks) and threading.current_thread() is threading.main_thread():
            _WITH_HANDLERS.add(self)
            for kind in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[kind] = signal.signal(kind, self._on_signal)

    def release(self) -> None:
        """Give the signals back. To be called when the training has ended, for whatever reason."""
        for kind, handler in self._previous_handlers.items():
            signal.signal(kind, handler)
        self._previous_handlers.clear()
        _WITH_HANDLERS.discard(self)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # The second signal acts at once
            self.release()
            signal.raise_signal(number)
        self.received = signal.Signals(number)

    @property
    def goes_on(self) -> bool:
        """Whether a rollout may continue. After a signal, a rollout of many steps is ended: it could take too long."""
        return self.received is None or self.model.train_freq == TrainFreq(1, TrainFrequencyUnit.STEP)

    def save_if_due(self, at_the_end: bool = False) -> None:
        """
        Save what is due, then end the training if a signal was received. To be called between rollouts.

        :param at_the_end: Whether the training is complete
        :raises KeyboardInterrupt: After SIGINT
        :raises SystemExit: After SIGTERM
        """
        for callback in self.callbacks:
            if at_the_end or callback._due or (self.received is not None and callback.on_signals):
                callback.save()
        if self.received is not None:
            self.release()
            if self.received is signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + self.received)

    def state(self) -> dict[str, Any]:
        """
        :return: The run's state. The first time that the environments' state is unknown, a warning says why.
        """
        assert self._outermost is not None
        state = run_state(self.model, self._outermost)
        unknown = state["environments"]["unknown"]
        if unknown is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"Checkpoints of this run do not hold the state of its environments: {unknown}. A resumed run begins new "
                "episodes there, and is not the uninterrupted one bit for bit.",
                stacklevel=9,
            )
        return state


# A process that is forked during a training, such as a simulator that is restarted, must end on a signal, not save the run
_WITH_HANDLERS: weakref.WeakSet[RunSaver] = weakref.WeakSet()


def _release_in_child() -> None:
    for saver in list(_WITH_HANDLERS):
        saver.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
