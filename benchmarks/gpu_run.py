"""Everything that has to be seen on a GPU, in one command of at most 20 minutes: tests, kernels, speed, memory, generation.

    make gpu                                          # python benchmarks/gpu_run.py
    python benchmarks/gpu_run.py --rehearse           # the same parts in small sizes on the CPU

It needs a checkout with torch, transformers, peft, safetensors and einops; xformers, pytest and matplotlib are used
where they are. Each part is a process with a time limit and leaves `parts/NAME.json` behind: given again, the command
goes on with what is missing or failed, and a part for which no time was left is one of these. `page.md` has every
table. Exit code 1: a part failed or is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESERVE = 20.0  # seconds for the page


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        line: the script and its options, on a GPU.
        small: the options of a rehearsal.
        limit: seconds that it may take.
        needs: a package without which it is left out.
    """

    line: tuple[str, ...]
    small: tuple[str, ...] = ()
    limit: float = 120.0
    needs: str | None = None


DEEP = ("--depth", "1", "--tokens", "256")
PARTS = {  # the first ones decide what the others are worth
    "tests": Part(
        ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/test_attention.py"),
        limit=240,
        needs="pytest",
    ),
    "kernel-checks": Part(("kernel_checks.py",), ("--positions", "2")),
    "kernels-bf16": Part(("kernels.py", "--dtype", "bf16"), ("--tokens", "128", "--frames", "4,64")),
    "forward": Part(("forward.py", "--part", "forward"), DEEP),
    "step": Part(("training_step.py", "--kinds", "STA"), DEEP, 150),
    "short": Part(("forward.py", "--part", "short"), DEEP),
    "host-time": Part(("host_time.py",), ("--depth", "2", "--calls", "1"), 150),
    "generation": Part(("generation.py",), ("--depth", "1", "--tokens", "4"), 180),
    "lengths": Part(("forward.py", "--part", "lengths"), ("--depth", "1", "--tokens", "1024"), 150),
    "packed": Part(("forward.py", "--part", "packed"), DEEP),
    "step-lora": Part(("training_step.py", "--kinds", "LoRA + STA"), DEEP, 150),
    "step-checkpointed": Part(("training_step.py", "--kinds", "checkpointed"), DEEP, 150),
    "kernels-fp32": Part(("kernels.py", "--dtype", "fp32"), ("--tokens", "128", "--frames", "4,64")),
    "streaming": Part(("streaming.py",), ("--depth", "1", "--patches", "16", "--window", "4")),
    "compiled": Part(("compiled.py",), ("--depth", "1", "--tokens", "64"), 240),
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, two rounds")
    parser.add_argument(
        "--out", type=Path, help="folder of the results [default: benchmarks/results/gpu, or .../rehearsal]"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="that all parts may take together [default: 20]")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of each measurement [default: 9]")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}")
    return parser.parse_args(words)


def command_of(part: Part, options: argparse.Namespace, out: Path) -> list[str]:
    """What is run for a part."""
    if part.needs == "pytest":
        return [sys.executable, *part.line]
    script, *rest = part.line
    line = [sys.executable, str(HERE / script), *rest, "--out", str(out)]
    if options.rehearse:
        return [*line, "--device", "cpu", "--threads", "1", "--repeats", "2", *part.small]
    return [*line, "--device", "cuda", "--repeats", str(options.repeats)]


def run_part(name: str, part: Part, options: argparse.Namespace, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part, and tell how it ended."""
    if part.needs is not None and importlib.util.find_spec(part.needs) is None:
        return {"part": name, "status": "left out", "why": f"{part.needs} is not installed", "seconds": 0.0}
    begun = time.perf_counter()
    line = command_of(part, options, out)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
    }
    log = out / "parts" / f"{name}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                line, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
            status, why = ("done", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            status, why = "failed", f"not done after {seconds:.0f} s"
    if part.needs == "pytest" and why == "exit code 5":
        status, why = "failed", "no test was found"
    tail = log.read_text(errors="replace").splitlines()[-12:]
    taken = round(time.perf_counter() - begun, 1)
    return {"part": name, "status": status, "why": why, "seconds": taken, "command": line[1:], "tail": tail}


def is_done(path: Path) -> bool:
    """Whether a part needn't be run again."""
    try:
        return json.loads(path.read_text())["status"] == "done"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(path: Path, text: str) -> None:
    """All at once, as the command may be stopped at any moment."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def page(out: Path, rehearsal: bool) -> str:
    """What every part has found, in Markdown."""
    from make_page import tables

    found = {path.stem: json.loads(path.read_text()) for path in sorted((out / "parts").glob("*.json"))}
    lines = ["# Run on the CPU, in small sizes: its figures mean nothing" if rehearsal else "# Run on a GPU", ""]
    lines += ["| part | outcome | seconds |", "| --- | --- | --- |"]
    for name in PARTS:
        result = found.get(name, {"status": "not run", "why": "", "seconds": 0})
        outcome = f"{result['status']}{': ' if result['why'] else ''}{result['why']}"
        lines.append(f"| {name} | {outcome} | {result['seconds']} |")
    for path in sorted(out.glob("kernel-checks-*.json")):
        checks = json.loads(path.read_text())["checks"]
        ran = [row for row in checks if "difference" in row]
        worst = max(ran, key=lambda row: row["difference"] / row["most"], default=None)
        lines += ["", f"Kernels: {len(ran)} of {len(checks)} calls run here."]
        if worst is not None:
            lines += [
                f"The largest difference, to what is allowed: {worst['difference']:.2e} of {worst['most']:g} ({worst['case']})."
            ]
        reasons = sorted({row["refused"] for row in checks if "refused" in row})
        lines += ["", *(f"- {reason}" for reason in reasons)]
    for name, result in found.items():
        if result["status"] == "failed":
            lines += ["", f"## {name}: {result['why']}", "", "```", *result["tail"], "```"]
    return "\n".join([*lines, "", tables(out)])


def main(words: list[str] | None = None) -> int:
    """Run what is missing, and write the page; gives the exit code."""
    options = arguments(words)
    out = (options.out or HERE / "results" / ("rehearsal" if options.rehearse else "gpu")).resolve()
    (out / "parts").mkdir(parents=True, exist_ok=True)
    names = options.only.split(",") if options.only else list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise SystemExit(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    end = time.monotonic() + 60 * options.minutes - RESERVE
    bad = []
    for name in names:
        path = out / "parts" / f"{name}.json"
        if is_done(path):
            print(f"{name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < 10:
            print(f"{name}: no time left; give the command again", flush=True)
            bad.append(name)
            continue
        result = run_part(name, PARTS[name], options, out, min(left, PARTS[name].limit))
        write(path, json.dumps(result, indent=1) + "\n")
        print(f"{name}: {result['status']} {result['why']} ({result['seconds']} s)", flush=True)
        if result["status"] == "failed":
            bad.append(name)
    sys.path.insert(0, str(HERE))
    write(out / "page.md", page(out, options.rehearse))
    print(f"{out / 'page.md'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
