"""Against a real vLLM server on the CPU with a real small model: what the tree saves, and a whole run."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from core.cpu import fast_type
from core.errors import RequestRejected
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.labels import LabelSpace
from core.llm_api.llm import ModelAPI
from core.llm_api.tokens import pieces, spell_labels
from core.llm_api.types import NextTokens, Prompt, Query, Segment
from icm_vllm.prompt_tree import PATH
from src.icm.prefix_tree import Layout, TreeLayout, UpstreamLayout
from src.icm.prompts import PromptBook
from src.pipeline.tree_saving import found_in_blocks
from tests.conftest import RunningServer

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).resolve().parents[2]

SUBJECTS = [
    "The capital of a country",
    "A glass of cold water",
    "The oldest tree in a park",
    "My neighbour's small dog",
]
BLOCK = 32  # tokens of a KV-cache block of the local server
CLAIMS = ["is heavier than a train", "can be seen from far away", "was mentioned in the news", "makes people happy"]


async def book_of(api: ModelAPI, size: int) -> tuple[PromptBook, list[bool]]:
    """`size` claims of some 40 tokens, all different, with random labels."""
    rng = random.Random(size)
    texts = [
        f"Question: What do you know about number {i}, which somebody chose at random for this list of claims?\n"
        f"Claim: {rng.choice(SUBJECTS)} {rng.choice(CLAIMS)}, {rng.randint(100, 999)} times a year.\n"
        "I think this claim is"
        for i in range(size)
    ]
    book = await PromptBook.open(api, texts)
    return book, [rng.random() < 0.5 for _ in texts]


def prompts_of(book: PromptBook, layout: Layout, labels: list[bool]) -> list[Prompt]:
    return [book.prompt(claim, layout.context(claim), labels) for claim in layout.questions]


async def test_the_tree_computes_every_distinct_block_once_and_so_less_than_upstreams_order(
    vllm_server: RunningServer,
) -> None:
    """To the token, at 16 claims."""
    size = 16
    async with ModelAPI(VLLMClient(vllm_server.url, vllm_server.model)) as api:
        book, labels = await book_of(api, size)
        tree = TreeLayout.build(range(size), [str(i) for i in range(size)], np.random.default_rng(0))
        computed, expected = {}, {}
        seen: set[tuple[int, ...]] = set()  # the second layout may begin with a block of the first
        for name, layout in (("tree", tree), ("upstream", UpstreamLayout.build(range(size)))):
            before = await api.prefix_cache()
            scores = await api.score(prompts_of(book, layout, labels), await api.spell_labels())
            after = await api.prefix_cache()
            assert before is not None
            assert after is not None
            assert len(scores.logprobs) == size
            delta = after - before
            assert delta.queries == sum(prompt.num_tokens for prompt in prompts_of(book, layout, labels))
            computed[name] = delta.computed
            expected[name] = tokens_to_compute(prompts_of(book, layout, labels), seen)
        print(f"computed tokens at N = {size}: {computed}")
        assert computed == expected
        # What the server does at 16 claims is arithmetic at 64, where the tree must save three quarters.
        book, labels = await book_of(api, 64)
        tree = TreeLayout.build(range(64), [str(i) for i in range(64)], np.random.default_rng(0))
        of_tree, of_upstream = (
            tokens_to_compute(prompts_of(book, layout, labels), set())
            for layout in (tree, UpstreamLayout.build(range(64)))
        )
        assert of_tree <= of_upstream / 4


def tokens_to_compute(prompts: list[Prompt], seen: set[tuple[int, ...]]) -> int:
    """Tokens that a prefix cache of whole blocks leaves to compute: at most all but a prompt's last token is found.

    seen: beginnings of prompts that are cached, which the prompts' own are added to.
    """
    computed = 0
    for prompt in prompts:
        ids = tuple(prompt.token_ids)
        beginnings = [ids[:end] for end in range(BLOCK, len(ids) + 1, BLOCK)]
        known = [len(beginning) for beginning in beginnings if beginning in seen and len(beginning) < len(ids)]
        computed += len(ids) - max(known, default=0)
        seen.update(beginnings)
    return computed


async def test_an_appended_label_costs_little_more_than_itself(vllm_server: RunningServer) -> None:
    size = 24
    async with ModelAPI(VLLMClient(vllm_server.url, vllm_server.model)) as api:
        book, labels = await book_of(api, size)
        layout = TreeLayout.build(range(size - 1), [str(i) for i in range(size)], np.random.default_rng(0), anchors=4)
        tokens = await api.spell_labels()
        await api.score(prompts_of(book, layout, labels), tokens)
        before = await api.prefix_cache()
        await api.score(prompts_of(book, layout.append(size - 1), labels), tokens)
        after = await api.prefix_cache()
        assert before is not None
        assert after is not None
        demonstration = max(len(true) for _, true in book.demonstrations)
        question = max(map(len, book.questions))
        # Cached prefixes end on block borders, up to a block before the appended demonstration.
        assert (after - before).computed <= size * (demonstration + question + BLOCK)


async def test_a_demonstration_has_the_tokens_of_the_whole_text(vllm_server: RunningServer) -> None:
    async with ModelAPI(VLLMClient(vllm_server.url, vllm_server.model)) as api:
        book, labels = await book_of(api, 4)
        prompt = book.prompt(0, (1, 2, 3), labels)
        [whole] = await api.tokenize([prompt.text], special=True) or [[]]
        assert prompt.token_ids == whole
        demonstration = book.demonstrations[0][True]
        told = await pieces(api, demonstration.tokens or ()) or []
        assert "".join(told) == demonstration.text
        assert told[-1 - len(book.separator)] == " True"


async def test_scores_follow_their_prompts_whatever_the_order(vllm_server: RunningServer) -> None:
    async with ModelAPI(VLLMClient(vllm_server.url, vllm_server.model)) as api:
        texts = [f"Review: {word}.\nPositive:" for word in ("Wonderful", "Terrible", "Great", "Awful", "Superb", "Bad")]
        book = await PromptBook.open(api, texts)
        labels = book.labels
        prompts = [book.prompt(i, (), ()) for i in range(len(texts))]
        forward = np.array((await api.score(prompts, labels)).log_odds)
        backward = np.array((await api.score(prompts[::-1], labels)).log_odds)[::-1]
        assert (forward == backward).all()
        assert np.abs(forward[:, None] - forward[None, :]).max() > 0.3


SPACES = {
    "four letters": LabelSpace(("A", "B", "C", "D"), (" A", " B", " C", " D")),
    "three words": LabelSpace(("bad", "fair", "good"), (" bad", " fair", " good")),
    "several tokens": LabelSpace(
        ("very bad", "very good", "good", "good enough"), (" very bad", " very good", " good", " good enough")
    ),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
async def test_labels_of_any_number_and_length(vllm_server: RunningServer, space: LabelSpace) -> None:
    """log P of each is the sum of its tokens' own, asked one by one; a beginning costs what no block of it holds."""
    client = VLLMClient(vllm_server.url, vllm_server.model)
    async with ModelAPI(client) as api:
        asked = " or ".join(space.names)  # first, so that nothing of another space's prompts is cached
        texts = [f"Is it {asked}? " + f"{film} {verdict}. " * 3 + "It is" for film in SUBJECTS for verdict in CLAIMS]
        book = await PromptBook.open(api, texts, space=space)
        labels = book.labels
        layout = TreeLayout.build(range(16), [str(at) for at in range(16)], np.random.default_rng(2))
        marks = [at % len(space) for at in range(16)]
        prompts = [book.prompt(claim, layout.context(claim), marks, layout.place(claim)) for claim in layout.questions]
        sent = [query.prompt.token_ids for query in labels.queries(prompts)]
        before = await api.prefix_cache()
        scores = await api.score(prompts, labels)
        after = await api.prefix_cache()
        assert before is not None
        assert after is not None
        assert (after - before).queries == scores.prompt_tokens == sum(map(len, sent))
        assert (after - before).hits == found_in_blocks(sent, BLOCK)
        assert labels.tokens is not None
        for prompt, found in list(zip(prompts, scores.logprobs.tolist(), strict=True))[::15]:
            for label, ids in enumerate(labels.tokens):
                goes_on = any(other != ids and other[: len(ids)] == ids for other in labels.tokens)
                whole = (*ids, *(book.separator.tokens or ())[:1]) if goes_on else ids
                total = 0.0
                for at, token in enumerate(whole):
                    begun = Prompt((*prompt.segments, *([Segment("", whole[:at])] if at else [])))
                    [answer] = (await client.score([Query(begun, NextTokens(("",), (token,)))])).logprobs
                    total += answer.values[0]
                assert found[label] == pytest.approx(total, abs=1e-5)


async def test_the_servers_extension_scores_as_completions_do(vllm_server: RunningServer) -> None:
    """Bitwise the same by both ways."""
    async with ModelAPI(VLLMClient(vllm_server.url, vllm_server.model)) as api:
        book, labels = await book_of(api, 12)
        layout = TreeLayout.build(range(12), [str(i) for i in range(12)], np.random.default_rng(1))
        prompts = prompts_of(book, layout, labels)[:4]
        tokens = await api.spell_labels()
        await api.score(prompts, tokens)
    tree = VLLMClient(vllm_server.url, vllm_server.model)
    plain = VLLMClient(vllm_server.url, vllm_server.model, use_extension=False)
    try:
        await tree.start()
        await plain.start()
        assert tree.takes_trees
        assert not plain.takes_trees
        for prompt in prompts:
            whole, short = await plain.score(tokens.queries([prompt])), await tree.score(tokens.queries([prompt]))
            assert short.logprobs == whole.logprobs
            assert short.prompt_tokens == whole.prompt_tokens == prompt.num_tokens
    finally:
        await tree.aclose()
        await plain.aclose()


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", ""),
        (b'{"labels": [1, 2], "tree": {}}', "segments"),
        (b'{"labels": [1, 2], "tree": {"segments": [[5]], "parents": [-1], "pieces": [1], "ends": [0]}}', "no segment"),
        (b'{"labels": [1, 2], "tree": {"segments": [[5]], "parents": [-1], "pieces": [0], "ends": [3]}}', "no node"),
        (b'{"labels": [1, 2], "tree": {"segments": [[99999999]], "parents": [-1], "pieces": [0], "ends": [0]}}', ""),
        (b'{"labels": [1, 99999999], "tree": {"segments": [[5]], "parents": [-1], "pieces": [0], "ends": [0]}}', ""),
        (
            b'{"labels": [1, 2], "tree": {"segments": [[5%b]], "parents": [-1], "pieces": [0], "ends": [0]}}'
            % (b",5" * 9000),
            "9001 tokens",
        ),
    ],
)
async def test_the_extension_refuses_what_it_cannot_score(
    vllm_server: RunningServer, body: bytes, complaint: str
) -> None:
    async with aiohttp.ClientSession() as session, session.post(vllm_server.url + PATH, data=body) as response:
        assert response.status == 400
        assert complaint in (await response.json())["error"]["message"]


async def test_a_client_that_leaves_stops_its_pool(vllm_server: RunningServer) -> None:
    async with ModelAPI(VLLMClient(vllm_server.url, vllm_server.model)) as api:
        book, labels = await book_of(api, 96)
        # Upstream's order: minutes of work, were it not aborted.
        prompts = prompts_of(book, UpstreamLayout.build(range(96)), [not label for label in labels])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await api.score(prompts, await api.spell_labels())
    await idle(vllm_server)


async def counted(server: RunningServer, *names: str) -> list[float]:
    """The metrics of these names now, each summed over its labels."""
    async with aiohttp.ClientSession() as session, session.get(server.url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return [sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{")) for name in names]


async def idle(server: RunningServer) -> None:
    """Until no request is in the engine; at most 20 seconds."""
    async with asyncio.timeout(20):
        while sum(await counted(server, "num_requests_running", "num_requests_waiting")):
            await asyncio.sleep(0.2)


async def test_a_pool_counts_in_the_servers_metrics(vllm_server: RunningServer) -> None:
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "e2e_request_latency_seconds_count",
    )
    pool = random_pool(np.random.default_rng(5))
    async with aiohttp.ClientSession(vllm_server.url) as session:
        before = await counted(vllm_server, *names)
        async with session.post(PATH, json=pool) as response:
            answer = await response.json()
        after = await counted(vllm_server, *names)
    asked = len(answer["logprobs"])
    assert [now - then for now, then in zip(after, before, strict=True)] == [
        answer["prompt_tokens"],
        asked,
        asked,
        asked,
    ]


def random_pool(rng: np.random.Generator) -> dict[str, object]:
    """A request for the route of trees: random words on random branches, prompts in no order."""
    nodes = int(rng.integers(5, 30))
    tree = {
        "segments": [rng.integers(5, 5000, int(rng.integers(1, 30))).tolist() for _ in range(nodes)],
        "parents": [int(rng.integers(-1, node)) for node in range(nodes)],
        "pieces": list(range(nodes)),
        "ends": rng.integers(0, nodes, int(rng.integers(1, 40))).tolist(),
    }
    return {"labels": [100, 200], "tree": tree}


async def test_pools_at_once_are_answered_as_alone_whoever_leaves(vllm_server: RunningServer) -> None:
    rng = np.random.default_rng(4)
    pools = [random_pool(rng) for _ in range(4)]
    left = 0

    async with aiohttp.ClientSession(vllm_server.url) as session:

        async def ask(pool: dict[str, object]) -> object:
            async with session.post(PATH, json=pool) as response:
                assert response.status == 200
                return (await response.json())["logprobs"]

        alone = [await ask(pool) for pool in pools]

        async def ask_often(patience: list[float]) -> None:
            nonlocal left
            for number, seconds in enumerate(patience):
                try:
                    async with asyncio.timeout(seconds):
                        assert await ask(pools[number % 4]) == alone[number % 4]
                except TimeoutError:
                    left += 1

        patiences = rng.choice([0.02, 0.2, 120.0, 120.0], (6, 6)).tolist()
        await asyncio.gather(*map(ask_often, patiences))
    assert 0 < left < 36
    await idle(vllm_server)


async def test_a_server_is_known_again_while_it_computes_a_pool(vllm_server: RunningServer) -> None:
    async with ModelAPI(VLLMClient(vllm_server.url, vllm_server.model)) as api:
        book, labels = await book_of(api, 24)
        prompts = prompts_of(book, UpstreamLayout.build(range(24)), labels)
        scoring = asyncio.create_task(api.score(prompts, await api.spell_labels()))
        fingerprints, meanwhile = [], 0
        while not scoring.done() or not fingerprints:
            client = VLLMClient(vllm_server.url, vllm_server.model)
            fingerprints.append((await client.start()).fingerprint)
            await client.aclose()
            meanwhile += not scoring.done()
        await scoring
        assert meanwhile > 0
        assert set(fingerprints) == {api.identity.fingerprint}
        assert len(api.identity.config) == 64  # the server says how its model is configured


async def test_texts_are_tokenized_by_completing_them_as_by_tokenize(vllm_server: RunningServer) -> None:
    texts = [" True", "", "Question: is 2 more than 1?\nAnswer:", "\n\n", " \u00e9\u4e2d\U0001f600", "x"]
    whole, v1_alone = VLLMClient(vllm_server.url, vllm_server.model), VLLMClient(vllm_server.url, vllm_server.model)
    v1_alone._questions._tokenize_passes = False  # as behind a gateway that answers 404
    try:
        assert await v1_alone.start() == await whole.start()
        for special in (False, True):
            assert await v1_alone.tokenize(texts, special=special) == await whole.tokenize(texts, special=special)
        assert await v1_alone.tokenize_chat(["Is it?"]) == await whole.tokenize_chat(["Is it?"])
    finally:
        await whole.aclose()
        await v1_alone.aclose()


@pytest.mark.parametrize("use_extension", [True, False])
async def test_a_prompt_of_another_vocabulary_is_named_and_the_others_are_kept(
    vllm_server: RunningServer, use_extension: bool
) -> None:
    client = VLLMClient(vllm_server.url, vllm_server.model, use_extension=use_extension)
    try:
        await client.start()
        labels = await spell_labels(client)
        pool = [Prompt((Segment("", [2, 100 + i]),), name=f"claim {i}") for i in range(4)]
        pool[2] = Prompt((Segment("", [10_000_000]),), name="claim of another model")
        kept: list[int] = []
        with pytest.raises(RequestRejected, match=r"'claim of another model', also when asked alone.*vocabulary"):
            await client.score(labels.queries(pool), on_answer=lambda positions, _: kept.extend(positions))
        assert sorted(kept) == [0, 1, 3]
    finally:
        await client.aclose()


async def run_icm(server: RunningServer, folder: Path, *more: str) -> str:
    """A small search on the built-in claims, to its end: what it printed. Its files are in folder/real."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(REPOSITORY / "src" / "experiments" / "ICM.py"), "--testbed", "builtin"),
        *("--model", server.model, "--runs_dir", str(folder), "--run", "real", "--batch_size", "8"),
        *("--num_seed", "4", "--alpha", "50", "--calibrate", "mean", "--patience", "10", "--K", "60", "--quiet", *more),
        env={**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_a_whole_run_labels_its_pool_and_repeats_to_the_last_bit(
    vllm_server: RunningServer, tmp_path: Path
) -> None:
    out = await run_icm(vllm_server, tmp_path / "first", "--lookahead", "0")
    rows = [json.loads(line) for line in (tmp_path / "first/real/labels.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    run = json.loads((tmp_path / "first/real/run.json").read_text())
    assert run["cost"]["tokens_cached"] > 0
    assert run["engine"]["version"]
    assert "ICM_BATCH_INVARIANT=1" in run["engine"]["determinism"]
    if "ICM_TEST_SERVER" not in os.environ:
        assert run["engine"]["dtype"] == fast_type().dtype
    assert "agreement with gold" in out
    # Another folder has another cache of answers: everything is asked again, in other batches, beside other questions.
    await run_icm(vllm_server, tmp_path / "second", "--lookahead", "4")
    first, second = (tmp_path / name / "real/labels.jsonl" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


async def test_the_quick_benchmark_finds_the_token_counts_it_expects(
    vllm_server: RunningServer, tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(REPOSITORY / "benchmarks" / "step.py"), "--quick", "--claim_tokens", "12"),
        *("--server", vllm_server.url, "--model", vllm_server.model, "--json", str(tmp_path / "step.json")),
        env={**os.environ, "ICM_SECRETS": os.devnull},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    print(out.decode())
    assert process.returncode == 0, err.decode()
    assert "hold" in out.decode()
