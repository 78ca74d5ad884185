"""What a run says before it asks: claims, groups, constraints, type, tokens, and one prompt as the model gets it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from core.llm_api.engines.external import ExternalAPI
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from fakes.vllm_server import BOS, FALSE, TRUE, FakeVLLM, encode
from src.experiments.ICM import build_parser
from src.experiments.loading import pool_of, pools_of
from src.experiments.request import RunRequest
from src.pipeline.labelling import Labelling
from src.pipeline.opening import example_prompt, opening, prompt_line, prompt_lines

Open = Callable[..., AbstractAsyncContextManager[Labelling]]


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(trees=True, dtype="float32") as fake:
        yield fake


@pytest.fixture
def opened(server: FakeVLLM) -> Open:
    @asynccontextmanager
    async def opened(*flags: str) -> AsyncIterator[Labelling]:
        async with ModelAPI(VLLMClient(server.url, server.model)) as api:
            request = RunRequest.of(build_parser().parse_args(["--model", server.model, *flags]))
            yield await Labelling.open(pool_of(request), api)

    return opened


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def solutions() -> list[dict[str, Any]]:
    """Groups of 2 and 3 with equal and unequal final answers."""
    answers = {"a": ["1", "1", "2"], "b": ["5", "6"]}
    return [
        {"question": f"Sum {group}?", "choice": f"It is {answer} ({at}).", "answer": answer, "consistency_id": group}
        for group, given in answers.items()
        for at, answer in enumerate(given)
    ]


async def test_groups_and_constraints_are_counted_by_kind(opened: Open, tmp_path: Path) -> None:
    data = write(tmp_path / "sums.jsonl", solutions())
    async with opened("--data", str(data), "--batch_size", "8") as labelling:
        told = opening(labelling, await labelling.token_record(), "sums.jsonl", 8)
    assert told[0] == "data    sums.jsonl: all 5 claims (--batch_size 8; the file has no more)"
    assert told[1] == (
        "groups  2 groups of 2 to 3 claims, made by the column consistency_id; "
        "constraints: 1 x agree, 3 x at most one is true"
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "groups  1 group of 6 claims, made by the column question; constraints: none"),
        (["--group_by", "none"], "groups  none, each of the 6 claims stands by itself; constraints: none"),
    ],
)
async def test_what_made_the_groups_is_said_and_that_nothing_binds_them(
    opened: Open, tmp_path: Path, flags: list[str], told: str
) -> None:
    data = write(tmp_path / "own.jsonl", [{"question": "Which?", "choice": f"choice {n}"} for n in range(6)])
    async with opened("--data", str(data), *flags) as labelling:
        assert opening(labelling, await labelling.token_record(), "own.jsonl", 256)[1] == told


async def test_rows_that_were_left_out_are_counted(opened: Open, tmp_path: Path) -> None:
    rows = [{"question": f"Which {n}?", "choice": None if n == 2 else f"choice {n}"} for n in range(6)]
    data = write(tmp_path / "own.jsonl", rows)
    async with opened("--data", str(data), "--skip_bad_rows", "--batch_size", "5") as labelling:
        [line, *_] = opening(labelling, await labelling.token_record(), "own.jsonl", 5)
    assert line == "data    own.jsonl: all 5 claims; 1 row left out that cannot be used"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch_size", "64"], "builtin: 64 of 256 claims, the other 192 left without a label"),
        (["--batch_size", "64", "--label_rest"], "the other 192 labelled afterwards from their labels"),
        (["--batch_size", "256"], "builtin: all 256 claims"),
        (["--batch_size", "1000"], "builtin: all 256 claims (--batch_size 1000; the file has no more)"),
    ],
)
async def test_how_much_of_the_file_is_labelled(opened: Open, flags: list[str], told: str) -> None:
    async with opened("--testbed", "builtin", *flags) as labelling:
        [line, *_] = opening(labelling, await labelling.token_record(), "builtin", int(flags[1]))
    assert line.endswith(told)


async def test_batches_are_counted_together(opened: Open, server: FakeVLLM) -> None:
    flags = ["--testbed", "builtin", "--batch_size", "64"]
    pools = pools_of(RunRequest.of(build_parser().parse_args(["--model", server.model, *flags])), 3)
    async with opened(*flags) as labelling:
        told = opening(labelling, await labelling.token_record(), "builtin", 64, pools)
    assert told[0].endswith("192 of 256 claims in 3 batches, the other 64 left without a label")
    assert "96 groups of 2 claims" in told[1]
    assert "constraints: 96 x exactly one is true" in told[1]


async def test_labels_of_a_testbed_are_listed_in_its_order(opened: Open) -> None:
    testbed = Path(__file__).resolve().parents[2] / "docs" / "examples" / "sentiment.yaml"
    async with opened("--testbed", str(testbed), "--batch_size", "12") as labelling:
        *_, line = opening(labelling, await labelling.token_record(), "sentiment", 12)
        texts = labelling.book.labels.texts
    told = line.partition(";")[0]
    assert len(texts) == 3
    places = [told.index(repr(text)) for text in texts]
    assert places == sorted(places)


async def test_type_and_tokens_are_those_that_the_server_is_asked_with(opened: Open, server: FakeVLLM) -> None:
    async with opened("--testbed", "builtin", "--batch_size", "16") as labelling:
        *_, model, labels = opening(labelling, await labelling.token_record(), "builtin", 16)
    assert model == f"model   {server.model} on vllm {server.version}, computes in float32"
    assert labels.startswith(f"labels  ' True' {TRUE} and ' False' {FALSE}; a prompt begins with '<bos>' {BOS}; ")
    [positive, colon, newline] = encode("Positive:\n")
    ending = f"'Positive' {positive} ':' {colon} ' True' {TRUE} '\\n' {newline} '\\n' {newline}"
    assert labels.endswith(ending)


async def test_a_gateway_that_turns_no_tokens_into_text_has_their_numbers_shown(opened: Open, server: FakeVLLM) -> None:
    server.detokenizes = False
    async with opened("--testbed", "builtin", "--batch_size", "16") as labelling:
        labels = opening(labelling, await labelling.token_record(), "builtin", 16)[3]
    [positive, colon, newline] = encode("Positive:\n")
    assert labels.endswith(f"{positive} {colon} {TRUE} {newline} {newline}")


async def test_a_server_that_does_not_tell_its_type_is_said_not_to(opened: Open, server: FakeVLLM) -> None:
    server.dtype = ""
    async with opened("--testbed", "builtin", "--batch_size", "16") as labelling:
        assert opening(labelling, await labelling.token_record(), "builtin", 16)[2].endswith("an unknown type")


@pytest.mark.parametrize("layout", [[], ["--layout", "upstream"]])
async def test_the_prompt_is_one_that_the_check_asks(opened: Open, server: FakeVLLM, layout: list[str]) -> None:
    async with opened("--testbed", "builtin", "--batch_size", "16", *layout) as labelling:
        prompt = example_prompt(labelling)
    server.trees = False  # so that it is sent every prompt as a list of tokens
    async with opened("--testbed", "builtin", "--batch_size", "16", *layout) as labelling:
        await labelling.check()
    asked = [tokens for body in server.pools for tokens in body["prompt"]]
    assert prompt.token_ids in asked
    assert prompt.token_ids == [BOS, *encode(prompt.text)]


async def test_a_capped_prompt_has_no_more_demonstrations_than_the_cap(opened: Open) -> None:
    async with opened("--testbed", "builtin", "--batch_size", "16", "--context_cap", "4") as labelling:
        prompt = example_prompt(labelling)
    assert prompt.text.count("Review: ") == 4 + 1


async def test_a_long_prompt_is_shortened_and_whole_where_it_is_wanted_so(opened: Open) -> None:
    async with opened("--testbed", "builtin", "--batch_size", "64") as labelling:
        prompt = example_prompt(labelling)
        short = prompt_lines(labelling, prompt, whole=False)
        whole = prompt_lines(labelling, prompt, whole=True)
        line = prompt_line(labelling, prompt, "here:")
    assert short[-1] == whole[-1] == "  | Positive:[ True| False]"
    assert [text for text in short if "more demonstrations" in text] == ["  | [... 61 more demonstrations ...]"]
    assert len(short) == 10
    assert short[:2] == whole[:2]
    assert short[-5:] == whole[-5:]
    assert "\n".join(text[4:] for text in whole) == prompt.text + "[ True| False]"
    assert f"after 63 demonstrations with random labels, {prompt.num_tokens:,} tokens; here:" in line


async def test_a_claim_cannot_write_to_the_terminal_nor_fill_it(opened: Open, tmp_path: Path) -> None:
    rows = [{"question": f"\x1b[2J\r{n}?", "choice": f"x{n}" + "long " * 400} for n in range(3)]
    data = write(tmp_path / "long.jsonl", rows)
    async with opened("--data", str(data)) as labelling:
        prompt = example_prompt(labelling)
        told = "\n".join(prompt_lines(labelling, prompt, whole=False))
    assert "\x1b" not in told
    assert "\\x1b[2J\\r" in told
    assert len(told) < 3000
    assert "characters ...]" in told
    assert told.endswith("I think this claim is[ True| False]")
    assert "\x1b" in prompt.text  # the model is asked what the file says


async def test_an_api_that_is_asked_in_text_has_text_shown(server: FakeVLLM) -> None:
    async with ModelAPI(ExternalAPI(server.url + "/v1", server.model)) as api:
        request = RunRequest.of(
            build_parser().parse_args(["--testbed", "builtin", "--batch_size", "16", "--model", server.model])
        )
        labelling = await Labelling.open(pool_of(request), api)
        labels = opening(labelling, await labelling.token_record(), "builtin", 16)[3]
        prompt = example_prompt(labelling)
        line = prompt_line(labelling, prompt, "")
    assert labels == "labels  ' True' and ' False', asked in text; a demonstration ends in 'Positive: True\\n\\n'"
    assert f"{len(prompt.text):,} characters" in line
