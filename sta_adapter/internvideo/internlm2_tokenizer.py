"""InternLM2's tokenizer without its published code: from `tokenizer.json`, or converted from SentencePiece's `tokenizer.model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from sta_adapter._lazy import importing
from sta_adapter.errors import CheckpointError
from sta_adapter.internvideo.weights import added_tokens, read_json

CONTROL, USER_DEFINED, BPE = 3, 4, 2
"""Kinds of pieces and of models in SentencePiece's format."""
SPACE = "▁"
ENDS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


class Piece(Protocol):
    """One of a SentencePiece model."""

    piece: str
    score: float
    type: int


class TrainerSpec(Protocol):
    """How it was trained."""

    unk_id: int
    model_type: int


class NormalizerSpec(Protocol):
    """What it does to a text first."""

    add_dummy_prefix: bool


class ModelProto(Protocol):
    """What is read of a SentencePiece model."""

    pieces: Sequence[Piece]
    trainer_spec: TrainerSpec
    normalizer_spec: NormalizerSpec

    def ParseFromString(self, serialized: bytes) -> int:
        """Fill it from the bytes of its file."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer whose files lie in a folder; `tokenizer.model` alone needs protobuf."""
    settings = read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        core = _read(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        core = _converted(folder / "tokenizer.model", added_tokens(folder), settings)
    else:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; found: {there}. Download the tokenizer's files as well "
            "(tokenizer.model, tokenizer_config.json, added_tokens.json)."
        )
    words = {name: _text(settings.get(name)) or usual for name, usual in ENDS.items()}
    names = ["input_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, **words, clean_up_tokenization_spaces=False, model_input_names=names
    )
    special = [token.content for _, token in sorted(core.get_added_tokens_decoder().items()) if token.special]
    made.add_special_tokens({"additional_special_tokens": [text for text in special if text not in words.values()]})
    template = folder / "chat_template.jinja"
    made.chat_template = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    return made


def _text(token: object) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _read(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain exceptions
        raise CheckpointError(f"{file} can't be read as a tokenizer: {error}; download it again.") from error


def _converted(file: Path, added: dict[str, int], settings: Mapping[str, object]) -> Tokenizer:
    """A SentencePiece model of byte pairs, with the tokens that the settings put in the place of some of its pieces."""
    proto = _model(file)
    pieces = [piece.piece for piece in proto.pieces]
    for text, number in added.items():
        if number < len(pieces):
            pieces[number] = text
    vocab = {piece: number for number, piece in enumerate(pieces)}
    unknown = pieces[proto.trainer_spec.unk_id]
    core = Tokenizer(
        models.BPE(vocab, _merges(proto, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True, dropout=None)
    )
    spec = proto.normalizer_spec
    prefix = [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    core.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    core.add_tokens([AddedToken(text, normalized=False, special=False) for text in defined if text in vocab])
    control = [pieces[number] for number, piece in enumerate(proto.pieces) if piece.type == CONTROL]
    special = dict.fromkeys([unknown, *control, *sorted(added, key=lambda text: added[text])])
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    wrong = {text: number for text, number in added.items() if core.token_to_id(text) != number}
    if wrong:
        raise CheckpointError(
            f"added tokens don't get their ids, such as {next(iter(wrong.items()))}: {file.name} has {len(pieces)} pieces. "
            "It and tokenizer_config.json or added_tokens.json are of different models; download them again."
        )
    if settings.get("add_bos_token", True):
        bos = _text(settings.get("bos_token")) or ENDS["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return core


def _merges(proto: ModelProto, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs that make each piece, by the score of what they make, as SentencePiece joins them."""
    scores = {piece.piece: (piece.score, number) for number, piece in enumerate(proto.pieces)}
    found = []
    for piece, (score, number) in scores.items():
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece))):
            if left in scores and right in scores and piece in vocab and left in vocab and right in vocab:
                found.append((-score, number, vocab[left], vocab[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _model(file: Path) -> ModelProto:
    with importing(
        f"{file} is read with protobuf, which isn't installed: pip install protobuf. Once read, processor.save_pretrained"
        "(FOLDER) writes a tokenizer.json, which needs it no more."
    ):
        from transformers.convert_slow_tokenizer import import_protobuf

        model = cast(ModelProto, import_protobuf().ModelProto())
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise CheckpointError(f"{file} is no SentencePiece model: {error}; download it again.") from error
    if model.trainer_spec.model_type != BPE or not model.pieces:
        raise CheckpointError(
            f"{file} holds {len(model.pieces)} pieces and no byte pairs; expected InternLM2's tokenizer."
        )
    return model
