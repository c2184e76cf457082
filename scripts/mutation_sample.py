"""Mutation testing of a seeded sample of each module, in a copy of the repository; POSIX only.

    python scripts/mutation_sample.py                  all modules that scripts/mutation_tests.txt names, 25 mutants each
    python scripts/mutation_sample.py hooks backbones/frames --count 40
    python scripts/mutation_sample.py hooks:7,31       these mutants only, by the numbers that a survivor is printed with

A mutant is a module with one thing changed: an operator, a constant, a condition, a returned or assigned value, a
keyword, a decorator, a statement left out. The text of messages, docstrings and annotations are left alone. A mutant is
killed when a test of its module fails, or when the tests take more than three times as long as without it. The packages
that the tests import are imported once; each run of the tests is a fork of that process, and one without a mutant shows
that the tests still pass in it.
"""

import argparse
import ast
import contextlib
import copy
import difflib
import functools
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "__pycache__")
LEFT_ALONE = ("annotation", "returns", "decorator_list", "type_params")  # fields; decorators are left out as a whole
SWAPS: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


def changed(node: ast.AST, **fields: Any) -> Any:
    """A copy of a node with other fields."""
    twin = copy.copy(node)
    for name, value in fields.items():
        setattr(twin, name, value)
    return twin


def mutants(node: Any) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    match node:
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=str()):
            yield ast.Constant(f"XX{node.value}XX")
        case ast.Compare():
            yield changed(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
        case ast.BoolOp() | ast.BinOp() | ast.AugAssign() if type(node.op) in SWAPS:
            yield changed(node, op=SWAPS[type(node.op)]())
        case ast.UnaryOp():
            yield node.operand
        case ast.comprehension(ifs=[_, *_]):
            yield changed(node, ifs=[])
        case ast.Return(value=ast.expr()) if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield changed(node, value=ast.Constant(None))
        case ast.Assign():
            yield changed(node, value=ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Delete():
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.Try(finalbody=[_, *_]):
            yield changed(node, finalbody=[ast.Pass()])
        case ast.With(items=[ast.withitem(optional_vars=None)]):
            yield ast.If(ast.Constant(True), node.body, [])
        case ast.FunctionDef() | ast.ClassDef():
            for decorator in node.decorator_list:
                yield changed(node, decorator_list=[d for d in node.decorator_list if d is not decorator])
        case ast.Call():
            for keyword in node.keywords:
                yield changed(node, keywords=[k for k in node.keywords if k is not keyword])
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))


class Mutation(ast.NodeTransformer):
    """Counts the mutants of a tree, and puts the wanted one in."""

    def __init__(self, wanted: int = -1) -> None:
        self.wanted, self.count = wanted, 0

    def visit(self, node: ast.AST) -> Any:
        """The node, or its mutant."""
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        log_line = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger.")
        if docstring or for_types or log_line or isinstance(node, ast.JoinedStr):
            return node
        for mutant in mutants(node):
            self.count += 1
            if self.count - 1 == self.wanted:
                return ast.copy_location(mutant, node)
        for name, value in ast.iter_fields(node):
            if name not in LEFT_ALONE and not isinstance(node, ast.Raise):
                if isinstance(value, list):
                    setattr(node, name, [self.visit(v) if isinstance(v, ast.AST) else v for v in value])
                elif isinstance(value, ast.AST):
                    setattr(node, name, self.visit(value))
        return node


def mutated(source: str, wanted: int) -> str:
    """A module's source, without comments, with one of its mutants in it; -1 for none."""
    return ast.unparse(ast.fix_missing_locations(Mutation(wanted).visit(ast.parse(source)))) + "\n"


def run_tests(tests: tuple[str, ...], limit: float, imported: str = "") -> tuple[bool, float]:
    """(whether they pass within the limit, seconds), in a fork of this process; notes there what they imported."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if stream == 1 else os.O_APPEND)), stream)
        import pytest

        if not imported:  # bytecode is of modules without a mutant
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        code = pytest.main(["-xq", "-p", "no:cacheprovider", "-m", "not slow", *tests])
        if imported:
            Path(imported).write_text("\n".join(sys.modules))
        os._exit(int(code))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if done or seconds > limit:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # also what the tests have started
            if not done:
                os.waitpid(child, 0)
            return bool(done) and status == 0, seconds
        time.sleep(0.02)


@functools.cache
def import_for(tests: tuple[str, ...]) -> float:
    """Import what the tests import but for our own; seconds that they take."""
    passed, seconds = run_tests(tests, 600, "imported.txt")
    if not passed:
        raise SystemExit(f"{' '.join(tests)} fail without a mutant:\n{Path('log.txt').read_text()[-3000:]}")
    own = {"sta_adapter", "conftest", *(path.stem for path in Path("tests").iterdir())}
    for name in Path("imported.txt").read_text().split():
        if name not in sys.modules and name.partition(".")[0] not in own:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    passed, _ = run_tests(tests, 600)
    if not passed:  # then every mutant would count as killed
        raise SystemExit(f"{' '.join(tests)} fail after the imports:\n{Path('log.txt').read_text()[-3000:]}")
    return seconds


def work(module: str, numbers: list[int], count: int, tests: tuple[str, ...]) -> tuple[int, int]:
    """Try mutants of a module; prints the survivors. Gives (killed, tried)."""
    path = Path(module + ".py" if module.startswith("backbones/") else f"sta_adapter/{module}.py")
    source, stamp = path.read_text(), path.stat().st_mtime
    mutation = Mutation()
    mutation.visit(ast.parse(source))
    numbers = numbers or sorted(random.Random(module).sample(range(mutation.count), min(count, mutation.count)))
    limit, original, killed, slow = 3 * import_for(tests) + 10, mutated(source, -1), 0, 0
    for number in numbers:
        text = mutated(source, number)
        path.write_text(text)
        passed, seconds = run_tests(tests, limit)
        killed, slow = killed + (not passed), slow + (seconds > limit)
        if passed:
            lines = difflib.unified_diff(original.splitlines(), text.splitlines(), lineterm="", n=1)
            print(f"--- {module}:{number} survived ({seconds:.1f} s)", *list(lines)[2:], sep="\n", flush=True)
    path.write_text(source)
    os.utime(path, (stamp, stamp))
    print(
        f"=== {module}: {mutation.count} mutants, {len(numbers)} drawn, {killed} killed, {slow} of them by time",
        flush=True,
    )
    return killed, len(numbers)


def main() -> None:
    """Copy the repository, and try the mutants of the modules that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE[:NUMBER,...]")
    parser.add_argument("--count", type=int, default=25, help="mutants of each module")
    asked = parser.parse_args()
    known = dict(line.split(": ") for line in (ROOT / "scripts/mutation_tests.txt").read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT, symlinks=True)
        (tree / "sta_adapter/backbones").symlink_to("../backbones")
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as tests/conftest.py has it before any import
        results = []
        for name in asked.modules or known:
            module, _, numbers = name.partition(":")
            tests = tuple(t if t.startswith("-") else f"tests/test_{t}.py" for t in known[module].split())
            results.append(work(module, [int(n) for n in numbers.split(",") if n], asked.count, tests))
        print(f"{sum(killed for killed, _ in results)} of {sum(tried for _, tried in results)} mutants killed")


if __name__ == "__main__":
    main()
