"""Two things that the API reference can't see in the source: where `sta_adapter.backbones` lies, and STAConfig's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent


class Reading(griffe.Extension):
    """Hangs the folder `backbones/` into the package, and shows `_default(0.25)` as 0.25."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Griffe calls this with each package that it has read."""
        if pkg.path == "sta_adapter":
            folder = griffe.load("backbones", search_paths=[ROOT], try_relative_path=False)
            pkg.set_member("backbones", folder)

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Griffe calls this with each attribute that it has read."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "_default":
            attr.value = value.arguments[0]
