"""What the models with STA share: the arguments, and putting the adapter in."""

from __future__ import annotations

from torch import nn

from sta_adapter.errors import ConfigError


class WithAdapter:
    """Stands in front of one of lmms-eval's model classes, whose `__init__` leaves the base in `_model`.

    Args:
        sta: the adapter, a folder or an id on the Hub; STA, LoRA beside it, or LoRA alone.
        sta_revision: branch, tag or commit on the Hub.
        positions: "trained" or "transformers" (see `sta_adapter.text_positions`); None for the adapter's own.
        arguments: the base class's own.
    """

    _model: nn.Module

    def __init__(
        self, sta: str | None = None, sta_revision: str | None = None, positions: str | None = None, **arguments: object
    ) -> None:
        from sta_adapter.loading import with_adapter

        if sta is None:
            raise ConfigError("no adapter; add sta=FOLDER_OR_ID to --model_args, or take the model without '_sta'.")
        super().__init__(**arguments)
        self._model = with_adapter(self._model, sta, positions=positions, revision=sta_revision)
