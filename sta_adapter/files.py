"""Writing several files so that a crash leaves the old ones or the new ones, never halves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def atomic_folder_write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder: each in full and flushed to disk under a temporary name, then all renamed.

    Args:
        folder: made with its parents when it does not exist.
        files: contents by name.

    Raises:
        OSError: what the file system says; temporary files are gone, files that were there are as before unless the
            renaming itself was cut off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[tuple[str, Path]] = []
    try:
        for name, content in files.items():
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            written.append((temporary, folder / name))
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
        for temporary, final in written:
            os.replace(temporary, final)
    except BaseException:
        for temporary, _ in written:
            Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
