"""icm landscape against a fake server: files, resuming, found runs, no gold, three labels, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM, encode, hashed_log_odds
from src.results.statistics import rank_correlation
from tests.pipeline.test_many_labels import MOODS, Model

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
TRUE, FALSE = encode(" True")[0], encode(" False")[0]
YES = encode(" yes")[0]


def learns_from_context(tokens: Sequence[int]) -> float:
    """Knows each claim's answer, and says it the more surely, the more of the demonstrations have the right label."""
    right = wrong = 0
    answer: bool | None = None
    for token in tokens:
        if token in (TRUE, FALSE):
            right, wrong = right + (answer == (token == TRUE)), wrong + (answer != (token == TRUE))
            answer = None
        elif token == YES:
            answer = True
        elif answer is None:
            answer = False
    own = 1.0 if YES in tokens[-16:] else -1.0
    return own * (0.5 + 4 * right / max(1, right + wrong)) + 0.05 * hashed_log_odds(tokens)


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(log_odds=learns_from_context) as fake:
        yield fake


def write_claims(path: Path, *, gold: bool = True) -> Path:
    rows = [
        {"question": f"Is {n} a number?", "choice": answer, "consistency_id": n}
        | ({"label": int(answer == "yes")} if gold else {})
        for n in range(8)
        for answer in ("yes", "no")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Landscape:
    """`icm landscape` in a process of its own."""

    def __init__(self, url: str, runs: Path, *data: str) -> None:
        self.url = url
        self.runs = runs
        self.arguments = [*data, "--model", "fake-8b", "--runs_dir", str(runs), "--batch_size", "16", "--seed", "3"]
        self.environment = {**os.environ, "VLLM_BASE_URL": url, "ICM_SECRETS": os.devnull, "PYTHONPATH": os.getcwd()}

    async def start(self, *more: str, command: str = "landscape") -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "src.experiments.commands", command, *self.arguments, *more),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Ignored where the tests run in the background, and a child would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    async def __call__(self, *more: str, command: str = "landscape") -> tuple[int, str, str]:
        process = await self.start(*more, command=command)
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    def document(self, run: str = "a") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.runs / run / "landscape.json").read_text())
        return found


@pytest.fixture
def icm(server: FakeVLLM, tmp_path: Path) -> Landscape:
    return Landscape(server.url, tmp_path / "runs", "--data", str(write_claims(tmp_path / "claims.jsonl")))


async def test_a_landscape_from_claims_to_its_page(icm: Landscape, server: FakeVLLM) -> None:
    code, out, err = await icm("--labelings", "40", "--run", "a")
    assert code == 0, err
    assert out.startswith("U leads to truth here:")
    assert "0.5" in out
    assert "sum of log-likelihoods" in out
    document = icm.document()
    labelings = document["labelings"]
    kinds = [each["kind"] for each in labelings]
    assert list(dict.fromkeys(kinds)) == [
        *("gold", "constant", "zero-shot", "random", "corrupted gold", "bootstrapped", "mirrored"),
    ]
    gold = [claim["gold"] for claim in document["claims"]]
    assert labelings[0]["labels"] == gold
    for each in labelings:
        if each["kind"] == "corrupted gold":
            stated = int(each["name"].split()[1])
            assert sum(a != b for a, b in zip(each["labels"], gold, strict=True)) == stated
        if each["kind"] == "mirrored":
            original = next(other for other in labelings if other["name"] == each["of"])
            assert each["labels"] == [not label for label in original["labels"]]
        margins = [odds if label else -odds for odds, label in zip(each["log_odds"], each["labels"], strict=True)]
        assert each["U"] == pytest.approx(30 * sum(margins) / 16 - each["inconsistent"])
    distinct = {tuple(each["labels"]): each for each in labelings}
    shares = [sum(a == b for a, b in zip(labels, gold, strict=True)) / 16 for labels in distinct]
    correlation = rank_correlation([each["U"] for each in distinct.values()], shares)
    assert f"{len(distinct)} different labelings: {correlation:.2f} (95%" in out
    folder = icm.runs / "a"
    assert (folder / "landscape.png").read_bytes().startswith(b"\x89PNG")
    assert "U leads to truth here" in (folder / "landscape.html").read_text()
    most = int(err.split("asking about at most ")[1].split()[0])
    assert len(distinct) <= most
    assert f"{most * 16 + 16:,} questions" in err
    asked = sum(len(body["prompt"]) for body in server.completions if isinstance(body["prompt"], list))
    assert asked <= most * 16 + 16 + 40  # and a few about tokens and the engine's identity
    assert f"{len(distinct)}/{len(distinct)} labelings" in err


async def test_a_stopped_landscape_goes_on_and_asks_nothing_twice(
    icm: Landscape, server: FakeVLLM, tmp_path: Path
) -> None:
    flags = ("--labelings", "30", "--run", "a", "--quiet")
    assert (await icm(*flags))[0] == 0
    whole = icm.document()["labelings"]
    asked = len(server.completions)
    code, out, err = await icm(*flags)
    assert code == 0
    assert len(server.completions) == asked
    assert "shown again" in err
    assert out.startswith("U leads to truth here:")

    other = Landscape(server.url, tmp_path / "other", *icm.arguments[:2])
    server.latency = 0.05
    process = await other.start(*flags)
    waiting = asyncio.create_task(process.wait())
    while not (other.runs / "a" / "landscape.json").exists():
        assert not waiting.done()
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = await process.communicate()
    assert process.returncode == 130, told.decode()
    assert "go on with:\n  icm landscape --data" in told.decode()
    kept = other.document()
    assert kept["finished"] is None
    assert 0 < len(kept["labelings"]) < len(whole)
    (other.runs / "responses.sqlite").unlink()  # landscape.json is enough
    server.completions.clear()
    code, _, err = await other(*flags)
    assert code == 0, err
    assert other.document()["labelings"] == whole
    before = {tuple(each["labels"]) for each in kept["labelings"]}
    new = {tuple(each["labels"]) for each in whole} - before
    assert f"{len(before)} labelings are known from before" in err
    prompts = [tuple(tokens) for body in server.completions for tokens in body["prompt"] if isinstance(tokens, list)]
    after_demonstrations = [tokens for tokens in prompts if (TRUE in tokens or FALSE in tokens)]
    assert len(after_demonstrations) <= 16 * len(new)


async def test_what_a_search_found_stands_out_and_can_be_added_later(icm: Landscape, server: FakeVLLM) -> None:
    code, _, err = await icm("--search", "bootstrapping", "--run", "searched", "--quiet", command="label")
    assert code == 0, err
    flags = ("--labelings", "30", "--quiet", "--run", "a")
    assert (await icm(*flags))[0] == 0
    code, _, err = await icm(*flags, "--found", "searched")
    assert code == 0, err
    [found] = [each for each in icm.document()["labelings"] if each["kind"] == "found"]
    rows = [json.loads(line) for line in (icm.runs / "searched" / "labels.jsonl").read_text().splitlines()]
    labels = {row["row"]: row["label"] for row in rows}
    assert found["labels"] == [labels[claim["row"]] for claim in icm.document()["claims"]]
    assert found["name"] == "run searched"
    asked = len(server.completions)
    assert (await icm(*flags))[0] == 0  # it stays there
    assert len(server.completions) == asked
    code, _, err = await icm(*flags, "--found", str(icm.runs / "nowhere"))
    assert code == 2
    assert "nowhere" in err
    assert len(err.strip().splitlines()) == 1
    others = Landscape(server.url, icm.runs, "--testbed", "builtin")
    code, _, err = await others(*flags, "--found", "searched")
    assert code == 2
    assert "labels other data than builtin" in err
    assert "is of another pool" not in err
    part = ("--search", "bootstrapping", "--run", "part", "--quiet", "--batch_size", "8")
    assert (await icm(*part, command="label"))[0] == 0
    assert (await icm(*part[:2], "--run", "rest", *part[4:], "--label_rest", command="label"))[0] == 0
    code, _, err = await icm(*flags, "--found", "rest")
    assert code == 0
    assert (
        f"{icm.runs / 'rest'}: is of another pool; 8 of this one's 16 labels are predictions from its labels, which "
        "its search did not judge"
    ) in err
    code, _, err = await icm(*flags, "--found", "part")
    assert code == 2
    assert "part: has no label for 8 of the pool's 16 claims" in err


async def test_without_gold_it_says_what_cannot_be_concluded(server: FakeVLLM, tmp_path: Path) -> None:
    data = write_claims(tmp_path / "claims.jsonl", gold=False)
    icm = Landscape(server.url, tmp_path / "runs", "--data", str(data))
    code, out, err = await icm("--labelings", "30", "--run", "a", "--quiet")
    assert code == 0, err
    assert out.startswith("Without gold nothing here says whether U leads to truth")
    assert not {"gold", "corrupted gold"} & {each["kind"] for each in icm.document()["labelings"]}
    assert "cannot tell" in (icm.runs / "a" / "landscape.html").read_text()


async def test_a_landscape_of_three_labels(tmp_path: Path) -> None:
    for file in EXAMPLES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    written = "".join(f"A review of thing {at},{at % 3 + 1}\n" for at in range(18))
    (tmp_path / "sentiment.csv").write_text("text,stars\n" + written)
    async with FakeVLLM(distribution=Model(MOODS), trees=True) as moods:
        icm = Landscape(moods.url, tmp_path / "runs", "--testbed", str(tmp_path / "sentiment.yaml"))
        code, out, err = await icm("--labelings", "30", "--run", "a", "--quiet")
    assert code == 0, err
    labelings = icm.document()["labelings"]
    assert [each["name"] for each in labelings if each["kind"] == "constant"] == [f"all {name}" for name in MOODS.names]
    mirrored = [each for each in labelings if each["kind"] == "mirrored"]
    for each in mirrored:
        original = next(other for other in labelings if other["name"] == each["of"])["labels"]
        one, other = each["name"].split(" swapped of ")[0].split(" and ")
        turned = {one: other, other: one}
        assert each["labels"] == [turned.get(label, label) for label in original] != original
    assert any(len(each["log_odds"][0]) == 2 for each in labelings)
    assert "Rank correlation" in out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--labelings", "3"), "must be at least 30"),
        (("--alpha", "0"), "--alpha 0 must be above 0"),
        (("--run", "../a"), "not a path"),
        (("--model", "other"), "other"),
    ],
)
async def test_what_it_refuses_in_one_line(icm: Landscape, flags: tuple[str, ...], told: str) -> None:
    code, _, err = await icm(*flags, "--quiet")
    assert code == 2
    assert told in err
    assert "Traceback" not in err
    assert not list(icm.runs.glob("*/landscape.json"))


async def test_other_settings_are_another_landscape(icm: Landscape) -> None:
    assert (await icm("--labelings", "30", "--run", "a", "--quiet"))[0] == 0
    code, _, err = await icm("--labelings", "30", "--run", "a", "--quiet", "--alpha", "50")
    assert code == 2
    assert "--alpha 30.0, now 50.0" in err
    assert (await icm("--labelings", "30", "--run", "a", "--quiet", "--K", "7"))[0] == 0  # of the annealing alone


async def test_a_runs_folder_is_not_taken_for_a_landscape_nor_watched(icm: Landscape) -> None:
    assert (await icm("--run", "mine", "--K", "3", command="label"))[0] == 0
    prompt = (icm.runs / "mine" / "prompt.txt").read_text()
    code, _, told = await icm("--run", "mine", "--labelings", "30")
    assert code == 2
    assert "holds a run. Choose another --run for the landscape" in told
    assert (icm.runs / "mine" / "prompt.txt").read_text() == prompt
    code, _, told = await icm("--run", "land", "--labelings", "30", "--context_cap", "4", "--num_seed", "16")
    assert code == 0
    assert "each after up to 4 demonstrations" in told
    assert "begin with a random label" not in told
    watched = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "src.experiments.commands", "watch", str(icm.runs / "land")),
        env=icm.environment,
        stderr=asyncio.subprocess.PIPE,
    )
    _, complaint = await watched.communicate()
    assert watched.returncode == 2
    assert b"holds a landscape" in complaint


async def test_every_labeling_of_a_landscape_has_the_known_labels(icm: Landscape) -> None:
    code, _, err = await icm("--run", "known", "--gold_seeds", "4", "--labelings", "30")
    assert code == 0, err
    assert "known   4 labels" in err
    document = json.loads((icm.runs / "known" / "landscape.json").read_text())
    labelings = [(each["name"], each["labels"]) for each in document["labelings"]]
    gold = dict(labelings)["gold"]
    always = [at for at in range(len(gold)) if all(labels[at] == gold[at] for _, labels in labelings)]
    assert len(always) == 4
    changed = {name: labels for name, labels in labelings if name.startswith("gold, 6 of 12 labels changed")}
    assert changed
    assert all(sum(one != other for one, other in zip(labels, gold, strict=True)) == 6 for labels in changed.values())
