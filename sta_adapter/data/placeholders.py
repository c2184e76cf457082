"""Words in a text that stand for a clip or a picture, as data sets write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sta_adapter.data.message import Message
from sta_adapter.errors import DataError

PLACEHOLDER = re.compile(r"<(video|image)>")
_MEANT_AS_ONE = re.compile(  # also as Qwen-VL and VideoChat write it
    r"(?P<image><image(here)?>|<img>[^<>\0]+</img>)|(?P<video><video(here)?>)", re.IGNORECASE
)
_AT_AN_END = re.compile(r"(?:\A|\0)\s*(?P<first><(?:video|image)>)|\n(?P<last><(?:video|image)>)\s*(?:\0|\Z)")


def require_clips(messages: Sequence[Message]) -> None:
    """Refuse words among parts that were to become a clip, where there is none or where it is a part already: they would be learned as words."""
    parts = [part for message in messages if message["role"] != "assistant" for part in message["content"]]
    said = "\0".join(part["text"] for part in parts if part["type"] == "text")
    for place in _MEANT_AS_ONE.finditer(said):
        kind = str(place.lastgroup)
        if all(part["type"] != kind for part in parts):
            raise DataError(
                f"a text contains {place[0][:80]} and no part is of type {kind}, expected one with the path."
            )
    if found := _AT_AN_END.search(said):
        raise DataError(
            f"a text has {found['first'] or found['last']} as if it stood for a part, and the parts are there by themselves, so that it would be "
            "read as words; take it out."
        )
