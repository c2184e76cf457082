"""How clips are sampled and how large their frames are, where a sample doesn't say it itself."""

from dataclasses import dataclass, fields

from sta_adapter._validate import shown
from sta_adapter.errors import ConfigError

RANGES: dict[str, tuple[float, int]] = {
    "fps": (1e-6, 1000),
    "nframes": (1, 16_384),
    "min_frames": (1, 16_384),
    "max_frames": (1, 16_384),
    "min_tokens": (1, 1 << 20),
    "max_tokens": (1, 1 << 20),
}
BY_TIME = ("fps", "min_frames", "max_frames")  # none of which has an effect beside nframes
LIMITS = (("min_frames", "max_frames"), ("min_tokens", "max_tokens"))
OPTIONAL = ("nframes", "min_tokens", "max_tokens")


@dataclass(frozen=True)
class FrameSettings:
    """Sampling and sizes of frames; the defaults are those of the published recipe."""

    fps: float = 1.0  # frames a second
    nframes: int | None = None  # that many frames of every clip instead
    min_frames: int = 4  # at least, of a clip; more than fps gives for short ones
    max_frames: int = 32  # at most, of a clip; long ones are sampled more thinly
    min_tokens: int | None = 16  # visual tokens a frame; with None for both limits the processor's own size rule holds
    max_tokens: int | None = 256  # visual tokens a frame, at most; larger frames are made smaller
    backend: str = "auto"  # what decodes: auto (pyav), decord, pyav or torchcodec

    def __post_init__(self) -> None:
        """Refuse values of another type or out of range."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            kinds = (int, float) if name == "fps" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "a number above 0" if name == "fps" else f"a whole number from {low}"
                raise ConfigError(f"{name} is {shown(value)}, expected {kind}, up to {high}.")
        for least, most in LIMITS:
            low, high = getattr(self, least), getattr(self, most)
            unused = least == "min_frames" and self.nframes is not None
            if low is not None and high is not None and low > high and low != _DEFAULTS[least] and not unused:
                raise ConfigError(f"{least} {low} is above {most} {high}; change one of them.")
        if not isinstance(self.backend, str):
            raise ConfigError(f"backend is {self.backend!r}, expected a name.")


_DEFAULTS = {entry.name: entry.default for entry in fields(FrameSettings)}  # a default gives way to a smaller maximum
