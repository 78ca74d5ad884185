"""The pages: README is short and its examples run, links lead somewhere, and results are cited."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from contrib.serving.documents import Library
from fakes.vllm_server import FakeVLLM

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
RESULTS = REPOSITORY / "benchmarks" / "results"
FOLDERS = ("benchmarks", "configs", "contrib", "core", "docs", "experiments", "requirements", "scripts", "src", "tests")
HISTORY = ("lab-log.md", "comparison.md")
"""Pages that name files of earlier versions, or of other projects."""

_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)


def where(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def prose(page: Path) -> str:
    """A page without its code blocks, where brackets mean something else."""
    return _FENCED.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """What a page's links name in this repository."""
    found = [inline or reference for inline, reference in _LINK.findall(prose(page))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them; of equal headings the later ones get a number."""
    names: list[str] = []
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        names.append(f"{name}-{count}" if (count := names.count(name)) else name)
    return set(names)


def blocks(language: str) -> list[str]:
    """README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command line of README's blocks, as words without its comment; what `source` does is left out."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(part, comments=True) for line in lines for part in line.partition("#")[0].split("&&")]


def test_readme_is_read_in_five_minutes() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


def test_a_dead_link_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (
        "# A, b: `c`\n\n[x](other.md#d) ![y](z.png) [u](https://a.b)\n\n```\n[no](link)\n```\n## A, b: `c`\n[k]: k.md\n"
    )
    page.write_text(text)
    assert links(page) == ["other.md#d", "z.png", "k.md"]
    assert anchors(page) == {"a-b-c", "a-b-c-1"}


def test_the_index_names_every_page() -> None:
    indexed = {target.partition("#")[0] for target in links(DOCS / "README.md")}
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= indexed


@pytest.mark.parametrize("topics", ["", "data file, columns", "data files"])
def test_a_question_about_columns_finds_the_page_that_answers_it(topics: str) -> None:
    """What the web application looks up before a model answers (tests/real_server/test_serving.py)."""
    found = Library.read(DOCS).search(f"Which columns does a data file of my own have? {topics}", 3)
    assert "installing.md" in [passage.path for passage, _ in found]


def test_every_result_is_cited_by_a_page() -> None:
    cited = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    assert not sorted(file.name for file in RESULTS.iterdir() if file not in cited)


def test_the_map_names_files_that_exist() -> None:
    page = (DOCS / "architecture.md").read_text()
    [folders] = re.findall(r"^## Folders\n+```\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    top = REPOSITORY
    missing = []
    for line in folders.splitlines():
        if not line.startswith(" "):
            named = line.split("  ")[0].split()  # one folder, or two
            missing += [name for name in named if not (REPOSITORY / name).is_dir()]
            top = REPOSITORY / named[0]
        for name in re.findall(r"[\w/.-]+\.(?:py|sh|yaml|jsonl|jinja|md)\b", line):
            elsewhere = (REPOSITORY / name, DOCS / name)
            if not any(file.exists() for file in elsewhere) and not any(top.rglob(name)):
                missing.append(name)
    assert folders.count("\n") > 30
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=where)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w/.-]*\w", page.read_text()))
    assert not sorted(name for name in named if not (REPOSITORY / name).exists())


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = commands()
    assert {words[1] for words in named if words[0] == "make"} <= targets
    assert ["make", "icm"] in named


async def run(*words: str, folder: Path, url: str = "", code: int = 0) -> str:
    """Run a command of README in `folder`, against the server at `url`; its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *words,
        cwd=folder,
        env={**os.environ, "VLLM_BASE_URL": url, "ICM_SECRETS": os.devnull, "PYTHONPATH": str(REPOSITORY)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    return out.decode()


@pytest.mark.parametrize("script", ["test_vllm_server.py", "with_server.py"])
async def test_scripts_explain_themselves(script: str, tmp_path: Path) -> None:
    assert "usage" in await run(str(REPOSITORY / "scripts" / script), "--help", folder=tmp_path)


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(model="MODEL") as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds README's data file."""
    [claims] = blocks("json")
    (tmp_path / "claims.jsonl").write_text(claims)
    return tmp_path


async def test_the_commands_for_own_claims_run(folder: Path, server: FakeVLLM) -> None:
    outputs = {}
    for words in commands():
        if words[0] == "icm":
            more = ["--runs_dir", "runs", "--quiet"] if words[1] == "label" else []
            arguments = ["-m", "src.experiments.commands", *words[1:], *more]
            outputs[" ".join(words[1:])] = await run(*arguments, folder=folder, url=server.url)
    assert [name.split()[0] for name in outputs] == ["label", "label", "report"]
    checked, labelled, _ = outputs.values()
    assert "all True" in checked
    assert "flipped gold" in checked
    assert "agreement with gold" in labelled
    assert len((folder / "runs" / "mine" / "labels.jsonl").read_text().splitlines()) == 4
    assert "Does ice float on water?" in (folder / "report.html").read_text()


async def test_the_python_example_runs(folder: Path, server: FakeVLLM) -> None:
    [code] = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (folder / "example.py").write_text(code)
    printed = (await run("example.py", folder=folder, url=server.url)).splitlines()
    assert len([line for line in printed if re.match(r"(True|False) [01]\.\d\d: (Which|Does) ", line)]) == 4


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_no_script_is_called_where_it_is_not(page: Path) -> None:
    if page.name not in HISTORY:
        assert "python ICM.py" not in page.read_text(), "it lies in src/experiments/; the command is icm label"
