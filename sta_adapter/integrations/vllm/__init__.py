"""STA in vLLM: `vllm serve BASE --hf-overrides '{"sta_adapter": "FOLDER_OR_ID"}'`.

vLLM calls `register` in each of its processes (entry points `vllm.general_plugins`). Without the setting it runs its
own models, bit for bit; with it a subclass of its class puts STA into the vision tower, see `models`.

"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Register a class for each architecture that a backbone names, by its name; imports no model, touches no device.

    Raises:
        CompatibilityError: vLLM has no such registry. Without STA, `VLLM_PLUGINS=""` keeps this plug-in out.
    """
    from sta_adapter.integrations.vllm.registry import register_models

    register_models()
