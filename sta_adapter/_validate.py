"""What checks of given values share: the nearest known name, and a value as an error shows it."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

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


def shown(value: object) -> str:
    """A value for an error's text: its repr, cut where it is long or deep."""
    return _SHORT.repr(value)
