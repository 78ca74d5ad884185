"""Steps run in order, in parallel where they can, and are kept by what they were made from."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from src.pipeline.pipeline import Pipeline

CALLS: list[str] = []


@dataclass(frozen=True)
class Total:
    value: int
    names: list[str]


def record(name: str) -> None:
    CALLS.append(name)


def total(numbers: list[int]) -> Total:
    record("total")
    return Total(sum(numbers), ["sum"])


def doubled(numbers: list[int]) -> list[int]:
    record("doubled")
    return [2 * n for n in numbers]


@pytest.fixture(autouse=True)
def _forget_calls() -> None:
    CALLS.clear()


async def test_results_flow_along_dependencies_with_their_types() -> None:
    pipeline = Pipeline("sums")
    numbers = pipeline.load("numbers", lambda: [1, 2, 3])
    twice = pipeline.transform("twice", doubled, numbers)
    result = pipeline.evaluate("total", total, twice)
    results = await pipeline.run()
    assert results[result] == Total(12, ["sum"])
    assert results[twice] == [2, 4, 6]


async def test_independent_steps_run_together() -> None:
    reached = asyncio.Barrier(2)

    async def meet() -> int:
        async with asyncio.timeout(5):
            await reached.wait()  # returns only if the other step runs at the same time
        return 1

    pipeline = Pipeline("together")
    pipeline.load("left", meet)
    pipeline.load("right", meet)
    await pipeline.run()


async def test_the_first_failure_is_raised_as_it_is_and_cancels_the_rest() -> None:
    cancelled = asyncio.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def fails() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("no luck") from KeyError("why")

    pipeline = Pipeline("failing")
    pipeline.load("slow", slow)
    pipeline.load("fails", fails)
    with pytest.raises(RuntimeError, match="no luck") as caught:
        await pipeline.run()
    assert isinstance(caught.value.__cause__, KeyError)
    assert cancelled.is_set()


def build(folder: Path, numbers: list[int]) -> tuple[Pipeline, object]:
    pipeline = Pipeline("kept", folder=folder)
    loaded = pipeline.load("numbers", lambda: numbers)
    return pipeline, pipeline.evaluate("total", total, pipeline.transform("twice", doubled, loaded))


async def test_kept_results_are_read_back_typed_until_their_inputs_change(tmp_path: Path) -> None:
    for numbers, expected in (([1, 2], ["doubled", "total"]), ([1, 2], []), ([2, 1], ["doubled", "total"])):
        CALLS.clear()
        pipeline, step = build(tmp_path, numbers)
        assert (await pipeline.run())[step] == Total(6, ["sum"])  # type: ignore[index]
        assert expected == CALLS


async def test_a_damaged_kept_result_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, _ = build(tmp_path, [1])
    await pipeline.run()
    (tmp_path / "total.json").write_text("{")
    CALLS.clear()
    pipeline, step = build(tmp_path, [1])
    assert (await pipeline.run())[step] == Total(2, ["sum"])  # type: ignore[index]
    assert CALLS == ["total"]
    assert "damaged" in caplog.text


async def test_what_a_function_captured_counts_as_input(tmp_path: Path) -> None:
    for factor, expected in ((2, 2), (3, 3)):

        def captured(n: int, scale: int = 1) -> int:
            return scale * factor * n  # noqa: B023 - what the closure captured is what is tested

        pipeline = Pipeline("captured", folder=tmp_path)
        one = pipeline.load("one", lambda: 1)
        step = pipeline.transform("captured", captured, one)
        assert (await pipeline.run())[step] == expected


FACTOR = 2


@dataclass(frozen=True)
class Scale:
    by: int

    def scaled(self, n: int) -> int:
        return n * self.by


async def test_objects_defaults_and_globals_count_as_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_global(n: int) -> int:
        return n * FACTOR

    async def result_of(function: Callable[[int], int]) -> int:
        pipeline = Pipeline("inputs", folder=tmp_path)
        step = pipeline.transform("x", function, pipeline.load("n", lambda: 3))
        return (await pipeline.run())[step]

    assert [await result_of(Scale(by).scaled) for by in (2, 5)] == [6, 15]
    first = await result_of(with_global)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 7)
    assert (first, await result_of(with_global)) == (6, 21)
    for default in (2, 5):

        def with_default(n: int, k: int = default) -> int:
            return n * k

        assert await result_of(with_default) == 3 * default


def test_steps_of_other_pipelines_and_twice_the_same_name_are_refused() -> None:
    first, second = Pipeline("a"), Pipeline("b")
    step = first.load("x", lambda: 1)
    with pytest.raises(ValueError, match="another pipeline"):
        second.transform("y", doubled, step)
    with pytest.raises(ValueError, match="already has"):
        first.load("x", lambda: 1)
