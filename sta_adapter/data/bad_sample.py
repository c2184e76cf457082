"""Samples that can't be used: what is said of them, and whether they are skipped."""

from __future__ import annotations

from typing import NamedTuple

from sta_adapter.errors import CompatibilityError, DataError, MissingExtraError, STAError

_NOT_OF_A_SAMPLE = (KeyboardInterrupt, SystemExit, GeneratorExit)


class BadSample(NamedTuple):
    """A sample that can't be used, and why."""

    source: str
    reason: str

    @classmethod
    def of(cls, source: str, error: BaseException) -> BadSample:
        """What an error says about a sample, whichever library raised it.

        One that says nothing about it is raised again: a package is missing, or the user has had enough.
        """
        if isinstance(error, (MissingExtraError, CompatibilityError)) or type(error) in _NOT_OF_A_SAMPLE:
            raise error
        if isinstance(error, DataError) and error.source == source:
            return cls(source, error.reason)
        return cls(source, reason_of(error))

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"

    def skipped(self, on_bad_sample: str, cause: BaseException | None = None) -> BadSample:
        """This, where bad samples are skipped; else a DataError."""
        if on_bad_sample == "error":
            raise DataError(self.reason, source=self.source) from cause
        return self


def reason_of(error: BaseException) -> str:
    """An error's words; those of another library with the error's kind in front, without which they often say little."""
    if isinstance(error, (STAError, OSError)) and str(error):
        return str(error)
    return ": ".join(filter(None, (type(error).__name__, str(error))))
