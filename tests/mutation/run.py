"""Mutation testing: how many small faults do the tests of a module notice?

    python -m tests.mutation.run                              # make mutation: all modules
    python -m tests.mutation.run --module objective --jobs 1
    python -m tests.mutation.run --survivors                  # only those that survived the last time, after new tests

Each mutant (see mutants.py) lives in a process of its own, forked from one that has imported everything slow, and meets
the module's own tests until one fails. One that needs more than CPU_ALLOWANCE times the CPU time of the unharmed module
counts as noticed. Results are kept in runs/mutation/, so that a run that was stopped goes on; they are made anew when
the module, its tests or the mutants change. The exit status is 1 where a module's tests notice less than --floor.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

# Imported before forking, so that no mutant has to: everything slow that does not import what is mutated.
import aiohttp  # noqa: F401
import numpy as np  # noqa: F401
import orjson  # noqa: F401
import pydantic  # noqa: F401
import pytest
from hypothesis import Phase, settings

from tests.mutation import mutants as mutants_module
from tests.mutation.mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "runs" / "mutation"
CPU_ALLOWANCE = 4.0
CPU_AT_LEAST = 10.0  # seconds
MEMORY = 4 << 30  # bytes of address space: a mutant that never stops appending ends early
NOTICED = ("failed", "too slow", "died")


@dataclass(frozen=True)
class Target:
    """A module, the tests that are its own (pytest's arguments), and the classes or functions to mutate; all if ()."""

    path: str
    tests: tuple[str, ...]
    only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")

    @property
    def source(self) -> Path:
        return ROOT / self.path

    def mutants(self) -> list[Mutant]:
        return self._mutants_of(ast.parse(self.source.read_text()))

    def mutated(self, number: int) -> tuple[ast.Module, Mutant]:
        """The module with one of its mutants, and which that is."""
        tree = ast.parse(self.source.read_text())
        mutant = self._mutants_of(tree)[number]
        mutant.apply()
        return tree, mutant

    def _mutants_of(self, tree: ast.Module) -> list[Mutant]:
        return [m for m in mutants(tree) if not self.only or m.where.startswith(self.only)]


TARGETS = (
    Target("src/icm/objective.py", ("tests/icm/test_objective.py", "tests/icm/test_many_labels.py")),
    Target("src/icm/prefix_tree.py", ("tests/icm/test_prefix_tree_by_hand.py", "tests/icm/test_prefix_tree.py")),
    Target(
        "src/icm/annealing.py",
        ("tests/icm/test_annealing_steps.py", "tests/icm/test_annealing.py", "tests/icm/test_many_labels.py"),
    ),
    Target("src/icm/problem.py", ("tests/icm/test_annealing_steps.py", "tests/icm/test_annealing.py")),
    # Of test_response_cache.py only what runs in one process: others would import the unharmed module.
    Target("core/llm_api/response_cache.py", ("tests/core/test_response_cache.py", "-k", "not processes")),
    Target("core/llm_api/labels.py", ("tests/core/test_labels.py",)),
    Target(
        "core/llm_api/types.py",
        ("tests/core/test_types.py",),
        only=("Segment", "Prompt", "NextTokens", "EngineIdentity"),
    ),
)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads one module from a tree instead of its file."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self._tree = tree

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._tree, self.path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, target: Target, tree: ast.Module) -> None:
        self._name, self._path, self._tree = target.module, str(target.source), tree

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=_Loader(name, self._path, self._tree))


def _live(target: Target, number: int | None, cpu_seconds: float) -> int:
    """In a process of its own: pytest's exit status with mutant `number`, or with none."""
    os.setsid()
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1, int(cpu_seconds) + 2))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tree = ast.parse(target.source.read_text()) if number is None else target.mutated(number)[0]
    sys.meta_path.insert(0, _Finder(target, tree))
    sys.dont_write_bytecode = True
    # A fifth of the examples that `make test` tries, and what fails is not made simple for a reader.
    settings.register_profile(
        "mutation",
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=20,
        phases=[Phase.explicit, Phase.generate],
    )
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutation"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, *target.tests]))


@dataclass(frozen=True)
class _Life:
    number: int | None
    begun: float
    wall_seconds: float


def _outcome(status: int) -> str:
    if os.WIFSIGNALED(status):
        return "too slow" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "died"
    code = os.WEXITSTATUS(status)
    return {0: "survived", 1: "failed", 2: "failed", 3: "died", 4: "failed"}.get(code, f"pytest exit {code}")


def live_all(
    target: Target, numbers: Sequence[int | None], jobs: int, cpu_seconds: float
) -> Iterator[tuple[int | None, str, float]]:
    """(number, outcome, CPU seconds) of each mutant as it ends, at most `jobs` at once."""
    waiting = list(reversed(numbers))
    alive: dict[int, _Life] = {}
    try:
        while waiting or alive:
            while waiting and len(alive) < jobs:
                number = waiting.pop()
                sys.stdout.flush()
                child = os.fork()
                if child == 0:
                    code = 3
                    with contextlib.suppress(BaseException):
                        code = _live(target, number, cpu_seconds)
                    os._exit(code)
                alive[child] = _Life(number, time.monotonic(), 60 + 10 * cpu_seconds)
            child, status, usage = os.wait4(-1, os.WNOHANG)
            if child == 0:
                for slow, life in alive.items():  # one that waits needs no CPU time
                    if time.monotonic() - life.begun > life.wall_seconds:
                        os.kill(slow, signal.SIGKILL)
                time.sleep(0.01)
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what its tests have left running
            yield alive.pop(child).number, _outcome(status), usage.ru_utime + usage.ru_stime
    finally:
        for child in alive:
            os.kill(child, signal.SIGKILL)


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


@dataclass
class Results:
    """A JSON-lines file: first what was mutated and by which tests, then an outcome a line."""

    path: Path
    code: str
    tests: str
    outcomes: dict[int, str]

    @classmethod
    def of(cls, target: Target, *, survivors: bool) -> Results:
        """Earlier results that still hold. survivors: what earlier tests noticed needs no second look."""
        code = _digest(target.source, Path(mutants_module.__file__))
        tests = _digest(*(ROOT / test for test in target.tests if test.endswith(".py")))
        results = cls(RESULTS / f"{target.name}.jsonl", code, tests, {})
        if results.path.exists():
            header, *lines = [json.loads(line) for line in results.path.read_text().splitlines()]
            if header["code"] == code and (survivors or header["tests"] == tests):
                results.outcomes = {
                    line["mutant"]: line["outcome"]
                    for line in lines
                    if line["outcome"] in NOTICED or header["tests"] == tests
                }
        results.path.parent.mkdir(parents=True, exist_ok=True)
        known = results.outcomes
        with results.path.open("w") as file:
            file.write(json.dumps({"code": code, "tests": tests}) + "\n")
        for number, outcome in known.items():
            results.add(number, outcome)
        return results

    def add(self, number: int, outcome: str) -> None:
        """Keep one more outcome."""
        self.outcomes[number] = outcome
        with self.path.open("a") as file:
            file.write(json.dumps({"mutant": number, "outcome": outcome}) + "\n")


def examine(target: Target, *, jobs: int, sample: int | None, survivors: bool) -> tuple[int, int]:
    """(noticed, looked at). Prints the mutants that survive."""
    found = target.mutants()
    wanted = list(range(len(found)))
    if sample is not None and sample < len(wanted):
        wanted = sorted(random.Random(1).sample(wanted, sample))
    results = Results.of(target, survivors=survivors)
    numbers = [number for number in wanted if number not in results.outcomes]
    if numbers:
        [(_, unharmed, cpu)] = live_all(target, [None], 1, 300)
        if unharmed != "survived":
            raise SystemExit(f"{target.name}: its tests fail as it is ({unharmed})")
        allowed = max(CPU_AT_LEAST, CPU_ALLOWANCE * cpu)
        print(
            f"{target.name}: {len(numbers)} of {len(found)} mutants to meet {cpu:.1f} CPU seconds of tests", flush=True
        )
        for done, (number, outcome, _) in enumerate(live_all(target, numbers, jobs, allowed), 1):
            assert number is not None
            if outcome not in (*NOTICED, "survived"):
                raise SystemExit(f"{target.name}: {found[number]}: {outcome}")
            results.add(number, outcome)
            if done % 50 == 0:
                print(f"{target.name}: {done} of {len(numbers)}", flush=True)
    lines = target.source.read_text().splitlines()
    for number in wanted:
        if results.outcomes[number] == "survived":
            print(f"{target.path}:{found[number]}    # {lines[found[number].line - 1].strip()}")
    noticed = sum(results.outcomes[number] in NOTICED for number in wanted)
    print(f"{target.name}: {noticed} of {len(wanted)} noticed, {100 * noticed / len(wanted):.1f}%", flush=True)
    return noticed, len(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--module", choices=[t.name for t in TARGETS], action="append", help="this one (repeatable)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once")
    parser.add_argument("--sample", type=int, help="look at this many of each module's mutants, always the same ones")
    parser.add_argument("--survivors", action="store_true", help="only those that survived before, after new tests")
    parser.add_argument("--floor", type=float, default=0.9, help="share that must be noticed (default: %(default)s)")
    args = parser.parse_args()
    os.chdir(ROOT)
    chosen = [t for t in TARGETS if args.module is None or t.name in args.module]
    shares = {}
    for target in chosen:
        noticed, looked_at = examine(target, jobs=args.jobs, sample=args.sample, survivors=args.survivors)
        shares[target.name] = noticed / looked_at
    low = [name for name, share in shares.items() if share < args.floor]
    if low:
        print(f"below {args.floor:.0%}: {', '.join(low)}")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
