"""scripts/with_server.py: the command gets the server's address, its exit code comes back, the server is stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from core.vllm_server import ServerFailed
from scripts import with_server


class Server:
    """What VLLMServer is to the script. `events`: what happened, in order."""

    url = "http://127.0.0.1:4321"
    events: ClassVar[list[str]] = []
    fails = False

    def __init__(self, **options: Any) -> None:
        self.events.append(options["model"])

    def __enter__(self) -> Server:
        if self.fails:
            raise ServerFailed("no memory")
        return self

    def __exit__(self, *_: object) -> None:
        self.events.append("stopped")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    monkeypatch.setattr(Server, "events", [])
    monkeypatch.setattr(Server, "fails", False)
    monkeypatch.setattr(with_server, "VLLMServer", Server)
    return Server


def test_the_command_is_told_where_the_server_is(server: type[Server], tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = (
        f"import os, pathlib; pathlib.Path({str(told)!r}).write_text(os.environ['VLLM_BASE_URL']); raise SystemExit(7)"
    )
    assert with_server.main(["--model", "m", "--", sys.executable, "-c", code]) == 7
    assert told.read_text() == Server.url
    assert server.events == ["m", "stopped"]


def test_a_server_that_does_not_come_up_is_told(
    server: type[Server], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "fails", True)
    assert with_server.main(["--", "true"]) == 2
    assert "no memory" in capsys.readouterr().err


def test_without_a_command_there_is_nothing_to_do(server: type[Server]) -> None:
    with pytest.raises(SystemExit) as refused:
        with_server.main([])
    assert refused.value.code == 2
    assert server.events == []


@pytest.mark.parametrize("given", [["icm", "label"], ["icm", "--", "label"], ["--model", "m", "true"], ["--"]])
def test_a_command_that_does_not_stand_behind_the_dashes_starts_no_server(
    given: list[str], server: type[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        with_server.main(given)
    assert refused.value.code == 2
    assert "say what to run behind --" in capsys.readouterr().err
    assert server.events == []
