"""The errors that a user can cause. Each is a `STAError` and also the builtin that a caller would expect."""

from __future__ import annotations

from pathlib import Path


class STAError(Exception):
    """Base class of every error that sta-adapter raises on purpose."""


class ConfigError(STAError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or does not fit the model."""


class UnknownBackboneError(STAError, LookupError):
    """No registered backbone fits the model, or no backbone has that name."""


class InjectionError(STAError, RuntimeError):
    """The model cannot take STA as it is: injected already, wrapped for parallel training, compiled."""


class LayoutError(STAError, ValueError):
    """Clips, frames and positions of the tokens are unknown or don't add up."""


class UnknownClipsError(LayoutError):
    """Nobody has told whether several rows of an encoder's batch are frames of one clip or pictures."""


class StreamError(STAError, RuntimeError):
    """A stream can't take a call: another thread is using it, gradients are wanted, or its state doesn't fit."""


class BackendError(STAError, RuntimeError):
    """An attention or decoding backend was asked for by name and can't do the work."""


class CheckpointError(STAError, ValueError):
    """An adapter's files are missing, damaged, or made for another model."""


class VideoError(STAError, OSError):
    """A video file can't be read, or holds no frame where frames were asked for."""


class DataError(STAError, ValueError):
    """A dataset file or one of its samples is not what it should be.

    Attributes:
        source: where it stands, "FILE, line 3"; None where nobody has said it.
        reason: what is wrong with it.
    """

    def __init__(self, reason: str = "", *, source: str | None = None) -> None:
        super().__init__(reason if source is None else f"{source}: {reason}")
        self.source = source
        self.reason = reason


class DivergenceError(STAError, ArithmeticError):
    """A training's loss is no finite number any more, or has grown a hundredfold; or a model's outputs are no numbers."""


class TrainingStopped(STAError, RuntimeError):
    """A signal (Ctrl-C, SIGTERM) has ended a training; what was trained is saved.

    Attributes:
        signal: its number.
        checkpoint: the newest one; None where none was saved.
    """

    def __init__(self, message: str = "", *, signal: int = 0, checkpoint: Path | None = None) -> None:
        super().__init__(message)
        self.signal = signal
        self.checkpoint = checkpoint


class MissingExtraError(STAError, ImportError):
    """An optional package is needed and not installed; the message names the extra."""


class CompatibilityError(STAError, RuntimeError):
    """A part of another package that STA leans on is missing, or not of the shape that it was tested with."""


class STAWarning(UserWarning):
    """What goes on, but not as its user may expect; the message says how to mend it."""
