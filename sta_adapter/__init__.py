"""Stacked temporal attention (STA, arXiv 2510.26027) as a plug-in for video language models."""

__version__ = "0.1.0"
