"""Intervals of means over questions, by drawing clips with replacement.

Where two models, or two orders of frames, answered the same questions, `values` are the
differences question by question, which makes the interval that of a paired comparison. Questions about one clip are
drawn together: they are right or wrong together more often than others, and counted singly they would make the interval
too narrow. With one question a clip that is the plain bootstrap over questions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 10_000
FEW = 30  # clips below which a bootstrap interval says little
_AT_ONCE = 2_000_000  # counts in memory


def mean_interval(
    values: Sequence[float], clips: Sequence[Hashable], *, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float, float]:
    """Mean, lower and upper end of its 95 % bootstrap percentile interval; zeros where there is no question.

    Args:
        values: one a question.
        clips: which clip each question is about.
        seed: of the drawing; the same seed gives the same interval.
        draws: how many samples are drawn.
    """
    if len(values) == 0:
        return 0.0, 0.0, 0.0
    number: dict[Hashable, int] = {}
    place = np.array([number.setdefault(clip, len(number)) for clip in clips])
    sums = np.bincount(place, weights=np.asarray(values, dtype=np.float64))
    sizes = np.bincount(place).astype(np.float64)
    generator, means, count = np.random.default_rng(seed), [], len(sums)
    for start in range(0, draws, max(1, _AT_ONCE // count)):
        rows = min(max(1, _AT_ONCE // count), draws - start)
        times = generator.multinomial(count, np.full(count, 1 / count), size=rows)
        means.append((times @ sums) / (times @ sizes))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)
