"""What a model means by what it wrote: the answer without reasoning blocks, tags, boxes and markup."""

from __future__ import annotations

import re
import unicodedata

from sta_adapter.evaluation.answer_words import RIGHT_SIGNS, WRONG_SIGNS

_OPEN, _CLOSE = r"[<\[◁]", r"[>\]▷]"
_THINK = r"(?:think|thinking|thought|thoughts|reason|reasoning|analysis|reflection|scratchpad)"
_ANSWER = r"(answer|final[ _]?answer|final|response|solution|output)"
_ANY = re.DOTALL | re.IGNORECASE
_REASONING = re.compile(rf"{_OPEN}{_THINK}{_CLOSE}.*?(?:{_OPEN}/{_THINK}{_CLOSE}|\Z)", _ANY)
_REASONING_BEFORE = re.compile(rf"\A.*{_OPEN}/{_THINK}{_CLOSE}", _ANY)  # the prompt ended with the opening tag
_TAGGED = re.compile(rf"{_OPEN}{_ANSWER}{_CLOSE}(.*?)(?:{_OPEN}/\1{_CLOSE}|\Z)", _ANY)
_GLM_BOX = re.compile(r"<\|(begin_of_box)\|>(.*?)(?:<\|end_of_box\|>|\Z)", _ANY)
_LATEX_BOX = re.compile(r"\\[fc]?box(?:ed)?\s*\{")
_LATEX_STYLE = re.compile(r"\\(?:text\w*|math\w+|bf|rm|bm|boldsymbol|emph|underline|operatorname)\s*\{([^{}]*)\}")
_HTML = re.compile(r"<([a-z]\w{0,9})(?: [^<>\n]{0,80})?>(.*?)</\1>", _ANY)
_MARKUP = (
    (re.compile(r"~~.*?~~", re.DOTALL), ""),  # struck out: withdrawn
    (re.compile(r"<\|[^|<>]*\|>|</s>"), ""),  # special tokens
    (re.compile(r"<br */?>|</p>", re.IGNORECASE), "\n"),
    (re.compile(r"```(?:\w+(?=\n))?"), ""),
    (re.compile(r"\\[()\[\]]|\$+|[*`]+"), ""),
    (re.compile(r"(?<![^\W_])_+|_+(?![^\W_])"), ""),
    (re.compile(r"^[ \t]*(?:[#>]+[ \t]*|[-+•·][ \t]+)+", re.MULTILINE), ""),
)
_SAYING = "°" + RIGHT_SIGNS + WRONG_SIGNS  # the only pictures that say something
_UNSEEN = ("Cc", "Cf")  # control characters, marks of direction, joiners: categories of Unicode


def final_answer(said: str) -> str:
    """The answer alone, in compatibility-normalised Unicode: what an answer tag or a box holds, else all but the reasoning.

    Returns:
        Its lines, none of them empty; "" where it never came to an answer.
    """
    text = unicodedata.normalize("NFKC", said)
    text = _REASONING_BEFORE.sub("", _REASONING.sub("", text))
    for tag in (_TAGGED, _GLM_BOX):
        found = tag.findall(text)
        text = found[-1][1] if found else text
    text = _last_box(text)
    for _ in range(3):  # \textbf{\text{B}}
        text = _LATEX_STYLE.sub(r"\1", text)
    text = _HTML.sub(r"\2", text)
    for pattern, instead in _MARKUP:
        text = pattern.sub(instead, text)
    text = "".join(map(_plain, text)).strip() or text  # an answer may be a picture
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _plain(character: str) -> str:
    """A character as it reads: what can't be seen is dropped, and a picture stands between words as a space does."""
    if (character.isascii() and character.isprintable()) or character.isspace() or character in _SAYING:
        return character
    kind = unicodedata.category(character)
    if (kind == "So" and "ARROW" not in unicodedata.name(character, "")) or character == "\u200b":
        return " "
    unseen = kind in _UNSEEN or "\ufe00" <= character <= "\ufe0f" or "\U0001f3fb" <= character <= "\U0001f3ff"
    return "" if unseen else character


def _last_box(text: str) -> str:
    r"""What the last `\boxed{...}` holds; the text as it is where there is none."""
    boxes = list(_LATEX_BOX.finditer(text))
    if not boxes:
        return text
    inside, depth = text[boxes[-1].end() :], 1
    for place, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if not depth:
            return inside[:place]
    return inside
