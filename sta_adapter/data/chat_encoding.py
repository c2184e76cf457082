"""Turn a conversation with decoded clips into what a model takes, with labels on the assistant's words alone.

It works for any chat template that renders a longer conversation as the shorter one plus more, and for some that
don't (`sta_adapter.data.chat_template`); where another doesn't, or where a token would straddle the border between prompt and
answer, a `DataError` says so. The prompt's tokens are exactly those that generation would see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from sta_adapter.compatibility.processors import Processor, placeholder
from sta_adapter.data.chat_template import answer_text, has_reasoning, question_text, render
from sta_adapter.data.clip_batches import tokens_of
from sta_adapter.data.message import Message, Visual
from sta_adapter.data.visual_processing import Encoded, join, process, require_placeholders, sized, temporal_patch
from sta_adapter.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


@dataclass(frozen=True)
class Prompt:
    """A prompt as an engine takes it that processes clips by itself."""

    tokens: list[int]  # the rendered conversation, with one placeholder for each clip or image
    visuals: list[Visual]  # these, in their final size where `settings` say so
    settings: dict[str, object]  # of the video processor
    temporal_patch: int = 1  # how many frames the model merges into one
    placeholders: frozenset[int] = frozenset()  # the token ids that stand for what the encoder sees

    @classmethod
    def of(
        cls, processor: Processor, messages: list[Message], visuals: list[list[Visual]], thinking: bool = False
    ) -> Prompt:
        """The prompt of a conversation; arguments as for `encode_prompt`."""
        flat = _flat(visuals)
        clips, settings = sized(processor, [visual for visual in flat if visual.kind == "video"])
        final = iter(clips)
        shown = [next(final) if visual.kind == "video" else visual for visual in flat]
        tokens = tokens_of(processor, render(processor, messages, prompt=True, thinking=thinking))
        words = [word for kind in ("image", "video") if (word := placeholder(processor, kind)) is not None]
        places = frozenset(cast("list[int]", processor.tokenizer.convert_tokens_to_ids(words)))
        return cls(tokens, shown, settings, temporal_patch(processor), places)


class Loaded(dict[str, torch.Tensor]):
    """An encoded sample that knows where it stands, and for engines what it was made from."""

    source = "sample"
    prompt: Prompt | None = None

    @classmethod
    def of(cls, encoded: Encoded, source: str) -> Loaded:
        """An encoded sample and its source."""
        made = cls(encoded)
        made.source = source
        return made


class Turn(NamedTuple):
    """A stretch of a rendered conversation, which ends where an answer begins or ends."""

    before: str  # the text in front of it
    after: str  # the text up to its end
    visuals: list[Visual]  # the clips and images within it
    learned: bool = False  # whether it is an answer to learn

    @property
    def text(self) -> str:
        """What it adds."""
        return self.after[len(self.before) :]


def encode(
    processor: Processor, messages: list[Message], visuals: list[list[Visual]], thinking: bool | None = None
) -> Encoded:
    """Encode a conversation for training.

    Args:
        processor: a transformers processor with a tokenizer and a chat template.
        messages: as in `Sample.messages`.
        visuals: the decoded clips and images of each message, in order.
        thinking: whether reasoning is asked for, where the chat template leaves the choice; None does so if an answer
            has some.

    Returns:
        `input_ids` and `labels` (L,), which are `IGNORE` outside the answers, and the processor's other tensors.

    Raises:
        DataError: there is no answer, or the chat template doesn't allow to tell the answers' tokens from the rest.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError("no message with role 'assistant'; expected an answer to learn.")
    if not any(messages[index].get("loss", True) for index in answers):
        raise DataError("every answer has 'loss': false; expected one to learn.")
    turns = list(_turns(processor, messages, visuals, has_reasoning(messages) if thinking is None else thinking))
    pieces = [_piece(processor, turn) for turn in turns]
    pieces[-1] = _ended(processor.tokenizer, pieces[-1])
    labels = [
        _learned(processor.tokenizer, piece["input_ids"])
        if turn.learned
        else torch.full_like(piece["input_ids"], IGNORE)
        for turn, piece in zip(turns, pieces, strict=True)
    ]
    return {**join(pieces), "labels": torch.cat(labels)}


def encode_prompt(
    processor: Processor, messages: list[Message], visuals: list[list[Visual]], thinking: bool = False
) -> Encoded:
    """A conversation that waits for an answer: arguments and tensors of `encode`, without labels."""
    return _piece(processor, Turn("", render(processor, messages, prompt=True, thinking=thinking), _flat(visuals)))


def encode_answer(processor: Processor, messages: list[Message], answer: str, thinking: bool = False) -> torch.Tensor:
    """Token ids `(L,)` of an answer to the conversation, its end of turn included."""
    before = render(processor, messages, prompt=True, thinking=thinking)
    turn: Message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    after = before + answer_text(before, render(processor, [*messages, turn], thinking=thinking), turn)
    ids = _ended(processor.tokenizer, _piece(processor, Turn(before, after, [])))["input_ids"]
    return ids[_learned(processor.tokenizer, ids) != IGNORE]


def _turns(
    processor: Processor, messages: list[Message], visuals: list[list[Visual]], thinking: bool
) -> Iterator[Turn]:
    """What leads to each answer and the answer itself, up to the last one."""
    text, written, first = "", "", 0  # the text so far, as it was written once, and as the template writes it now
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = render(processor, messages[:index], prompt=True, thinking=thinking)
            before = text + question_text(written, asked)
            written = render(processor, messages[: index + 1], thinking=thinking)
            after = before + answer_text(asked, written, message)
            yield Turn(text, before, _flat(visuals[first:index]))
            yield Turn(before, after, visuals[index], learned=message.get("loss", True))
            text, first = after, index + 1


def _flat(visuals: list[list[Visual]]) -> list[Visual]:
    return [visual for group in visuals for visual in group]


def _piece(processor: Processor, turn: Turn) -> Encoded:
    """Encode what a turn adds: each clip is processed once, in the turn that it stands in."""
    start, tokens = tokens_of(processor, turn.before), tokens_of(processor, turn.after)
    if tokens[: len(start)] != start:
        mend = (
            "The model is asked for its reasoning: begin the answer with it, <think>...</think>, or take a model that answers at once."
            if turn.before.rstrip().endswith("<think>")
            else "Remove white space at the start of the answer."
        )
        raise DataError(
            f"a token straddles the border between {turn.before[-20:]!r} and {turn.text[:20]!r}; expected the prompt's "
            f"tokens to be a prefix of the whole. {mend}"
        )
    added = tokens[len(start) :]
    require_placeholders(processor, turn.text, turn.visuals)
    if not turn.visuals:
        return {"input_ids": torch.tensor(added, dtype=torch.long)}
    if start and tokens_of(processor, turn.text) != added:
        raise DataError(
            f"the tokenizer reads {turn.text[:40]!r} differently on its own; clips after the first answer need that."
        )
    return process(processor, turn.text, turn.visuals)


def _ended(tokenizer: PreTrainedTokenizerBase, piece: Encoded) -> Encoded:
    """The last turn must end with a token to stop at: templates that leave it out get the end-of-text token."""
    ids = piece["input_ids"]
    if tokenizer.eos_token_id is None or _end(tokenizer, ids.tolist()) is not None:
        return piece
    return {**piece, "input_ids": torch.cat([ids, ids.new_tensor([tokenizer.eos_token_id])])}


def _learned(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor:
    """Labels of an answer: all of it up to and with its end-of-turn token, not the white space after that."""
    end = _end(tokenizer, ids.tolist())
    labels = ids.clone()
    if end is not None:
        labels[end + 1 :] = IGNORE
    return labels


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int | None:
    """Index of the special token that nothing but white space follows."""
    special = set(tokenizer.all_special_ids)
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] in special:
            return index
        if str(tokenizer.decode(ids[index:])).strip():
            return None
    return None
