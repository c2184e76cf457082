"""How much of a run's data was of use, counted as it comes and added up over all processes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypedDict

from sta_adapter.distributed import of_all_ranks
from sta_adapter.errors import DataError

logger = logging.getLogger(__name__)

BAD_AT_START = 20  # so many bad samples and nothing else, from the start, end the run


class Counts(TypedDict):
    """Of all processes."""

    batches_used: int
    bad_samples: list[str]


class SampleCounts:
    """Batches that were used, and the samples that were not, each with the reason."""

    def __init__(self, batches_used: int = 0, bad_samples: Iterable[str] = ()) -> None:
        self.batches_used = batches_used
        self.bad_samples = dict.fromkeys(bad_samples)

    def add_bad(self, messages: Iterable[str]) -> None:
        """Note bad samples, and warn of those that are new."""
        for message in messages:
            if message not in self.bad_samples:
                self.bad_samples[message] = None
                logger.warning("skipped a bad sample (%d so far): %s", len(self.bad_samples), message)

    def require_good_start(self) -> None:
        """Refuse to go on with data of which nothing was of use so far."""
        if not self.batches_used and len(self.bad_samples) >= BAD_AT_START:
            raise DataError(
                f"the first {len(self.bad_samples)} samples are all bad, first {next(iter(self.bad_samples))}"
            )

    def require_used(self) -> None:
        """Refuse to call a run finished that had nothing to learn from; called on all processes."""
        counts = self.of_all()
        if not counts["batches_used"] and counts["bad_samples"]:
            raise DataError(f"all {len(counts['bad_samples'])} samples are bad, first {counts['bad_samples'][0]}")

    def of_all(self) -> Counts:
        """`batches_used` and `bad_samples` of all processes, which must all call this."""
        counts = of_all_ranks((self.batches_used, list(self.bad_samples)))
        bad = dict.fromkeys(sample for _, samples in counts for sample in samples)
        return {"batches_used": sum(used for used, _ in counts), "bad_samples": list(bad)}
