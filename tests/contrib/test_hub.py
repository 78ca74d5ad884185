"""`icm export --hub` against a stand-in of the hub's HTTP API, as a user runs it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fakes.hub_server import FakeHub
from tests.run_examples import write_run

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"),
    pytest.mark.timeout(300),
]
REPOSITORY = Path(__file__).resolve().parents[2]
Export = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """icm export RUN --format datasets ...: exit code, standard output and error."""
    folder = write_run(tmp_path / "mine", labels=[True, False] * 4, gold=[True, False] * 4)

    async def run(url: str, token: str | None, *flags: str, **more: str) -> tuple[int, str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        known = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                 "PYTHONPATH": str(REPOSITORY), **({} if token is None else {"HF_TOKEN": token}), **more}  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "src.experiments.commands", "export", str(folder), "--format", "datasets", *flags,
            cwd=REPOSITORY, env=kept | known, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, error = await process.communicate()
        return process.returncode or 0, out.decode(), error.decode()

    return run


async def test_what_is_pushed_is_the_folder_and_only_its_owner_reads_it(export: Export, tmp_path: Path) -> None:
    async with FakeHub() as hub:
        # What else lies in the folder is the user's, and stays there.
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "notes.txt").write_text("not for others")
        code, out, error = await export(hub.url, hub.token, "-o", str(tmp_path / "set"), "--hub", "labels")
        assert (code, error) == (0, "")
        assert out.splitlines() == [
            f"{tmp_path / 'set'}: 8 claims",
            f"{hub.url}/datasets/me/labels: private",
        ]
        repository = hub.repositories["me/labels"]
        assert repository.private
        assert repository.messages == ["Labels of mine"]
        pushed = {path: content for path, content in repository.files.items() if path != ".gitattributes"}
        names = ("README.md", "data/train.jsonl", "provenance.json")
        assert pushed == {name: (tmp_path / "set" / name).read_bytes() for name in names}

        code, out, _ = await export(hub.url, hub.token, "--hub", "me/open", "--public")
        assert (code, out.splitlines()[-1]) == (0, f"{hub.url}/datasets/me/open: public")
        assert not hub.repositories["me/open"].private


async def test_a_repository_that_holds_files_is_left_alone_and_an_empty_one_is_filled(export: Export) -> None:
    async with FakeHub() as hub:
        hub.refuse_commits = [413]
        code, _, error = await export(hub.url, hub.token, "--hub", "me/labels")
        assert (code, len(error.splitlines())) == (1, 1)
        assert "the hub answers 413" in error
        hub.refuse_commits.clear()
        code, _, error = await export(hub.url, hub.token, "--hub", "me/labels", "--public")
        assert code == 2
        assert "me/labels: is there, empty and private, not public" in error
        code, _, error = await export(hub.url, hub.token, "--hub", "me/labels")
        assert (code, error) == (0, "")
        before = dict(hub.repositories["me/labels"].files)
        code, _, error = await export(hub.url, hub.token, "--hub", "labels")
        assert code == 2
        assert error == "error: --hub me/labels: holds files already; choose another name, or delete it\n"
        assert hub.repositories["me/labels"].files == before


@pytest.mark.parametrize(
    ("name", "token", "more", "code", "said"),
    [
        ("labels", None, {}, 2, "no token is known: set HF_TOKEN"),
        ("labels", "wrong", {}, 1, "401"),
        ("other/labels", "hf_of_the_fake", {}, 1, "don't have the rights"),
        ("a/b/c", "hf_of_the_fake", {}, 2, "--hub a/b/c: "),
        ("with space", "hf_of_the_fake", {}, 2, "--hub with space: "),
        ("labels", "hf_of_the_fake", {"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set"),
    ],
)
async def test_what_cannot_be_pushed_is_said_in_one_line(
    export: Export, name: str, token: str | None, more: dict[str, str], code: int, said: str
) -> None:
    async with FakeHub() as hub:
        found, _, error = await export(hub.url, token, "--hub", name, **more)
        assert not hub.repositories
    assert (found, len(error.splitlines())) == (code, 1), error
    assert said in error


async def test_a_hub_that_does_not_answer(export: Export) -> None:
    code, _, error = await export("http://127.0.0.1:9", "some", "--hub", "me/labels")
    assert (code, len(error.splitlines())) == (1, 1), error
    assert error.startswith("error: --hub me/labels: ")
