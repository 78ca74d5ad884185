"""What is mutated and what is left alone."""

from __future__ import annotations

import ast
from textwrap import dedent

import pytest

from tests.mutation.mutants import mutants
from tests.mutation.run import TARGETS, Target


def changes(source: str) -> list[str]:
    return [f"{m.was} -> {m.now}" for m in mutants(ast.parse(dedent(source)))]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", ["a < b -> a <= b", "a < b -> a >= b"]),
        ("x = a + b", ["a + b -> a - b"]),
        ("x = a and b", ["a and b -> a or b"]),
        ("x = not a", ["not a -> a"]),
        ("x = -a", ["-a -> a"]),
        ("x = True", ["True -> False"]),
        ("x = 3", ["3 -> 4"]),
        ("x = 'a'", ["'a' -> 'a?'"]),
        ("x = b'a'", ["b'a' -> b'a?'"]),
        ("x = max(a)", ["max(a) -> min(a)"]),
        ("x = f(a, k=b, m=c)", ["f(a, k=b, m=c) -> f(a, m=c)", "f(a, k=b, m=c) -> f(a, k=b)"]),
        ("x = a if b else c", ["a if b else c -> a if not b else c"]),
        ("f(a[b:])", ["f(a[b:]) -> pass", "b: -> :"]),
        ("x = [a for a in b if a]", ["[a for a in b if a] -> [a for a in b]"]),
        ("x += a", ["x += a -> x -= a", "x += a -> pass"]),
        ("x.y = a", ["x.y = a -> pass"]),
        ("f(a)", ["f(a) -> pass"]),
        ("def f(): return a", ["return a -> return None"]),
        ("def f(): raise E('some text')", ["raise E('some text') -> pass"]),
        ("while a: break", ["while a: break -> while not a: break", "break -> continue"]),
        ("if a: f()", ["if a: f() -> if not a: f()", "f() -> pass"]),
    ],
)
def test_what_is_put_in_its_place(source: str, expected: list[str]) -> None:
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring."""',
        "import a",
        "x: int",
        "def f(a: 'X' = b) -> 'Y': ...",
        "@decorated(frozen=True)\nclass A: ...",
        "class A(Protocol):\n    def f(self): return 1",
        "Name = Literal['a', 'b']",
        "log.warning('%s', 3)",
        "def f(): return None",
    ],
)
def test_what_no_behaviour_hangs_on_is_left_alone(source: str) -> None:
    assert changes(source) == []


def test_a_mutant_changes_its_place_and_no_other() -> None:
    source = "def f(a):\n    return a + 1\nx = 1"
    for number, changed in enumerate(["return None", "return a - 1", "return a + 2", "x = 2"]):
        tree = ast.parse(source)
        mutants(tree)[number].apply()
        before, after = source.split("\n"), [line for line in ast.unparse(tree).split("\n") if line]
        assert [new.strip() for old, new in zip(before, after, strict=True) if old != new] == [changed]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_mutant_of_every_module_compiles(target: Target) -> None:
    found = target.mutants()
    assert len(found) >= 60
    assert len({str(mutant) for mutant in found}) > 0.9 * len(found)
    compile(ast.parse((target.source).read_text()), target.path, "exec")
    for number in range(0, len(found), 5):
        tree, mutant = target.mutated(number)
        compile(tree, target.path, "exec")
        assert str(mutant) == str(found[number])
