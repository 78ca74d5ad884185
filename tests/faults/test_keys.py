"""A planted key is nowhere but in the header of requests to its own server: every file and line that a run writes is
searched for it, in every way that a run can end."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from urllib.parse import quote

import pytest

from core.settings import Settings
from tests.faults.proxy import Strike
from tests.faults.world import World

KEY = "sk-planted/0123456789+abc="
FORMS = {KEY, quote(KEY, safe=""), base64.b64encode(KEY.encode()).decode(), repr(KEY)[1:-1], KEY[3:-1]}
ENVIRONMENT = {"VLLM_API_KEY": KEY, "API_KEY": KEY, "HF_TOKEN": KEY}


@pytest.fixture
def world() -> Iterator[World]:
    with World() as world:
        world.server.api_key = KEY
        yield world


def found_in(folder: Path, *texts: str) -> list[str]:
    places = [text for text in texts if any(form in text for form in FORMS)]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            places += [str(path) for form in FORMS if form.encode() in content]
    return places


def test_what_looks_for_the_key_would_find_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x00" + KEY.encode() + b"\xff")
    assert found_in(tmp_path, f"Bearer {KEY}") == [f"Bearer {KEY}", str(tmp_path / "a"), str(tmp_path / "a")]


@pytest.mark.parametrize(
    ("kind", "code"),
    [("", 0), ("http_500", 0), ("redirect", 1), ("http_400", 1), ("reset_in_headers", 0), ("minus_9999", 1)],
)
def test_a_run_leaves_no_trace_of_the_key(world: World, kind: str, code: int) -> None:
    runs = world.home / "runs"
    world.proxy.renew([Strike(kind, 3, times=9 if code else 2)] if kind else [])
    ended = world.run(runs, "--seed", "0", env=ENVIRONMENT)
    assert ended.code == code, ended.err
    assert f"Bearer {KEY}" in world.server.authorizations
    assert found_in(world.home, ended.out, ended.err) == []


def test_a_server_that_repeats_the_key_it_refuses_is_not_quoted(world: World) -> None:
    world.server.api_key = "another"
    ended = world.run(world.home / "runs", env=ENVIRONMENT)
    assert ended.code == 1
    assert "401" in ended.err
    assert found_in(world.home, ended.out, ended.err) == []


def test_a_crash_shows_no_key(world: World) -> None:
    with mock.patch("core.llm_api.engines.vllm.read_answers", side_effect=RuntimeError("planted crash")):
        process = world.run(world.home / "runs", env=ENVIRONMENT)
    assert "planted crash" in process.err
    assert found_in(world.home, process.out, process.err) == []
    settings = Settings.load(environ={**os.environ, **ENVIRONMENT, "ICM_SECRETS": os.devnull})
    assert found_in(world.home, repr(settings), str(settings), settings.model_dump_json()) == []


@pytest.mark.parametrize("name", ["../up", "a/b", "/tmp/x", "..", ".hidden", "a\x00b", "", "x" * 101, "-flag", "a\nb"])
def test_a_run_name_is_a_name_and_no_path(world: World, name: str) -> None:
    runs = world.home / "runs"
    before = sorted(world.home.rglob("*"))
    ended = world.run(runs, f"--run={name}", env=ENVIRONMENT)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert sorted(world.home.rglob("*")) == before
