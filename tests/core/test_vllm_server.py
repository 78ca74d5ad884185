"""VLLMServer with a stand-in for vLLM that has a child process, as vLLM has: nothing may be left of either."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from core import vllm_server
from core.vllm_server import ServerFailed, VLLMServer, free_port, group_members, is_healthy

REPO_ROOT = Path(__file__).resolve().parents[2]
FAKE = REPO_ROOT / "tests" / "scripts" / "fake_vllm.py"


def launcher(manner: str) -> tuple[str, ...]:
    return (sys.executable, str(FAKE), manner)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., VLLMServer]:
    def server(manner: str, **settings: object) -> VLLMServer:
        defaults: dict[str, object] = {
            "log": tmp_path / "logs" / "vllm.log",
            "progress": io.StringIO(),
            "timeout": 30.0,
        }
        return VLLMServer(launcher=launcher(manner), **(defaults | settings))  # type: ignore[arg-type]

    return server


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def test_it_is_up_inside_and_gone_after(make: Callable[..., VLLMServer]) -> None:
    out = io.StringIO()
    with make("up", progress=out) as server:
        assert is_healthy(server.url)
        assert server.pid is not None
        assert len(group_members(server.pid)) == 2
    assert group_members(server.pid) == []
    assert not is_healthy(server.url)
    assert f"vLLM server is up at {server.url}" in out.getvalue()
    assert re.search(r"^vLLM server was up after \d+ s$", server.log.read_text(), re.M)
    assert "\r" not in out.getvalue(), "no cursor movements where nobody watches"


def test_it_is_gone_after_an_exception(make: Callable[..., VLLMServer]) -> None:
    server = make("up")
    with pytest.raises(RuntimeError, match="mine"), server:
        raise RuntimeError("mine")
    assert server.pid is not None
    assert group_members(server.pid) == []


def test_what_ignores_sigterm_is_killed(make: Callable[..., VLLMServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "GRACE", 0.5)
    monkeypatch.setattr(vllm_server.end_group, "__defaults__", (0.5,))
    with make("stubborn") as server:
        assert server.pid is not None
    assert group_members(server.pid) == []


def test_a_server_that_dies_is_reported_with_its_words_and_a_way_out(make: Callable[..., VLLMServer]) -> None:
    with pytest.raises(ServerFailed) as error, make("dies"):
        pytest.fail("it is not up")
    assert "exit code 3" in str(error.value)
    assert "No module named vllm" in str(error.value)
    assert "make setup-local" in str(error.value)


def test_the_reason_is_told_where_it_came_long_before_the_end(make: Callable[..., VLLMServer]) -> None:
    with pytest.raises(ServerFailed) as error, make("fails"):
        pytest.fail("it is not up")
    lines = str(error.value).splitlines()
    assert lines[1:3] == ["  RuntimeError: Insufficient space in /dev/shm", "  ..."]
    assert lines[-2].endswith("See root cause above.")
    assert lines[-1] == "In a container: docker run --shm-size 4g, or --ipc host."


def test_an_older_log_is_kept_and_not_quoted(make: Callable[..., VLLMServer], tmp_path: Path) -> None:
    log = tmp_path / "old.log"
    log.write_text("an older server's last words\n")
    with pytest.raises(ServerFailed) as error, make("dies", log=log):
        pytest.fail("it is not up")
    assert "older" not in str(error.value)
    assert log.read_text().startswith("an older")


def test_a_server_that_never_answers_is_stopped(make: Callable[..., VLLMServer]) -> None:
    server = make("silent", timeout=1.0)
    with pytest.raises(ServerFailed, match="did not answer within 1 s"), server:
        pytest.fail("it is not up")
    assert server.pid is not None
    assert group_members(server.pid) == []


def test_progress_says_what_the_server_is_at_not_its_log_the_type_and_the_last_start(
    make: Callable[..., VLLMServer], tmp_path: Path
) -> None:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    log = tmp_path / "old.log"
    for text, usual in (
        ("", ""),
        ("vLLM server was up after 9 s\nvLLM server was up after 12 s\n", " (the last start took 12 s)"),
    ):
        log.write_text(text)
        with pytest.raises(ServerFailed), make("silent", timeout=8.0, progress=out, log=log):
            pytest.fail("it is not up")
        assert re.search(rf"starting the vLLM server: +\d+ s{re.escape(usual)}, loading the model\r", out.getvalue())
    assert out.getvalue().count("vLLM computes in float32, because a test says so\n") == 2
    assert "\x1b[1m" not in out.getvalue()
    assert "child" not in out.getvalue()
    assert "pid=" not in out.getvalue()


def test_the_handlers_of_signals_are_put_back(make: Callable[..., VLLMServer]) -> None:
    def mine(number: int, frame: FrameType | None) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)  # another server of these tests may have put its own there
    try:
        with make("up"):
            assert signal.getsignal(signal.SIGTERM) != mine
        assert signal.getsignal(signal.SIGTERM) == mine
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["up", "silent"])
def test_nothing_is_left_when_its_owner_is_killed(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    """`silent` is killed while the server starts, `up` when it runs; SIGKILL leaves the work to the guardian."""
    log = tmp_path / "vllm.log"
    owner = textwrap.dedent(f"""
        import signal, time
        from pathlib import Path
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        from core.vllm_server import VLLMServer
        server = VLLMServer(launcher={launcher(moment)!r}, log=Path({str(log)!r}))
        with server:
            time.sleep(600)
    """)
    process = subprocess.Popen([sys.executable, "-c", owner], cwd=REPO_ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process, process.stderr:
        wait_until(lambda: log.exists() and "child" in log.read_text())
        if moment == "up":
            while "is up at" not in process.stderr.readline():
                pass
        match = re.search(r"child (\d+)", log.read_text())
        assert match is not None
        group = os.getpgid(int(match[1]))
        assert len(group_members(group)) == 2
        process.send_signal(number)
        process.wait(20)
        assert process.returncode != 0
    wait_until(lambda: not group_members(group), seconds=30.0)


def test_free_ports_are_free() -> None:
    assert not is_healthy(f"http://127.0.0.1:{free_port()}", timeout=1.0)
