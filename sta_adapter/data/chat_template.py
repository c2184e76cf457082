"""A conversation in the words of its chat template: whole, as a prompt, and what each turn adds to it.

Published templates differ in more than their words, and what is learned must not differ with them:

- GLM-4.1V's writes the answer that it is given as a list of parts as Python shows a list; such texts are given plainly.
- LLaVA-OneVision's writes other white space in front of an answer than where it asks for one; an answer stands behind what asks.
- Qwen3.5's and GLM-4.5V's ask for reasoning unless told not to, and Qwen3.5's takes an empty place for it out of earlier turns. They
  ask for reasoning where a conversation's answers have some, and an empty place stays.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sta_adapter.compatibility.processors import Processor
from sta_adapter.compatibility.releases import transformers_release
from sta_adapter.data.message import Message, Part, Record
from sta_adapter.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Plain = Record  # a message as templates take it
_REASONED = "</think>"
_NO_REASONING = re.compile(r"<think>\s*</think>\s*")


def has_reasoning(messages: Sequence[Message]) -> bool:
    """Whether an answer comes with the reasoning that leads to it."""
    return any(_REASONED in text for message in messages if message["role"] == "assistant" for text in _texts(message))


def render(processor: Processor, messages: list[Message], *, prompt: bool = False, thinking: bool = False) -> str:
    """The conversation, with a placeholder for each clip or image.

    A `prompt` ends with words that ask for the answer, with `thinking` for its reasoning too, where the template leaves the choice.

    Raises:
        DataError: the template can't render the conversation, or a text is none that it could stand in.
    """
    texts = [text for message in messages for text in _texts(message)]
    _require_unicode(texts)
    parts: list[_Plain] = [
        {"role": message["role"], "content": [_bare(part) for part in message["content"]]} for message in messages
    ]
    found = _written(processor, parts, prompt, thinking)
    plain = [_joined(message) if str(message["content"]) in found else message for message in parts]
    if plain != parts:  # it shows lists as Python does
        found = _written(processor, plain, prompt, thinking)
    _require_words(texts, found, processor.tokenizer)
    _require_whole(messages, found)
    return found


def question_text(before: str, asked: str) -> str:
    """What is added to a written conversation up to where its next answer begins; an empty place for reasoning may go from it."""
    bare = _NO_REASONING.sub("", before)
    start = bare if asked.startswith(bare) and not asked.startswith(before) else before
    return grown(start, asked)[len(start) :]


def answer_text(asked: str, written: str, answer: Message) -> str:
    """What an answer adds to the text that asks for it, in a conversation as the template writes it."""
    begun, said = asked.rstrip(), next(filter(str.strip, _texts(answer)), "")
    start = written.find(said, len(begun))
    if (
        not written.startswith(asked)
        and written.startswith(begun)
        and not written[len(begun) : start].strip()
        and start > 0
    ):
        return written[start:]
    return grown(asked, written)[len(asked) :]


def grown(shorter: str, longer: str) -> str:
    """`longer`, if it begins with `shorter`; else a DataError."""
    if longer.startswith(shorter):
        return longer
    same = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer))
    raise DataError(
        f"the chat template rewrites earlier turns when a turn is added: {shorter[same : same + 40]!r} became "
        f"{longer[same : same + 40]!r}; expected it only to append. Use a template without that (pass another chat template)."
    )


def _written(processor: Processor, messages: list[_Plain], prompt: bool, thinking: bool) -> str:
    template = str(getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None))
    choices = {"enable_thinking": thinking, "preserve_thinking": True}
    known: dict[str, object] = {name: choice for name, choice in choices.items() if name in template}
    write: Callable[..., object] = processor.apply_chat_template
    # processors of these releases don't hand a template its own variables
    if known and (4, 49) <= transformers_release() < (4, 52):
        write = functools.partial(processor.tokenizer.apply_chat_template, chat_template=template)
    try:
        return str(write(messages, tokenize=False, add_generation_prompt=prompt, **known))
    except Exception as error:
        roles = ", ".join(str(message["role"]) for message in messages) or "none"
        raise DataError(
            f"the chat template can't render the roles ({roles}): {type(error).__name__}: {error}"
        ) from error


def _require_words(texts: list[str], found: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens among words by which the template sets turns and clips off, or by which a text ends: they would act as such."""
    said = "\0".join(texts)
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    ends.discard("<unk>")  # which some captions hold, and some tokenizers fill up with
    for token in (str(added) for added in tokenizer.added_tokens_decoder.values() if added.special):
        if token in said and (token in ends or found.count(token) > said.count(token)):
            raise DataError(
                f"a text contains {token}, a token that the chat template or a tokenizer writes by itself. Take it out, and give "
                "turns as messages of their own."
            )


def _require_whole(messages: list[Message], found: str) -> None:
    """Refuse what the template drops: some take the system's words in front alone. Of answers they drop reasoning by design."""
    for message in messages:
        for text in _texts(message) if message["role"] != "assistant" else ():
            if text.strip() not in found:
                raise DataError(
                    f"the chat template leaves out what the {message['role']} says, {text.strip()[:40]!r}; expected it to write every "
                    "turn. Put the system's words in front, or say them in a turn of the user."
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


def _texts(message: Message) -> list[str]:
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def _joined(message: _Plain) -> _Plain:
    """A message of text alone, with its text as it is."""
    parts = message["content"]
    is_text = all(part["type"] == "text" for part in parts)
    return {**message, "content": "".join(part["text"] for part in parts)} if is_text else message


def _bare(part: Part) -> Part:
    return {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
