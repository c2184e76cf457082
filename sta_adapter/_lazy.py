"""Late imports: of what packages show only when it is asked for, so that commands start without torch, and of optional packages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module

from sta_adapter.errors import MissingExtraError


def lazy(
    package: str, names: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
        package: its `__name__`.
        names: what it shows, by the module in which that lives.
        modules: those of its own modules that are there without being imported by name.
    """
    places = {name: module for module, shown in names.items() for name in shown}

    def attribute(name: str) -> object:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(places[name]), name)

    return attribute, lambda: sorted({*vars(sys.modules[package]), *places})


@contextlib.contextmanager
def importing(message: str) -> Iterator[None]:
    """Context in which optional packages are imported; a MissingExtraError where one can't be, in whose message {} is the reason."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(message.replace("{}", str(error))) from error
