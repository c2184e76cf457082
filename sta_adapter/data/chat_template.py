"""A conversation as a model's chat template writes it."""

from __future__ import annotations

from sta_adapter.compatibility.processors import Processor
from sta_adapter.data.message import Message, Part
from sta_adapter.errors import DataError

__all__ = ["grown", "render"]


def render(processor: Processor, messages: list[Message], *, prompt: bool = False) -> str:
    """The conversation as the chat template writes it, with one placeholder for each clip or image.

    Args:
        processor: has the chat template.
        messages: the conversation.
        prompt: end with the words that ask for the assistant's answer.
    """
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    _require_unicode(texts)
    _require_no_end(texts, processor.tokenizer.eos_token)
    bare = [{"role": message["role"], "content": [_bare(part) for part in message["content"]]} for message in messages]
    try:
        found: str = processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=prompt)
        return found
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise DataError(
            f"the chat template can't render the roles ({roles}): {type(error).__name__}: {error}"
        ) from error


def grown(shorter: str, longer: str) -> str:
    """`longer`, if it begins with `shorter`."""
    if longer.startswith(shorter):
        return longer
    same = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    raise DataError(
        f"the chat template rewrites earlier turns when a turn is added: {shorter[same : same + 40]!r} became "
        f"{longer[same : same + 40]!r}; expected it only to append. Use a template without that (pass another chat template)."
    )


def _require_no_end(texts: list[str], end: object) -> None:
    """The template ends each turn by itself; a second end, as texts that were rendered already have it, would be learned."""
    if isinstance(end, str) and end and any(end in text for text in texts):
        raise DataError(
            f"a text contains {end}, which ends a turn, and which the chat template writes by itself. Take it out, and give "
            "turns as messages of their own."
        )


def _require_unicode(texts: list[str]) -> None:
    """Half a character, as a text that was cut within an emoji has it, is none that a tokenizer takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = ascii(text[error.start : error.end])
            raise DataError(
                f"the text holds {found} at character {error.start}, which is half a character (a surrogate without its other "
                "half); expected whole ones. Whatever wrote the file cut a text within an emoji: mend the text."
            ) from error


def _bare(part: Part) -> Part:
    return {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
