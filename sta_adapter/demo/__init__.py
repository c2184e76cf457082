"""The demo: tiny base, made clips, the comparison and its report."""

from pathlib import Path

TINY_BASE = Path(__file__).parent / "tiny_qwen2_vl"
"""Folder of a real Qwen2-VL of 344,544 parameters that tells what is in a frame."""
