"""An evaluation's share of each of several processes, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

from torch import distributed

from sta_adapter.distributed import is_parallel
from sta_adapter.errors import STAError

__all__ = ["Processes"]

Value = TypeVar("Value")
PATIENCE = timedelta(days=7)  # for the slowest; a process that dies is noticed at once, and so is one that fails


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; one of one, where none have found each other."""

    rank: int = 0  # this one's number
    size: int = 1  # how many there are
    group: distributed.ProcessGroup | None = None  # through which they talk, on the CPU

    @classmethod
    def joined(cls) -> Processes:
        """Those of `torch.distributed`'s process group; all of them must call this."""
        if not is_parallel():
            return cls()
        group = cast("distributed.ProcessGroup", distributed.new_group(backend="gloo", timeout=PATIENCE))
        return cls(distributed.get_rank(), distributed.get_world_size(), group)

    def close(self) -> None:
        """Give back what `joined` took."""
        if self.group is not None:
            distributed.destroy_process_group(self.group)

    def share(self, units: Sequence[Value]) -> Sequence[Value]:
        """Every `size`-th one, so that neighbours, which are often about one clip or of one length, are spread."""
        return units[self.rank :: self.size]

    def gather(self, make: Callable[[], Value]) -> list[Value]:
        """What each process makes, by rank. Where one fails, all fail when the others are done: they with a STAError."""
        if self.size == 1:
            return [make()]
        failure: Exception | None = None
        mine: tuple[bool, Value | str]
        try:
            mine = (True, make())
        except Exception as error:  # whatever it is, the others must hear of it
            failure, mine = error, (False, f"{type(error).__name__}: {error}")
        found = [mine] * self.size
        distributed.all_gather_object(found, mine, group=self.group)
        if failure is not None:
            raise failure
        for rank, (worked, value) in enumerate(found):
            if not worked:
                raise STAError(f"process {rank} failed: {value}")
        return [cast(Value, value) for _, value in found]
