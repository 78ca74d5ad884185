"""The loop of iterative fine-tuning against a fake server, its training step a stub that copies a model's folder."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from fakes.vllm_server import FakeVLLM
from scripts.finetune_rounds import Rounds, build_parser, main
from src.pipeline.datafiles import load_data_file
from tests.pipeline.test_many_labels import MOODS, Model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "finetune_rounds.py"
COPY = f"{shlex.quote(sys.executable)} -c 'import shutil, sys; shutil.copytree(*sys.argv[1:])' {{model}} {{output}}"
# Notes which model was asked for, then asks the fake one.
LABELLER = """
import pathlib, subprocess, sys
note, model, *rest = sys.argv[1:]
with open(note, "a") as file:
    file.write(pathlib.Path(model).name + "\\n")
raise SystemExit(subprocess.run([sys.executable, {script!r}, "--model", "fake-8b", *rest]).returncode)
"""


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(log_odds=lambda tokens: float(sum(tokens[-9:]) % 7 - 3)) as fake:
        yield fake


class Loop:
    """The script in a process of its own."""

    def __init__(self, url: str, tmp_path: Path) -> None:
        self.out, self.note = tmp_path / "rounds", tmp_path / "asked.txt"
        self.model = tmp_path / "base-model"
        self.model.mkdir()
        (self.model / "weights").write_text("w")
        (self.model / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
        rows = [
            {"question": f"Is {n} even?", "choice": answer, "label": int((n % 2 == 0) == (answer == "yes")),
             "consistency_id": n}
            for n in range(12) for answer in ("yes", "no")
        ]  # fmt: skip
        self.data = tmp_path / "claims.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.source: tuple[str, ...] = ("--data", str(self.data))
        labeller = tmp_path / "labeller.py"
        labeller.write_text(LABELLER.format(script=str(ROOT / "src" / "experiments" / "ICM.py")))
        self.label = shlex.join([sys.executable, str(labeller), str(self.note), "{model}"])
        self.environment = {**os.environ, "VLLM_BASE_URL": url, "ICM_SECRETS": os.devnull, "PYTHONPATH": str(ROOT)}

    async def __call__(self, *more: str, train: str = COPY, flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(SCRIPT), *self.source, "--model", str(self.model), "--batch_size", "8"),
            *("--train", train, "--label", self.label, "--out", str(self.out), *more),
            *("--", "--quiet", "--num_seed", "4", "--K", "12", *flags),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
def loop(server: FakeVLLM, tmp_path: Path) -> Loop:
    return Loop(server.url, tmp_path)


async def test_each_batch_is_labelled_by_the_model_of_the_batches_before(loop: Loop) -> None:
    code, out, err = await loop("--train_last")
    assert code == 0, err
    # 24 claims in batches of 8: three rounds, and a model of all labels at the end.
    assert loop.note.read_text().split() == ["base-model", "model-1", "model-2"]
    assert sorted(path.name for path in loop.out.glob("model-*")) == ["model-1", "model-2", "model-3"]
    assert (loop.out / "model-3" / "weights").read_text() == "w"
    sizes = [len((loop.out / f"train-{n}.jsonl").read_text().splitlines()) for n in (1, 2, 3)]
    assert sizes == [8, 16, 24]  # the labels of batches 1 to j
    config = yaml.safe_load((loop.out / "train-2.yaml").read_text())
    assert config["model_name_or_path"] == str(loop.model)  # always from the pretrained weights
    labels = [json.loads(line) for line in (loop.out / "labels.jsonl").read_text().splitlines()]
    assert sorted((row["question"], row["choice"]) for row in labels) == sorted(
        (f"Is {n} even?", answer) for n in range(12) for answer in ("yes", "no")
    )
    assert [row["batch"] for row in labels] == [1] * 8 + [2] * 8 + [3] * 8
    assert "batch 3: 8 claims" in out


def test_batches_are_written_under_our_names_without_bad_rows(tmp_path: Path) -> None:
    options = [{"prompt": f"q{n}", "answer": ["a", "b"], "verdict": n % 2} for n in range(2)]
    rows = [{"prompt": f"p{n}", "answer": "x" if n else None, "verdict": "good" if n % 2 else "bad"} for n in range(5)]
    (tmp_path / "mine.json").write_text(json.dumps([*options, *rows]))
    arguments = ["--data", str(tmp_path / "mine.json"), "--model", "m", "--train", "t", "--out", str(tmp_path / "out")]
    reading = ["--columns", "question=prompt,choice=answer,label=verdict", "--map", "label=good:true,bad:false"]
    args = build_parser().parse_args(
        [*arguments, "--batch_size", "4", "--", *reading, "--skip_bad_rows", "--alpha", "3"]
    )
    rounds = Rounds(args)
    assert rounds.flags == ["--alpha", "3"]
    found = [claim for batch in rounds.batches for claim in load_data_file(batch)[1]]
    assert sorted((c.question, c.choice, c.gold) for c in found) == sorted(
        [("q0", "a", True), ("q0", "b", False), ("q1", "a", False), ("q1", "b", True)]
        + [(f"p{n}", "x", n % 2 == 1) for n in range(1, 5)]
    )
    assert all(len(load_data_file(batch)[1]) == 4 for batch in rounds.batches)


async def test_the_same_command_goes_on_after_a_failure(loop: Loop, tmp_path: Path) -> None:
    switch = tmp_path / "broken"
    switch.touch()
    flaky = (
        f"{shlex.quote(sys.executable)} -c 'import os, shutil, sys; "
        "os.path.exists(sys.argv[3]) and sys.exit(7); shutil.copytree(*sys.argv[1:3])' "
        f"{{model}} {{output}} {shlex.quote(str(switch))}"
    )
    code, _, err = await loop(train=flaky)
    assert code == 1
    assert "training model 1 ended with exit code 7" in err
    switch.unlink()
    (loop.out / "model-1.partial").mkdir()  # what an interrupted training leaves
    code, _, err = await loop(train=flaky)
    assert code == 0, err
    assert loop.note.read_text().split() == ["base-model", "model-1", "model-2"]  # batch 1 was not asked for again
    assert not list(loop.out.glob("*.partial"))


async def test_axolotl_gets_segments_that_begin_as_the_model_wants(loop: Loop) -> None:
    code, _, err = await loop("--trainer", "axolotl", "--rounds", "2")
    assert code == 0, err
    first = json.loads((loop.out / "train-1.jsonl").read_text().splitlines()[0])
    assert first["segments"][0]["text"].startswith("<s>Question: Is ")
    assert first["segments"][1]["text"] in (" True", " False")
    assert yaml.safe_load((loop.out / "train-1.yaml").read_text())["base_model"] == str(loop.model)


async def test_bad_input_and_trainers_that_write_nothing(loop: Loop) -> None:
    code, _, err = await loop(train="true")
    assert (code, "left nothing in" in err) == (1, True)
    code, _, err = await loop(train="no-such-command")
    assert (code, "begun with another --train" in err) == (2, True)
    code, _, err = await loop("--batch_size", "1")
    assert (code, "--batch_size must be at least 2" in err) == (2, True)
    code, _, err = await loop("--out", str(loop.out / "new"), train="no-such-command {output}")
    assert (code, "no-such-command cannot be run" in err) == (1, True)


async def test_rounds_of_a_testbed_file_keep_its_columns_values_and_three_labels(tmp_path: Path) -> None:
    testbed = tmp_path / "moods.yaml"
    testbed.write_text(
        "data: reviews.csv\ncolumns: {choice: text, label: stars}\ntemplate: 'Review: {choice}\\nThe review is'\n"
        "labels: [negative, neutral, positive]\nmap: {label: {1: negative, 2: neutral, 3: positive}}\ngroups: none\n"
    )
    written = "".join(f"A review of thing {at},{at % 3 + 1}\n" for at in range(24))
    (tmp_path / "reviews.csv").write_text("text,stars\n" + written)
    async with FakeVLLM(distribution=Model(MOODS)) as server:
        loop = Loop(server.url, tmp_path)
        loop.source = ("--testbed", str(testbed))
        code, _, err = await loop()
        assert code == 0, err
        assert loop.note.read_text().split() == ["base-model", "model-1", "model-2"]
        batch = json.loads((loop.out / "batch-1" / "claims.json").read_text())
        assert set(batch[0]) == {"text", "stars"}
        completions = {json.loads(line)["completion"] for line in (loop.out / "train-2.jsonl").read_text().splitlines()}
        assert completions <= set(MOODS.texts)
        assert len(completions) > 1
        labels = [json.loads(line) for line in (loop.out / "labels.jsonl").read_text().splitlines()]
        assert len({row["choice"] for row in labels}) == 24
        assert {row["gold"] for row in labels} == set(MOODS.names)
        assert {row["label"] for row in labels} <= set(MOODS.names)
        # Another template is another experiment; a claim's file in place of the testbed's own is another one too.
        testbed.write_text(testbed.read_text().replace("The review is", "It is"))
        code, _, err = await loop()
        assert (code, "begun with another --testbed" in err) == (2, True)
        (tmp_path / "others.csv").write_text("text,stars\n" + written.replace("thing", "place"))
        code, _, err = await loop("--data", str(tmp_path / "others.csv"))
        assert (code, "begun with other data" in err) == (2, True)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ((), "name your claims"),
        (("--testbed", "nothing"), "or a file: mine.yaml"),
        (("--testbed", "builtin"), "builtin has no file"),
        (("--testbed", "gsm8k", "--data", "x.json"), "gsm8k is none"),
    ],
)
def test_one_source_of_claims_is_named(
    source: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*source, "--model", "m", "--train", "t", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
