"""A short version of the campaigns (`make chaos` plays the long ones): one plan of many kinds, a sample of failing
writes, and what befalls a run on its own machine."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.faults.campaign import Report, draw_plan, kill_campaign, play
from tests.faults.proxy import FAULTS, SLOW_KINDS, Strike
from tests.faults.store import MODES, StoreTrial, forks
from tests.faults.world import World, labels_of

FLAGS = ("--seed", "0")
KINDS = sorted(FAULTS)
PLANS = [number for number, kind in enumerate(KINDS) if kind not in SLOW_KINDS and number % 3 == 1]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        yield world


@pytest.fixture(scope="module")
def trial(world: World) -> StoreTrial:
    forks.set_forkserver_preload(["tests.faults.store"])
    world.be()
    return StoreTrial(world)


@pytest.fixture
def runs(world: World, request: pytest.FixtureRequest) -> Path:
    world.be()
    world.proxy.renew([])
    return world.home / request.node.name


@pytest.mark.parametrize("number", PLANS, ids=[KINDS[number] for number in PLANS])
def test_a_faulted_run_ends_with_the_labels_of_an_undisturbed_one(world: World, number: int) -> None:
    assert play(world, draw_plan(7, number), Report()) == []


@pytest.mark.parametrize("kind", ["host_falls_silent"])
def test_a_silent_host_is_noticed(world: World, runs: Path, kind: str) -> None:
    whole = world.undisturbed(*FLAGS)
    world.proxy.renew([Strike(kind, 3)])
    ended = world.run(runs, *FLAGS)
    assert (ended.code, world.proxy.struck) == (0, [kind]), ended.err
    assert "no sign of life" in ended.err
    assert labels_of(runs) == whole


def test_a_server_that_stays_down_stops_the_run_with_the_command_that_resumes_it(world: World, runs: Path) -> None:
    whole = world.undisturbed(*FLAGS)
    world.proxy.renew([Strike("refused", 4, seconds=20)])
    ended = world.run(runs, *FLAGS, env={"ICM_MAX_ATTEMPTS": "4"})
    assert ended.code == 1
    assert "gave up after 4 attempts" in ended.err
    assert "go on with:\n" in ended.err
    assert f"--runs_dir {runs}" in ended.err.replace("'", "")
    assert ended.seconds < 15
    world.at_server(world.proxy.come_back())
    assert world.run(runs, *FLAGS).code == 0
    assert labels_of(runs) == whole
    assert world.paid_twice() == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.35, 0.97])
def test_a_write_that_fails_loses_nothing(trial: StoreTrial, mode: str, share: float) -> None:
    trial.case(int(share * trial.report.operations), mode)
    assert trial.report.failures == []


@pytest.mark.parametrize("kind", ["small files", "few open files"])
def test_a_run_under_tight_limits_stops_with_a_reason_and_is_resumed(world: World, runs: Path, kind: str) -> None:
    """A real process that the kernel limits: no file over 24 kB, or a handful of open files."""

    def limit() -> None:
        if kind == "small files":
            resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))
        else:
            resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))

    whole = world.undisturbed(*FLAGS)
    process = world.process(runs, *FLAGS, before=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (1, 2), err
    if kind == "small files":
        assert "Traceback" not in err
        assert "error: " in err
    assert world.run(runs, *FLAGS).code == 0
    assert labels_of(runs) == whole


def test_ten_thousand_open_files_do_not_matter(world: World, runs: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = min(10_000, most - 500)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    whole = world.undisturbed(*FLAGS)
    with contextlib.ExitStack() as stack:
        for _ in range(wanted):
            stack.enter_context(open(os.devnull))
        ended = world.run(runs, *FLAGS)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert ended.code == 0, ended.err
    assert labels_of(runs) == whole


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(world: World) -> None:
    ended = world.run(Path("/proc/icm"), *FLAGS)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert ended.err.count("\n") == 1
    assert "/proc/icm" in ended.err


def test_a_cache_that_is_locked_for_a_while_is_waited_for(world: World, runs: Path) -> None:
    whole = world.undisturbed(*FLAGS)
    assert world.run(runs, *FLAGS, "--K", "0").code == 0  # the file exists
    other = sqlite3.connect(runs / "responses.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")

    def let_go() -> None:
        other.execute("ROLLBACK")
        other.close()

    threading.Timer(1.5, let_go).start()
    (runs / "a").rename(runs / "other settings")
    ended = world.run(runs, *FLAGS)
    assert ended.code == 0, ended.err
    assert ended.seconds > 1
    assert labels_of(runs) == whole


def test_a_cache_that_was_damaged_is_named_and_the_run_goes_on_without_it(world: World, runs: Path) -> None:
    whole = world.undisturbed(*FLAGS)
    world.proxy.renew([Strike("http_400", 5, times=9)])
    assert world.run(runs, *FLAGS).code == 1
    world.proxy.renew([])
    cache = runs / "responses.sqlite"
    for part in (cache, cache.with_name(cache.name + "-wal")):
        if part.exists():
            part.write_bytes(random.Random(1).randbytes(part.stat().st_size))
    ended = world.run(runs, *FLAGS)
    assert ended.code == 2
    assert "Move it away" in ended.err
    cache.unlink()
    for part in runs.glob("responses.sqlite-*"):
        part.unlink()
    assert world.run(runs, *FLAGS).code == 0
    assert labels_of(runs) == whole


def test_clocks_that_jump_change_nothing(world: World, runs: Path) -> None:
    whole = world.undisturbed(*FLAGS)
    world.proxy.renew([Strike("retry_after_date", 2), Strike("reset_in_body", 4)])
    rng, real = random.Random(5), time.time

    def wall_clock() -> float:
        return real() + rng.uniform(-1e8, 1e8)

    with mock.patch("time.time", wall_clock):
        ended = world.run(runs, *FLAGS)
    assert ended.code == 0, ended.err
    assert labels_of(runs) == whole


def test_memory_that_runs_out_stops_the_run_in_one_line(world: World, runs: Path) -> None:
    whole = world.undisturbed(*FLAGS)
    with mock.patch("core.llm_api.engines.vllm.token_pieces", side_effect=MemoryError):
        ended = world.run(runs, *FLAGS)
    assert ended.code == 1
    assert "out of memory" in ended.err
    assert "go on with:" in ended.err
    assert world.run(runs, *FLAGS).code == 0
    assert labels_of(runs) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_a_random_moment_stops_with_the_command_that_goes_on(
    world: World, runs: Path, number: signal.Signals
) -> None:
    whole = world.undisturbed(*FLAGS)
    world.server.latency = 0.05

    def as_in_a_shell() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = world.process(runs, *FLAGS, before=as_in_a_shell)
    while not (runs / "a" / "log.jsonl").exists():
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.2))
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    world.server.latency = 0.0
    assert process.returncode == 130, err
    assert "go on with:" in err
    assert world.run(runs, *FLAGS).code == 0
    assert labels_of(runs) == whole


def test_sigkill_at_random_moments(world: World) -> None:
    report = kill_campaign(world, 3, seed=5)
    assert report.failures == []
    assert report.stopped_and_resumed == 3


def test_the_campaign_notices_what_it_looks_for(world: World, runs: Path) -> None:
    """A client that believes everything, or forgets everything, does not pass."""

    def verdict(break_it: Callable[[contextlib.ExitStack], None], strike: Strike) -> str:
        plan = draw_plan(7, 0)
        plan.strikes, plan.trees, plan.size, plan.swap = [strike], False, None, "weights"
        with contextlib.ExitStack() as stack:
            break_it(stack)
            return "; ".join(play(world, plan, Report()))

    def believe(stack: contextlib.ExitStack) -> None:
        stack.enter_context(mock.patch("core.llm_api.http.completions._check_count"))

    def forget(stack: contextlib.ExitStack) -> None:
        stack.enter_context(mock.patch("core.llm_api.response_cache.ResponseCache.get_many", return_value={}))

    assert "not given for their prompt" in verdict(believe, Strike("answer_to_another_request", 2))
    assert "paid for twice" in verdict(forget, Strike("http_400", 6))
