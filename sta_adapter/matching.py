"""Which of a question's options a written answer names.

Public: `named_option(said, labels, texts)`. Benchmarks compare what a model wrote with the options by rules like these; where theirs
ask another language model about answers that no rule fits, such an answer counts as wrong here, and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LEAD_IN = r"\b(?:answer|option|choice)(?: is)?:? *"


def named_option(said: str, labels: Sequence[str], texts: Sequence[str] = ()) -> int | None:
    """The index of the option that an answer names, None where it names none or several.

    Rules, the first that fits decides: the answer is a label or begins with one ("B", "(B)", "B. up", "Sentence B: ...",
    "yes, it is"); it leads in to one ("the answer is B"); it contains one option's text and no other's.

    Args:
        said: what the model wrote.
        labels: what the options are called: "A", "Option 1", "yes".
        texts: what they say, for answers in words.
    """
    answer = " ".join(said.split())
    starts = {i for i, label in enumerate(labels) for name in _names(label) if re.match(_begins_with(name), answer)}
    if len(starts) == 1:
        return starts.pop()
    called = {
        i for i, label in enumerate(labels) for name in _names(label)
        if re.search(rf"(?i:{_LEAD_IN})\(?{re.escape(name)}\)?(?!\w)", answer)
    }  # fmt: skip
    if len(called) == 1:
        return called.pop()
    words = _plain(answer)
    within = [i for i, text in enumerate(texts) if re.search(rf"(?<!\w){re.escape(_plain(text))}(?!\w)", words)]
    longest = [i for i in within if not any(_plain(texts[i]) in _plain(texts[j]) for j in within if j != i)]
    return longest[0] if len(longest) == 1 else None


def _names(label: str) -> list[str]:
    """A label, and the letter or figure at its end: "Sentence A" is also called "A"."""
    *before, last = label.split()
    return [label, last] if len(before) == 1 and len(last) == 1 else [label]


def _begins_with(name: str) -> str:
    """One letter or figure needs a mark or the end behind it: "A man runs" does not name option A."""
    escaped = re.escape(name)
    if len(name) > 1:
        return rf"(?i:\(?{escaped}(?!\w))"
    return rf"(?:\(?{escaped}[.):,]|\({escaped}\)|(?i:{escaped})$)"


def _plain(text: str) -> str:
    """Lower case, single spaces, no square brackets, no full stop at the end."""
    return " ".join(re.sub(r"[\[\]]", "", text).split()).removesuffix(".").casefold()
