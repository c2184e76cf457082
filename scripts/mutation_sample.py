"""Mutation testing of a seeded sample of each module, with mutmut 3; run it in a copy of the repository.

    python scripts/mutation_sample.py layout.py,config.py tests/test_layout.py,tests/test_config.py 45 [PYTEST ARGUMENTS]

The first argument lists modules of sta_adapter, the second the tests to run, the third how many mutants are drawn from
each module. What was drawn stands in drawn.txt; `mutmut results` and `mutmut show NAME` tell of the survivors.
"""

import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SEED = 7
SETTINGS = """[mutmut]
source_paths=sta_adapter
only_mutate={modules}
pytest_add_cli_args={arguments}
pytest_add_cli_args_test_selection={tests}
timeout_multiplier=10
timeout_constant=10
use_git_change_detection=false
track_dependencies=false
"""


def lines(values: Iterable[str]) -> str:
    """Values of a setting, one a line."""
    return "".join(f"\n    {value}" for value in values)


def sampled(collect: Any, count: int) -> Any:
    """Mutmut's list of mutants, cut to `count` of each module."""

    def sample(*, mutant_names: Any) -> Any:
        mutants, data = collect(mutant_names=mutant_names)
        modules: dict[str, list[Any]] = {}
        for entry in sorted(mutants, key=lambda entry: entry[1]):
            modules.setdefault(entry[1].rpartition(".")[0], []).append(entry)
        chosen = {m: random.Random(SEED).sample(found, min(count, len(found))) for m, found in sorted(modules.items())}
        drawn = (f"{m} {len(modules[m])} {' '.join(entry[1] for entry in picked)}\n" for m, picked in chosen.items())
        Path("drawn.txt").write_text("".join(drawn))
        return [entry for picked in chosen.values() for entry in picked], data

    return sample


def main(modules: str, tests: str, count: str, *arguments: str) -> None:
    """Write mutmut's settings, and run it on the sample."""
    if not Path("sta_adapter/backbones").exists():  # mutmut looks for the package where it lies
        shutil.copytree("backbones", "sta_adapter/backbones")
    settings = SETTINGS.format(
        modules=lines(f"sta_adapter/{name}" for name in modules.split(",")),
        arguments=lines(["-q", "-p", "no:cacheprovider", *arguments]),
        tests=lines(tests.split(",")),
    )
    Path("setup.cfg").write_text(settings)
    from mutmut import __main__ as mutmut  # it reads setup.cfg

    mutmut.collect_source_file_mutation_data = sampled(mutmut.collect_source_file_mutation_data, int(count))
    mutmut.run.callback((), max_children=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
