"""What errors share: the nearest known name, a value as an error shows it, and what an error was raised from."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable, Iterator

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 40
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 26
_SHORT.maxlevel = 3


def suggestion(name: object, known: Iterable[str]) -> str:
    """A sentence with the known name that an unknown one is nearest to, or with all of them."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}."


def unknown_names(names: Iterable[object], known: Collection[str]) -> str:
    """Unknown names, each with the known one that it is nearest to."""
    near = {name: difflib.get_close_matches(name, known, n=1) for name in map(str, names)}
    return ", ".join(f"{name!r}" + (f" (did you mean {hit[0]!r}?)" if hit else "") for name, hit in near.items())


def shown(value: object) -> str:
    """A value for an error's text: its repr, cut where it is long or deep."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # which Python raises of an integer so long
        return "a number of thousands of digits"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from; not what was handled before it, which may have nothing to do with it."""
    while error is not None:
        yield error
        error = error.__cause__


def one_line(error: BaseException) -> str:
    """Kind and beginning of an error's text, without line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{' ...' if len(text) > 300 else ''}" if text else type(error).__name__
