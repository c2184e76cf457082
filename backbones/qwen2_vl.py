"""Qwen2-VL."""

BACKBONE = None
