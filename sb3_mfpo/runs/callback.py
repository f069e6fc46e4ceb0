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
    Write checkpoints that hold all of a run: every ``save_freq`` steps, at the end, and on SIGTERM and SIGINT, which then end
    the training as usual (exit code 143; ``KeyboardInterrupt``). ``MFPO.resume`` and ``SOM.resume`` go on from them; ``load``
    reads the model in them.

    A checkpoint is written between two rollouts. It takes its name only when it is whole; the one before is kept until then.
    One that cannot be written (a full disk) is warned of, and the training goes on.

    Within ``EveryNTimesteps`` or ``EvalCallback`` it counts their events in place of steps, as SB3's callbacks do.

    :param save_freq: Save every so many calls of ``env.step()``, as in SB3's callbacks
    :param save_path: Folder for the checkpoints
    :param name_prefix: Their common prefix; files are called ``<prefix>_<steps>_steps.zip``
    :param keep: How many of this run's to keep, at least 1; 2 leave one to fall back on
    :param on_signals: Whether to save on SIGTERM and SIGINT (in the main thread only)
    :param verbose: Verbosity level: 0 for no output, 2 for indicating when a checkpoint is saved
    :raises ValueError: If an argument is out of range; when the training begins, if the folder holds checkpoints of another
        run, or if the algorithm is none of this package
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
                f"`RunCheckpointCallback` saves runs of MFPO and SOM, which `resume` goes on with, not of "
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
        :return: What the run has written before, the oldest first
        :raises ValueError: If there is anything else that ``resume`` could take for this run's newest
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
                    f"taken for this run's. Go on with that run (`{type(model).__name__}.resume`), choose another "
                    "`save_path` or `name_prefix`, or move them away."
                )
        return found

    def _on_step(self) -> bool:
        self._due = self._due or self.n_calls % self.save_freq == 0
        model: Any = self.model
        return model._saver.goes_on

    def is_due(self, signalled: bool) -> bool:
        """
        :param signalled: Whether the training is to end by a signal
        :return: Whether a checkpoint is to be written now
        """
        return self._due or (signalled and self.on_signals)

    def save(self) -> None:
        """Write a checkpoint now, then remove this run's beyond ``keep``."""
        self._due = False
        model: Any = self.model
        steps = model.num_timesteps
        path = self.save_path / f"{self.name_prefix}_{steps}_steps.zip"
        try:
            write_run(model, model._saver.state(), path)
        except OSError as error:
            warnings.warn(
                f"The checkpoint {path} could not be written ({error}); older ones are untouched. Training goes on, and the "
                f"next attempt comes in {self.save_freq} steps.",
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
    What an algorithm asks during ``learn``: the callbacks that save the run, and whether a signal has asked it to end. Without
    such callbacks it does nothing. Copies and pickles start anew.

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
        To be called when the training is set up.

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
        """To be called when the training has ended, in whatever way: gives the signals back."""
        for kind, handler in self._previous_handlers.items():
            signal.signal(kind, handler)
        self._previous_handlers.clear()
        _WITH_HANDLERS.discard(self)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # The second time
            self.release()
            signal.raise_signal(number)
        self.received = signal.Signals(number)

    @property
    def goes_on(self) -> bool:
        """Whether a rollout may go on; one of many steps may take longer than whoever asks to stop will wait."""
        return self.received is None or self.model.train_freq == TrainFreq(1, TrainFrequencyUnit.STEP)

    def save_if_due(self, at_the_end: bool = False) -> None:
        """
        To be called between rollouts.

        :param at_the_end: Whether the training has come to its end
        :raises KeyboardInterrupt: After SIGINT
        :raises SystemExit: After SIGTERM
        """
        for callback in self.callbacks:
            if at_the_end or callback.is_due(self.received is not None):
                callback.save()
        if self.received is not None:
            self.release()
            if self.received is signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + self.received)

    def state(self) -> dict[str, Any]:
        """
        :return: The run's state; it is warned of, once, if the environments' is not known
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


# A process that is forked within a training (a simulator that is started anew) must be able to end by a signal
_WITH_HANDLERS: weakref.WeakSet[RunSaver] = weakref.WeakSet()


def _release_in_child() -> None:
    for saver in list(_WITH_HANDLERS):
        saver.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
