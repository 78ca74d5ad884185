"""A vLLM server on this machine for as long as a `with` block lasts.

    with VLLMServer(model="gemma-3-270m", log=Path("runs/vllm.log")) as server:
        ...  # server.url, server.model

The server gets its own process group. The group is stopped (SIGTERM, then SIGKILL after 10 s) when the block ends:
normally, by an exception, by Ctrl-C, by SIGTERM or SIGHUP. Where this process is killed (SIGKILL, out of
memory), a guardian process sees its pipe close and stops the group instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self, TextIO

from core.settings import REPO_ROOT

LAUNCHER: Final = REPO_ROOT / "scripts" / "launch_vllm_server.sh"
GRACE: Final = 10.0
"""Seconds between SIGTERM and SIGKILL."""
POLL: Final = 0.25
BEGINNING: Final = 4096
"""Bytes at the start of a log in which the launcher says what it chose."""

# Reads one line from standard input; at the end of file without one, its parent is gone and it stops the group.
# POSIX sh takes a process group only in the form `kill -s NAME -- -GROUP`.
_GUARDIAN: Final = """
read -r done && exit 0
kill -s TERM "$1" 2>/dev/null
for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 1; kill -s 0 -- "-$1" 2>/dev/null || exit 0; done
kill -s KILL -- "-$1" 2>/dev/null
"""
_STAGES: Final = (
    ("Started server process", "opening its port"),
    ("init engine (profile", "making its interface ready"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("GPU KV cache size", "making room for its prefix cache"),
    ("GiB for KV cache", "making room for its prefix cache"),
    ("Dynamo bytecode transform", "compiling"),
    ("Starting to load model", "loading the model"),
    ("Initializing a V1 LLM engine", "starting its engine"),
    ("Resolved architecture", "reading the model's files"),
)
"""Words of the log, those that come last first, and what the server is doing then, in words for a newcomer."""
_UP_AFTER: Final = "vLLM server was up after {:.0f} s"
"""Our own line in the server's log: how long the next start may take."""
_TIMES: Final = re.compile(_UP_AFTER.replace("{:.0f}", r"(\d+)"))
_CHOICE: Final = re.compile(r"^launch_vllm_server: (\w+, because .*?)( \(--dtype .*)?$", re.M)
"""What the launcher chose and why (scripts/vllm_command.py)."""
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CAUSE: Final = re.compile(r"^(?!.*\bWARNING\b)(?:.*?\s)??((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .+)$", re.M)
"""A line that says what was raised, without the logger's part."""

_HINTS: Final = (
    ("Insufficient space in /dev/shm", "In a container: docker run --shm-size 4g, or --ipc host."),
    ("is in use", "Stop what runs on that port."),
    ("make setup-local", ""),
    ("Cannot allocate memory", "The machine is short of memory: lower VLLM_CPU_KVCACHE_SPACE (GiB)."),
    ("larger than the available KV cache", "Raise VLLM_CPU_KVCACHE_SPACE (GiB) or lower --max-model-len."),
    ("No module named", "Run `make setup-local` again; if that changes nothing, `make clean` first."),
)


class ServerFailed(Exception):
    """The server did not start; the message holds its last log lines and what to do."""


class VLLMServer:
    """Context manager that runs scripts/launch_vllm_server.sh. Not reusable, not shared between threads.

    size: what the launcher is given; model: name of a folder in models/, for size "local" only. port: default is a free
    one. options: passed to vLLM. log: file that gets the server's output, appended to. timeout: seconds until the
    server must answer. launcher: the command instead of scripts/launch_vllm_server.sh; it must understand --port.
    """

    def __init__(
        self,
        *,
        log: Path,
        size: str = "local",
        model: str = "gemma-3-270m",
        port: int | None = None,
        options: tuple[str, ...] = (),
        timeout: float = 600.0,
        launcher: tuple[str, ...] = (str(LAUNCHER),),
        progress: TextIO | None = None,
    ) -> None:
        self.model = model
        self.log = log
        self.port = port or free_port()
        self._command = [*launcher, size, "--port", str(self.port)]
        if size == "local":
            self._command += ["--model", model]
        self._command += options
        self._timeout = timeout
        self._out = sys.stderr if progress is None else progress
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._handlers: dict[signal.Signals, object] = {}
        self._log_start = 0
        self._usual: int | None = None

    @property
    def url(self) -> str:
        """Base URL, without /v1."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Process id of the server, which is its process group's too; None before it was started."""
        return None if self._process is None else self._process.pid

    def is_running(self) -> bool:
        """Whether the process that was started has not ended."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        self._catch_signals()
        try:
            self._start()
            self._wait_until_up()
        except BaseException:  # also KeyboardInterrupt: the server must not outlive the block
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and everything it started; idempotent. Returns once the group is gone."""
        try:
            if self._process is not None:
                end_group(self._process)
            if self._guardian is not None:
                self._dismiss(self._guardian)
                self._guardian = None
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._handlers.clear()

    def _catch_signals(self) -> None:
        """Let SIGTERM and SIGHUP unwind the stack, as Ctrl-C does, so that the `with` block is left."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, _leave)

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            earlier = _TIMES.findall(self._read_log(log.tell() - (1 << 20)))
            self._usual = int(earlier[-1]) if earlier else None
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={"PYTHON": sys.executable, **os.environ},
            )
        self._guardian = subprocess.Popen(
            ["/bin/sh", "-c", _GUARDIAN, "guardian", str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait_until_up(self) -> None:
        assert self._process is not None
        progress = _Progress(self._out, self._usual)
        start = time.monotonic()
        shown = False
        while True:
            seconds = time.monotonic() - start
            if self._process.poll() is not None:
                progress.end()
                raise self._failed(f"the vLLM server ended with exit code {self._process.returncode}")
            if not shown and (choice := _CHOICE.search(self._read_log(self._log_start, BEGINNING))):
                shown = True
                progress.end(f"vLLM computes in {choice[1]}")
            if is_healthy(self.url):
                progress.end(f"vLLM server is up at {self.url} after {seconds:.0f} s (log: {self.log})")
                with self.log.open("a", encoding="utf-8") as log:
                    log.write(_UP_AFTER.format(seconds) + "\n")
                return
            if seconds > self._timeout:
                progress.end()
                raise self._failed(f"the vLLM server did not answer within {self._timeout:.0f} s")
            progress.show(seconds, self._stage())
            time.sleep(POLL)

    def _stage(self) -> str:
        """What this server is doing, by its log."""
        text = self._read_log(self._log_start)
        return next((words for sign, words in _STAGES if sign in text), "loading vLLM")

    def _last_lines(self, count: int) -> list[str]:
        """The last lines that this server, not an earlier one, wrote to the log."""
        text = self._read_log(max(self._log_start, self.log.stat().st_size - 16_384))
        lines = (_ESCAPES.sub("", line.rsplit("\r", 1)[-1]).rstrip() for line in text.splitlines())
        return [line for line in lines if line][-count:]

    def _read_log(self, start: int, size: int = -1) -> str:
        """The log from byte `start` on, or from its beginning: `size` bytes, or to its end."""
        with self.log.open("rb") as log:
            log.seek(max(0, start))
            return log.read(size).decode(errors="replace")

    def _failed(self, what: str) -> ServerFailed:
        lines = self._last_lines(12)
        text = "\n".join(self._last_lines(200))
        hint = next((hint for sign, hint in _HINTS if sign in text), f"The whole log is in {self.log}")
        # vLLM's last lines only say that the engine failed; its process said why long before.
        causes = [found for found in _CAUSE.findall(text) if "See root cause above" not in found]
        if causes and not any(causes[0] in line for line in lines):
            lines = [causes[0], "...", *lines]
        return ServerFailed(
            "\n".join([f"{what}. It said last:", *(f"  {line}" for line in lines), *([hint] if hint else [])])
        )

    @staticmethod
    def _dismiss(guardian: subprocess.Popen[bytes]) -> None:
        assert guardian.stdin is not None
        try:
            guardian.stdin.write(b"done\n")
            guardian.stdin.close()
        except OSError:
            pass  # it is gone already
        guardian.wait()


class _Progress:
    """One line that changes on a terminal; elsewhere a line every 15 seconds. usual: seconds of an earlier start."""

    EVERY: Final = 15.0

    def __init__(self, out: TextIO, usual: int | None) -> None:
        self._out = out
        self._usual = "" if usual is None else f" (the last start took {usual} s)"
        self._terminal = out.isatty()
        self._next = 0.0

    def show(self, seconds: float, stage: str) -> None:
        """Show the seconds since the server's start and what it is doing."""
        line = f"starting the vLLM server: {seconds:3.0f} s{self._usual}, {stage}"
        if self._terminal:
            self._out.write(f"\r\033[K{line[:100]}")
        elif seconds >= self._next:
            self._out.write(f"{line[:100]}\n")
            self._next += self.EVERY
        self._out.flush()

    def end(self, line: str = "") -> None:
        """Replace the changing line by a last one."""
        if self._terminal:
            self._out.write("\r\033[K")
        if line:
            self._out.write(f"{line}\n")
        self._out.flush()


def free_port() -> int:
    """A TCP port that nothing listens on at 127.0.0.1, right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_healthy(url: str, timeout: float = 5.0) -> bool:
    """Whether a vLLM server at `url` says that it is ready."""
    # No proxy: the server is on this machine or in its network, whatever http_proxy says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=timeout) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def end_group(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """End the process group that `process` leads: SIGTERM to the leader, SIGKILL to whatever is left of the group.

    vLLM's front end ends its engine and workers itself, in a second, if it alone gets the signal; if all get it at
    once, they wait for each other. The group gets `grace` seconds, but no more than 2 once its leader is gone.
    """
    deadline = time.monotonic() + grace
    if process.poll() is None:
        process.terminate()
    while group_members(process.pid) and time.monotonic() < deadline:
        if process.poll() is not None:
            deadline = min(deadline, time.monotonic() + 2.0)
            break
        time.sleep(0.05)
    while group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while group_members(process.pid):
        time.sleep(0.05)


def group_members(group: int) -> list[int]:
    """Process ids of the living members of a process group, from /proc. Linux only."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state ppid pgrp ...; the name may hold blanks and brackets
            state, _, pgrp = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended while we looked
        if int(pgrp) == group and state not in "ZX":
            members.append(int(stat.parent.name))
    return members


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
