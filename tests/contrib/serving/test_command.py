"""`icm serve` as a process: it comes up, answers, ends when it is told to, and says in one line why it cannot start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import aiohttp
import pytest

from contrib.serving import command
from contrib.serving.options import read_token
from core.errors import ConfigurationError
from core.vllm_server import ServerFailed
from tests.contrib.serving.conftest import WritingVLLM

REPO_ROOT = Path(__file__).resolve().parents[3]
TOKEN = "planted-token-0123456789"
QUESTION = {"question": "Where does the Danube flow?"}


@dataclass
class Running:
    process: asyncio.subprocess.Process
    url: str = ""
    lines: list[str] = field(default_factory=list)

    async def read_until(self, pattern: str) -> str:
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            while line := (await self.process.stderr.readline()).decode():
                self.lines.append(line)
                if found := re.search(pattern, line):
                    return found[found.lastindex or 0]
        raise AssertionError("".join(self.lines))

    async def end(self) -> int:
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            self.lines += (await self.process.stderr.read()).decode().splitlines(keepends=True)
            return await self.process.wait()


@contextlib.asynccontextmanager
async def started(*arguments: str, **environment: str) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "src.experiments.commands", "serve", "--port", "0", *arguments),
        cwd=REPO_ROOT,
        env={**os.environ, "ICM_SECRETS": os.devnull, **environment},
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
    )
    running = Running(process)
    try:
        running.url = await running.read_until(r"listening on (http\S+)")
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def until_ready(web: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(20):
        while True:
            async with web.get(f"{url}/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_answers_and_finishes_what_is_at_work_when_told_to_end(
    model: WritingVLLM, folder: Path, number: signal.Signals
) -> None:
    environment = {"VLLM_BASE_URL": model.url, "ICM_SERVE_TOKEN": TOKEN}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with started("--documents", str(folder), **environment) as running, aiohttp.ClientSession() as web:
        await until_ready(web, running.url)
        async with web.post(f"{running.url}/query", json=QUESTION) as response:
            assert response.status == 401
        model.latency = 0.5
        asking = asyncio.create_task(web.post(f"{running.url}/query", json=QUESTION, headers=headers))
        await asyncio.sleep(0.25)
        running.process.send_signal(number)
        response = await asking
        assert response.status == 200
        assert (await response.json())["answer"] == "Through ten countries."
        assert (await response.json())["model"] == model.model, "found out by asking the server"
        response.close()
        assert await running.end() == 0
    said = "".join(running.lines)
    assert TOKEN not in said
    assert "Traceback" not in said
    assert "POST /query 200" in said


async def test_a_second_ctrl_c_ends_it_at_once(model: WritingVLLM, folder: Path) -> None:
    async with (
        started("--documents", str(folder), VLLM_BASE_URL=model.url) as running,
        aiohttp.ClientSession() as web,
    ):
        await until_ready(web, running.url)
        model.latency = 60.0
        asking = asyncio.create_task(web.post(f"{running.url}/query", json=QUESTION))
        await asyncio.sleep(0.3)
        running.process.send_signal(signal.SIGINT)
        await running.read_until("Shutting down")
        begin = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        await running.end()
        assert time.monotonic() - begin < 5
        with contextlib.suppress(aiohttp.ClientError):  # or its connection was cut
            assert (await asking).status == 503


async def test_it_comes_up_without_a_model_and_says_what_is_missing(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with (
            started("--documents", str(folder), VLLM_BASE_URL=nobody) as running,
            aiohttp.ClientSession() as web,
        ):
            assert "launch_vllm_server.sh" in await running.read_until(r"no model yet: .*")
            async with web.get(f"{running.url}/ready") as response:
                assert response.status == 503
            running.process.terminate()
            assert await running.end() == 0


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "src.experiments.commands", "serve", *arguments],
        cwd=REPO_ROOT,
        env={**os.environ, "ICM_SECRETS": os.devnull, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_port_in_use_is_known_before_a_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--start", "local", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert "Try --port" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--documents", "/no/such/folder"), "no folder of texts"),
        (("--port", "70000"), "between 0"),
        (("--", "--max-model-len", "512"), "need --start"),
        ((), "Set VLLM_BASE_URL"),
        (("--host", "no.such.host.invalid"), "cannot listen"),
        (("--concurrent", "0"), "at least 1"),
        (("--request_seconds", "nan"), "above 0"),
        (("--shutdown_seconds", "-1"), "above 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(arguments: tuple[str, ...], complaint: str) -> None:
    done = run(*arguments, VLLM_BASE_URL="", LLAMA_API_BASE="")
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError(\"No module named 'fastapi'\")")
    done = run(PYTHONPATH=f"{tmp_path}:{REPO_ROOT}")
    assert done.returncode == 2
    assert "pip install '.[serving]'" in done.stderr


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently in other versions")
def test_the_documented_options_are_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """To renew them: UPDATE_DOCS=1 make test-fast ARGS="-k documented_options"."""
    monkeypatch.setenv("COLUMNS", "118")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["icm serve"])
    shown = command.build_parser().format_help().replace(str(REPO_ROOT), ".")
    document = REPO_ROOT / "docs" / "serving-app.md"
    before, _, _ = document.read_text().partition("\n## Options\n")
    expected = f"{before}\n## Options\n\n```\n{shown}```\n"
    if os.environ.get("UPDATE_DOCS"):
        document.write_text(expected)
    assert expected.split() == document.read_text().split()


# ---- a model server of its own


class FakeServer:
    asked: ClassVar[dict[str, object]]
    stopped = 0
    fails = False
    url = "http://127.0.0.1:9"

    def __init__(self, **asked: object) -> None:
        type(self).asked = asked

    def __enter__(self) -> Self:
        if FakeServer.fails:
            raise ServerFailed("the vLLM server ended with exit code 1")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        FakeServer.stopped += 1

    def is_running(self) -> bool:
        return True


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> type[FakeServer]:
    monkeypatch.setenv("ICM_SECRETS", os.devnull)
    monkeypatch.setattr(command, "VLLMServer", FakeServer)
    monkeypatch.setattr(FakeServer, "stopped", 0)
    monkeypatch.setattr(FakeServer, "fails", False)
    monkeypatch.setattr("contrib.serving.web_server.WebServer.run", lambda self, sockets: None)
    return FakeServer


def test_it_starts_a_server_of_the_size_and_stops_it(own_server: type[FakeServer]) -> None:
    assert (
        command.main(["--start", "local", "--model", "smollm2-135m", "--port", "0", "--", "--max-model-len", "512"])
        == 0
    )
    assert own_server.asked["size"] == "local"
    assert own_server.asked["model"] == "smollm2-135m"
    assert own_server.asked["options"] == ("--max-model-len", "512")
    assert own_server.stopped == 1


def test_a_server_that_does_not_come_up_is_exit_code_2(
    own_server: type[FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    own_server.fails = True
    assert command.main(["--start", "8B", "--port", "0"]) == 2
    assert "ended with exit code 1" in capsys.readouterr().err


# ---- the token


def test_the_token_comes_from_the_environment_or_secrets(tmp_path: Path) -> None:
    secrets = tmp_path / "SECRETS"
    secrets.write_text(f"ICM_SERVE_TOKEN={TOKEN}\n")
    found = read_token({}, secrets)
    assert found is not None
    assert found.get_secret_value() == TOKEN
    assert TOKEN not in repr(found)
    other = read_token({"ICM_SERVE_TOKEN": " abc "}, secrets)
    assert other is not None
    assert other.get_secret_value() == "abc"
    assert read_token({"ICM_SECRETS": os.devnull}) is None


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "é"])
def test_a_token_that_no_header_carries_is_refused_unseen(token: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        read_token({"ICM_SERVE_TOKEN": token, "ICM_SECRETS": os.devnull})
    assert token not in str(error.value)
