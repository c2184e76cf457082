"""OptionTree: the log-likelihoods of options as complete answers, from the likelihoods of single next tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

MOST_IDS = 128  # next tokens that vLLM scores in one request


@dataclasses.dataclass(frozen=True)
class Node:
    """A question to the engine: how likely are these tokens, behind a prompt and the beginning of an answer?"""

    prompt: int
    before: tuple[int, ...]
    following: tuple[int, ...]


class OptionTree:
    """The options of several prompts, as the tokens of each; what they begin with in common is held once."""

    def __init__(self, options: Sequence[Sequence[Sequence[int]]]) -> None:
        self.options = options
        self._found: dict[tuple[int, tuple[int, ...], int], float] = {}
        following: dict[tuple[int, tuple[int, ...]], dict[int, None]] = {}
        for prompt, answers in enumerate(options):
            for answer in answers:
                for end, token in enumerate(answer):
                    following.setdefault((prompt, tuple(answer[:end])), {})[token] = None
        self._nodes = [
            Node(prompt, before, tuple(tokens)[start : start + MOST_IDS])
            for (prompt, before), tokens in following.items()
            for start in range(0, len(tokens), MOST_IDS)
        ]

    def rounds(self) -> Iterator[list[Node]]:
        """First one question of each prompt, which fills the engine's caches, then the others."""
        first = [node for node in self._nodes if not node.before]
        rest = [node for node in self._nodes if node.before]
        yield from (nodes for nodes in (first, rest) if nodes)

    @staticmethod
    def padded(nodes: Sequence[Node]) -> list[list[int]]:
        """The tokens of each question, as many for all: vLLM fills shorter lists up with token 0 at no likelihood."""
        longest = max(len(node.following) for node in nodes)
        return [[*node.following, *node.following[:1] * (longest - len(node.following))] for node in nodes]

    def tell(self, node: Node, found: Mapping[int, float]) -> None:
        """Keep the log-likelihoods of a question's tokens."""
        for token in node.following:
            self._found[node.prompt, node.before, token] = found[token]

    def scores(self) -> list[list[float]]:
        """The log-likelihood of each option, once all questions are answered."""
        return [
            [
                sum(self._found[prompt, tuple(answer[:end]), token] for end, token in enumerate(answer))
                for answer in answers
            ]
            for prompt, answers in enumerate(self.options)
        ]
