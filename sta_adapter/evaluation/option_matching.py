"""Which of a question's options a written answer names.

Benchmarks compare what a model wrote with the options by rules like these; where theirs ask another language model
about answers that no rule fits, such an answer counts as wrong here, and is counted. What names several options, or
only says what the answer is not, names none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sta_adapter.evaluation import answer_words as words
from sta_adapter.evaluation.answer_text import final_answer

_ONE_LETTER_WORDS = "AEIOUY"  # of some language
_LETTERED = re.compile(r"\s*\(?(?P<letter>[A-Z])[.):]\s*(?P<text>\S.*)", re.DOTALL)
_NEAR = 90  # characters before a label in which its lead-in stands


@dataclass(frozen=True)
class _Mention:
    """An option's label in an answer."""

    index: int  # the option's
    start: int  # where it begins
    end: int  # where it ends, its option's own text included if that follows
    before: str  # what stands before it, as far as it matters
    after: str  # all that stands behind it
    short: bool  # a single letter or figure
    phrase: bool  # several words, which stand in no sentence by chance
    own_text: bool  # whether its option's own text follows
    capital: bool  # it can be no word of the sentence
    denied: bool  # whether it is said not to be the answer

    @property
    def marked(self) -> bool:
        """A mark, a reason or its own text behind a letter; a longer label, such as "yes", needs none."""
        return not self.short or self.own_text or words.MARK.match(self.after) is not None

    @property
    def sure(self) -> bool:
        """Not a word of the sentence that happens to be one letter long."""
        return self.capital or self.marked

    @property
    def first(self) -> bool:
        """Whether nothing but marks stands before it."""
        return not words.NO_DOUBT.sub("", self.before).strip(words.EDGES)

    @property
    def in_brackets(self) -> bool:
        """As in "to the right (B)"."""
        return self.before.endswith(("(", "[", "【")) and self.after.startswith((")", "]", "】"))

    @property
    def last_line(self) -> bool:
        """Alone on the last of several lines."""
        before, newline, line = self.before.rpartition("\n")
        return bool(newline and before) and not (line + self.after).strip(words.EDGES)

    @property
    def closing(self) -> bool:
        """What ends the answer, alone behind a colon: "Prediction: B"."""
        line = self.before.rpartition("\n")[2].rstrip(words.EDGES.replace(":", ""))
        return line.endswith(":") and not self.after.strip(words.EDGES) and words.NOT.search(line) is None


def named_option(said: str, labels: Sequence[str], texts: Sequence[str] = ()) -> int | None:
    """The index of the option that an answer names, None where it names none or several.

    What is looked at is `final_answer(said)`. The first rule that finds an option decides: the answer is a label or a
    text and nothing else; the one that is judged to be right ("A: no. B: yes."); a label behind "final answer"; behind
    "the answer is", or before "is correct"; at the beginning, with a mark or a reason behind it; behind "option", "so",
    "I choose", in brackets, with its own text, alone on the last line, or at the end behind a colon; the text of one
    option and of no other. A label or text that is denied ("not B", "B is wrong") counts in none of them, nor does a label
    that is part of an option's text ("vitamin C").

    Args:
        said: what the model wrote.
        labels: what the options are called: "A", "Option 1", "yes".
        texts: what they say, for answers in words; without them labels such as "A. up" are taken apart.
    """
    answer = final_answer(said)
    labels, texts = (labels, texts) if texts else _taken_apart(labels)
    whole = {i for given in (labels, texts) for i, name in enumerate(given) if _bare(name) == _bare(answer) != ""}
    if len(whole) == 1:
        return whole.pop()
    mentions = _mentions(answer, labels, texts)
    judged = [(m, verdict) for m in mentions if (verdict := words.VERDICT.match(answer[m.end :]))]
    right = {m.index for m, verdict in judged if not m.denied and (verdict["right"] or verdict["sign"])}
    if right or len(judged) > 1:
        return right.pop() if len(right) == 1 else None
    mentions = [m for m in mentions if not m.denied]
    rules = (
        [m for m in mentions if m.sure and words.FINALLY.search(m.before)],
        [m for m in mentions if (m.sure and words.ANSWER_IS.search(m.before)) or words.IS_RIGHT.match(m.after)],
        [m for m in mentions[:1] if m.first and m.marked],
        [m for m in mentions if m.last_line or m.phrase or (m.short and m.closing) or _is_cued(m)],
    )
    for found in rules:
        named = {m.index for m in (*found, *_joined(answer, mentions, found))}
        if named:
            return named.pop() if len(named) == 1 else None
    return _by_text(answer, texts)


def _taken_apart(options: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Labels and texts of options that begin with letters of their own, "A. up" or "(A) up"; others are labels as they are."""
    found = [match for option in options if (match := _LETTERED.fullmatch(option))]
    letters = [match["letter"] for match in found]
    if len(set(letters)) < len(options):
        return options, ()
    return letters, [match["text"] for match in found]


def _is_cued(mention: _Mention) -> bool:
    if not mention.short:  # "I think yes", and not "I see no ball"
        return bool(words.CUE.search(mention.before) and words.MARK.match(mention.after))
    return mention.in_brackets or (mention.sure and (mention.own_text or bool(words.CUE.search(mention.before))))


def _mentions(answer: str, labels: Sequence[str], texts: Sequence[str]) -> list[_Mention]:
    """Where the options' labels stand in an answer."""
    index = {name.casefold(): i for i, label in enumerate(labels) for name in _names(label)}
    if not index or words.NO_ANSWER.match(answer):
        return []
    names = "|".join(re.escape(name).replace(r"\ ", r"\s+") for name in sorted(index, key=len, reverse=True))
    tied = rf"(?<!{words.WORD})(?<!{words.WORD}{words.TIED})(?<!\bn/){words.NOT_NEGATIVE}"
    pattern = rf"{tied}({names})(?!{words.WORD}|{words.TIED}{words.WORD})"
    spans = _text_spans(answer, texts)
    found: list[_Mention] = []
    several = False  # whether what is said of the next one holds for all that are joined to it
    for match in reversed(list(re.finditer(pattern, answer, re.IGNORECASE))):
        if words.NO_DOUBT.match(answer, match.start()):
            continue
        name = " ".join(match[1].split())
        i = index[name.casefold()]
        if any(j != i and _is_part(match.span(), span) for j, span in spans):
            continue
        before, after = answer[max(match.start() - _NEAR, 0) : match.start()], answer[match.end() :]
        own = _own_text(after, texts[i] if i < len(texts) else "")
        if name in {*_ONE_LETTER_WORDS.lower()} and after.lstrip()[:1].isalnum():  # an article, as in "a normal speed"
            own = 0
        end = match.end() + own
        if own:  # a letter in it is no other option: "(B) a", "C. Both A and B"
            found = [mention for mention in found if mention.start >= end]
        several = bool(several and found and words.JOINED.fullmatch(answer[end : found[0].start]))
        denied = several or _denied(before) or words.DENIED.match(answer[end:]) is not None
        several = several or (denied and words.DENIED_TOGETHER.match(answer[end:]) is not None)
        short = len(name) == 1
        capital = short and name == name.upper() and name not in _ONE_LETTER_WORDS
        sure = capital or not short
        found.insert(0, _Mention(i, match.start(), end, before, after, short, " " in name, own > 0, sure, denied))
    return found


def _text_spans(answer: str, texts: Sequence[str]) -> list[tuple[int, tuple[int, int]]]:
    """Which options' texts an answer holds, and where."""
    return [
        (i, found.span())
        for i, text in enumerate(texts)
        if _bare(text)
        for found in re.finditer(rf"(?<!{words.WORD})(?i:{_spaced(text)})(?!{words.WORD})", answer)
    ]


def _is_part(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    """Whether a place lies within a longer one: the C of "C major"."""
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _own_text(after: str, text: str) -> int:
    """How much of what follows a label is marks and its option's text; 0 where that does not follow."""
    pattern = rf"[\s{re.escape(words.EDGES + words.DASHES)}=|]+(?i:{_spaced(text)})(?!{words.WORD})"
    match = re.match(pattern, after) if _bare(text) else None
    return match.end() if match else 0


def _joined(answer: str, mentions: list[_Mention], found: list[_Mention]) -> list[_Mention]:
    """Labels that are named together with those found: "A or B", and lists of options."""
    joined, starts = [], {mention.start for mention in found}
    for first, second in itertools.pairwise(mentions):
        if first.start in starts and (second.sure or not second.short):
            between = answer[first.end : second.start]
            if words.JOINED.fullmatch(between) and (second.short or "," not in between):  # "Yes, no other ball moves"
                joined.append(second)
                starts.add(second.start)
    return joined


def _denied(before: str) -> bool:
    """Whether the clause that leads to a place says "not"."""
    clause = words.CLAUSE.split(words.NO_DOUBT.sub("", before))[-1]
    return words.NOT.search(clause) is not None


def _by_text(answer: str, texts: Sequence[str]) -> int | None:
    """The option whose text an answer contains, where it contains no other's, or those only as parts of it."""
    said = _bare(answer)
    within = []
    for i, text in enumerate(texts):
        pattern = rf"(?<!{words.WORD}){words.NUMBER_AFTER}{re.escape(_bare(text))}{words.NUMBER_BEFORE}(?!{words.WORD})"
        found = re.finditer(pattern, said) if _bare(text) else ()
        if any(not _text_denied(said, match) for match in found):
            within.append(i)
    longest = [i for i in within if not any(_bare(texts[i]) in _bare(texts[j]) for j in within if j != i)]
    return longest[0] if len(longest) == 1 else None


def _text_denied(said: str, text: re.Match[str]) -> bool:
    """Whether an option's text is said not to be the answer, in front of it or behind."""
    before = said[max(text.start() - _NEAR, 0) : text.start()]
    return _denied(before) or words.DENIED.match(said[text.end() :]) is not None


def _names(label: str) -> list[str]:
    """A label, and the letter or figure at its end: "Sentence A" is also called "A"."""
    *before, last = label.split()
    return [label, last] if len(before) == 1 and len(last) == 1 else [label]


def _spaced(text: str) -> str:
    """A pattern of a text whatever its white space and the full stop at its end."""
    return re.escape(_bare(text)).replace(r"\ ", r"\s+")


def _bare(text: str) -> str:
    """Lower case, single spaces, no markup, no square brackets, no marks at the ends."""
    return " ".join(re.sub(r"[\[\]]", "", final_answer(text)).split()).strip(words.EDGES).casefold()
