"""What errors of the system and of other libraries mean for the user of a command, each on one line."""

from __future__ import annotations

import errno
import os

from sta_adapter._validate import causes, one_line
from sta_adapter.errors import STAError

SYSTEM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota of the disk is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "the system does not allow it",
    errno.EPERM: "the system does not allow it",
    errno.EADDRINUSE: "the port is taken",
    errno.EMFILE: "too many files are open",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, expected a file",
    errno.EFBIG: "the file would be too large",
    errno.EIO: "the disk or its connection failed",
}
EXTRAS = {  # by the module that is missing
    **dict.fromkeys(("peft", "accelerate", "torchvision", "PIL", "tqdm", "yaml", "rich", "tensorboard"), "train"),
    **{"webdataset": "stream", "matplotlib": "viz", "gradio": "app", "pyarrow": "eval", "xformers": "xformers"},
}
NO_MEMORY = (
    "the memory is not enough: {} Take fewer clips at a time (--batch-size; in training --set device_batch_size=1, and --set "
    "gradient_checkpointing=true), fewer or smaller frames, or --dtype bf16"
)
HUB = ("HfHubHTTPError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "HFValidationError")


def in_one_line(error: BaseException) -> str:
    """What happened in an error that ended a command, and what to do about it."""
    if isinstance(error, STAError):
        return str(error)
    for cause in causes(error):
        known = _known(cause)
        if known:
            return known
    return (
        f"{_line(error)} This was not foreseen; sta-adapter --debug ... shows where it happened. Please report it with that, "
        "and with what sta-adapter env prints."
    )


def _known(error: BaseException) -> str | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, STAError):
        return str(error)
    if names & set(HUB):
        from sta_adapter.adapter.hub import explain

        return f"the Hub: {explain(error)}"
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or "not enough memory" in str(error):
        return NO_MEMORY.format(_line(error))
    if isinstance(error, OSError) and error.errno is not None:
        return _system(error)
    if "os error 28" in str(error).lower() or "no space left" in str(error).lower():
        return f"{SYSTEM[errno.ENOSPC]}: {_line(error)}"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"the name {error.object!r} is no text of UTF-8, and can't be written into a file; take another."
    if "CUDA error" in str(error) or "NVIDIA driver" in str(error) or "not compiled with CUDA" in str(error):
        return f"the GPU can't be used: {_line(error)} --device cpu does without."
    return None


def _system(error: OSError) -> str:
    meaning = SYSTEM.get(error.errno or 0, (error.strerror or "the system failed").lower())
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, (str, bytes))]
    where = " to ".join(map(repr, paths)) or (error.strerror or "").lower()
    return f"{meaning}: {where}" if where else meaning


def _missing(error: ImportError) -> str:
    module = (error.name or "").split(".")[0]
    extra = EXTRAS.get(module)
    if extra is None:
        extra = next((EXTRAS[name] for name in EXTRAS if name.casefold() in str(error).casefold()), None)
    hint = f"pip install 'sta-adapter[{extra}]'" if extra else f"pip install {module}" if module else "install it"
    return f"a package is missing or can't be imported ({_line(error)}): {hint}"


def _line(error: BaseException) -> str:
    """The error as a sentence."""
    text = one_line(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."
