"""Compares drawings with those that are kept."""

import re

import matplotlib


def require_same_drawing(found, kept):
    """Byte for byte with the matplotlib of the lock; older ones, as Python 3.10 gets, lay it out otherwise, with the same words."""
    words = re.compile(r"<text[^>]*>([^<]*)</text>")
    assert words.findall(found) == words.findall(kept) != []
    if tuple(map(int, matplotlib.__version__.split(".")[:2])) >= (3, 11):
        assert found == kept
