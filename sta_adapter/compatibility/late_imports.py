"""Something to do once a package is imported, which this one must not import by itself: it takes seconds, or is not there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Watcher(MetaPathFinder):
    """Finds one package as the other finders do, and calls a function when it has run."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name = name
        self.call = call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package's spec; asked for also where nobody goes on to import it."""
        if fullname != self.name:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "__dict__"):
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.call()

        vars(spec.loader)["exec_module"] = exec_module
        return spec


def after_import(name: str, call: Callable[[], None]) -> None:
    """Call a function once, after a top-level package that isn't imported yet; asking twice is asking once."""
    if all(not isinstance(finder, _Watcher) or finder.name != name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(name, call))
