"""STAConfig: every setting of the STA branch, checked when it is made."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar, cast

from sta_adapter._validate import unknown_names
from sta_adapter.errors import ConfigError

T = TypeVar("T")
CHOICES: dict[str, tuple[str, ...]] = {
    "order": ("after_spatial", "before_spatial"),
    "init": ("zero", "normal"),
    "attention": ("auto", "xformers", "sdpa", "eager"),
    "token_order": ("clip", "published"),
}


# fields by which the same tensors compute something else
COMPUTED = ("order", "rope_theta", "single_frames", "causal", "window", "token_order")


class _Default:
    """Stands for "not given" in a signature, and prints as the value that holds when the backbone has none of its own."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def _default(value: T) -> T:
    return dataclasses.field(default=cast("T", _Default(value)))


@dataclasses.dataclass(frozen=True)
class STAConfig:
    """Settings of stacked temporal attention (arXiv 2510.26027, section 3).

    What is not given takes the backbone's own default at injection (InternVideo2, for one, has no RoPE and a
    LayerScale); what is given always holds. `handle.config` is the configuration in force.

    Attributes:
        head_scale: heads of the branch as a share of the encoder's: `max(1, round(head_scale * heads))`.
        order: the branch runs after spatial attention (the paper's choice) or before it.
        layers: "all", or the indices of the encoder's blocks that get a branch.
        rope_theta: base of the 1-d rotary embedding on the frame index; None for no rotary embedding.
        gamma_init: initial value of a LayerScale vector on the branch; None for no LayerScale.
        init: "zero" sets the output projection to zero, so that a fresh injection changes nothing; "normal" draws it,
            as always the q, k, v projection, with a standard deviation of 0.02.
        single_frames: whether a clip of one frame, a still image, passes through the branch too.
        causal: whether a frame attends only to itself and to earlier frames.
        window: with `causal`, to how many frames a frame attends: itself and those just before it; None for all.
        attention: which attention kernel to use; "auto" chooses per call.
        token_order: "clip" as in the paper; "published" reproduces the released Qwen2-VL code, which adds the
            branch's output in (position, frame) order to tokens in (frame, position) order.

    Raises:
        ConfigError: for a value of the wrong type or out of range, or a window without `causal`.
    """

    head_scale: float = _default(0.25)
    order: Literal["after_spatial", "before_spatial"] = _default("after_spatial")
    layers: Literal["all"] | tuple[int, ...] = _default("all")
    rope_theta: float | None = _default(10000.0)
    gamma_init: float | None = _default(None)
    init: Literal["zero", "normal"] = _default("zero")
    single_frames: bool = _default(True)
    causal: bool = _default(False)
    attention: Literal["auto", "xformers", "sdpa", "eager"] = _default("auto")
    token_order: Literal["clip", "published"] = _default("clip")
    window: int | None = _default(None)

    def __post_init__(self) -> None:
        given = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, _Default):
                value = value.value
            else:
                given.append(field.name)
            object.__setattr__(self, field.name, _checked(field.name, value))
        object.__setattr__(self, "_given", frozenset(given))
        if self.window is not None and not self.causal:
            raise ConfigError(
                f"window={self.window} is how far a frame looks back, so it needs causal=True; found causal=False."
            )

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that were passed; the others may take a backbone's default."""
        return cast("frozenset[str]", self.__dict__["_given"])

    def with_defaults(self, defaults: Mapping[str, object]) -> STAConfig:
        """This configuration, with `defaults` in the place of every field that was not given."""
        values = {**self.to_dict(), **{k: v for k, v in defaults.items() if k not in self.given}}
        return STAConfig.from_dict(values)

    def to_dict(self) -> dict[str, object]:
        """All fields as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def told_apart(self, saved: Mapping[str, object]) -> str:
        """Fields of `saved` that let STA's tensors compute something else than here, as an error names them; empty where none do."""
        here = self.to_dict()
        differ = [name for name in COMPUTED if saved.get(name, here[name]) != here[name]]
        return ", ".join(f"{name} {saved[name]!r} (not {here[name]!r})" for name in differ)

    def __deepcopy__(self, memo: dict[int, object]) -> STAConfig:
        """Itself, as it can't change: blocks that PEFT has copied still have the same settings, and share what hangs on them."""
        return self

    @classmethod
    def from_dict(cls, values: object) -> STAConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: for unknown fields (all of them are named) or bad values.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"an STA configuration is a mapping of fields, not {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in values if name not in known]:
            named = unknown_names(unknown, known)
            raise ConfigError(f"unknown STA configuration field {named}; known: {', '.join(known)}.")
        return cls(**values)


def _checked(name: str, value: object) -> object:
    """Value of one field, in its normal form."""
    if name in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[name]:
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(map(repr, CHOICES[name]))}.")
        return value
    if name == "layers":
        return value if isinstance(value, str) and value == "all" else _checked_layers(value)
    if name in ("single_frames", "causal"):
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r}: expected True or False.")
        return value
    if value is None and name != "head_scale":
        return None
    if name == "window":
        return checked_window(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{name}={value!r}: expected a finite number{'' if name == 'head_scale' else ' or None'}.")
    if name != "gamma_init" and value <= 0:
        raise ConfigError(f"{name}={value!r}: expected a number above 0.")
    if name == "head_scale" and value > 16:
        raise ConfigError(
            f"head_scale={value!r}: expected at most 16, a share of the encoder's heads (the paper: 0.25)."
        )
    return float(value)


def checked_window(value: object) -> int:
    """A window, in frames; a ConfigError where it is no whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"window={value!r}: expected a whole number of frames above 0; a window of 1 is the frame itself."
        )
    return value


def _checked_layers(value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ConfigError(f"layers={value!r}: expected 'all' or a sequence of block indices.")
    layers = list(value)
    wrong = [v for v in layers if isinstance(v, bool) or not isinstance(v, int) or v < 0]
    if wrong or not layers:
        found = f"{wrong[0]!r} in it" if wrong else "nothing in it"
        raise ConfigError(f"layers={value!r}: {found}; expected block indices counted from 0, at least one.")
    if len(set(layers)) != len(layers):
        raise ConfigError(f"layers={value!r}: a block index stands there twice.")
    return tuple(sorted(layers))
