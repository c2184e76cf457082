"""The prompt that InternVideo2-Chat was trained with, and its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sta_adapter.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sta_adapter.internvideo.v2_config import InternVideo2ChatConfig
    from sta_adapter.internvideo.v2_processor import InternVideo2ChatProcessor

IMAGE, VIDEO = "[<IMG_PLH>]", "[<VID_PLH>]"
"""Where a picture or a clip stands in a prompt."""

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}{% else %}\
{% set parts = message['content'] %}{% endif %}
    {%- set seen = parts | selectattr('type', 'in', ['image', 'video']) | list %}
    {%- set said = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') | trim %}
    {%- if message['role'] == 'system' %}
        {{- said }}
    {%- elif message['role'] == 'user' %}
        {%- if seen %}
            {{- '[INST] ' }}
            {%- for part in seen %}
                {{- '<Image>[<IMG_PLH>]</Image>' if part['type'] == 'image' else '<Video>[<VID_PLH>]</Video>' }}
            {%- endfor %}
            {{- '[/INST] [INST] ' + said + ' [/INST]' }}
        {%- elif loop.first or messages[loop.index0 - 1]['role'] == 'system' %}
            {{- '[INST] ' + said + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + said + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- said + eos_token }}
    {%- endif %}
{%- endfor %}"""
"""As the published `chat` writes it: clips and pictures in a turn of their own, then the question."""


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    places: InternVideo2ChatConfig | InternVideo2ChatProcessor,
    *,
    begins: bool = True,
) -> list[int]:
    """Token ids of a text with `IMAGE` and `VIDEO` in it, each of them as many placeholders as there are visual tokens.

    As in training, each stretch of text is tokenized by itself, so that each begins with the token of a text's beginning; a
    `bos_token` in front isn't doubled. Without `begins`, a text that has none goes on where another ended.
    """
    if tokenizer.bos_token_id is None:
        raise DataError(f"{type(tokenizer).__name__} has no bos_token, which begins each stretch of text; set it.")
    words = text.removeprefix(tokenizer.bos_token)
    goes_on = not begins and words == text
    tokens: list[int] = []
    for number, stretch in enumerate(re.split(f"({re.escape(IMAGE)}|{re.escape(VIDEO)})", words)):
        if stretch in (IMAGE, VIDEO):
            place = places.image_token_id if stretch == IMAGE else places.video_token_id
            tokens += [place] * places.num_visual_tokens
        else:
            begin = [] if goes_on and number == 0 else [tokenizer.bos_token_id]
            tokens += [*begin, *tokenizer(stretch, add_special_tokens=False)["input_ids"]]
    return tokens


def conversation(
    question: str,
    placeholders: Sequence[str],
    *,
    message: str = "",
    instruction: str = "",
    history: Sequence[tuple[str, str]] = (),
) -> str:
    """The published conversation, without the `bos_token` that begins it.

    `instruction` stands in front of all, then `placeholders`, `IMAGE` or `VIDEO` for each picture or clip, and behind them a
    `message`, such as at which seconds the frames were taken; `history` are questions and answers before.
    """
    tags = {IMAGE: "Image", VIDEO: "Video"}
    seen = "".join(f"<{tags[place]}>{place}</{tags[place]}>" for place in placeholders)
    before = "".join(f" [INST] {asked} [/INST]{answered}</s>" for asked, answered in history)
    return f"{instruction}[INST] {seen}{message.rstrip()}[/INST]{before} [INST] {question} [/INST]"
