from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.llm_api.http.pool_tree import tree_of
from core.llm_api.types import Prompt, Segment, common
from icm_vllm.prompt_tree import read_request
from src.icm.prefix_tree import TreeLayout
from src.icm.prompts import PromptBook
from tests.core.two_labels import two

SEGMENTS = [Segment(str(i), list(range(i, i + 1 + i % 3))) for i in range(6)]
PATHS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=12)


@given(PATHS)
def test_a_tree_gives_back_every_prompt(paths: list[list[int]]) -> None:
    prompts = [Prompt(tuple(SEGMENTS[i] for i in path)) for path in paths]
    body = orjson.dumps({"labels": [3, 4], "tree": tree_of(prompts)})
    tree, labels, adapter = read_request(body)
    assert (labels, adapter) == ([3, 4], None)
    whole = [ids for ids, _ in tree.prompts()]
    assert whole == [prompt.token_ids for prompt in prompts]
    before: list[int] = []
    for (ids, shared), path, last in zip(tree.prompts(), paths, [[], *paths], strict=False):
        assert ids[:shared] == before[:shared]
        assert shared == sum(len(SEGMENTS[i].tokens) for i in path[: common(path, last)])
        before = ids
    assert tree.lengths() == [prompt.num_tokens for prompt in prompts]
    assert len(tree.parents) == len({tuple(path[: end + 1]) for path in paths for end in range(len(path))})


def test_a_pool_of_256_is_some_hundred_kilobytes() -> None:
    """What it is for: bytes grow with N, not with N * N."""
    sizes = {}
    for n in (128, 256):
        rng = np.random.default_rng(n)
        tokens = [rng.integers(0, 128_000, 40).tolist() for _ in range(n)]
        labels = two(1, 2)
        book = PromptBook.build([str(i) for i in range(n)], labels, tokens=tokens, separator_tokens=[3])
        layout = TreeLayout.build(range(n), [str(i) for i in range(n)], rng)
        prompts = [book.prompt(claim, layout.context(claim), [True] * n) for claim in layout.questions]
        sizes[n] = len(orjson.dumps({"labels": labels.asked.ids, "tree": tree_of(prompts)}))
        assert sizes[n] < sum(len(prompt.json) for prompt in prompts) / n * 2.5
    assert sizes[256] < 220_000
    assert sizes[256] < sizes[128] * 2.3


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="claim 3"):
        tree_of([Prompt((Segment("text"),), name="claim 3")])


GOOD: dict[str, Any] = {"segments": [[5], [6, 7]], "parents": [-1, 0], "pieces": [0, 1], "ends": [1]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree: tree.update(parents=[-1, 1]),  # a circle
        lambda tree: tree.update(parents=[-2, 0]),
        lambda tree: tree.update(parents=[-1]),
        lambda tree: tree.update(pieces=[0, 2]),
        lambda tree: tree.update(pieces=[0, -1]),
        lambda tree: tree.update(ends=[2]),
        lambda tree: tree.update(ends=[]),
        lambda tree: tree.update(ends=[True]),
        lambda tree: tree.update(ends=[1] * 1025),
        lambda tree: tree.update(segments=[[5], []]),
        lambda tree: tree.update(segments=[[5], [-6]]),
        lambda tree: tree.update(segments=[[5], ["6"]]),
        lambda tree: tree.update(segments="5"),
        lambda tree: tree.pop("parents"),
    ],
)
def test_a_malformed_tree_is_refused(damage: Callable[[dict[str, Any]], object]) -> None:
    tree = dict(GOOD)
    damage(tree)
    with pytest.raises(ValueError, match=r"."):
        read_request(json.dumps({"labels": [1, 2], "tree": tree}).encode())


@pytest.mark.parametrize("labels", [[7], [7, 9], [9, 7, 0], [*range(20)]])
def test_any_number_of_tokens_is_asked_for(labels: list[int]) -> None:
    assert read_request(json.dumps({"labels": labels, "tree": GOOD}).encode())[1] == labels


@pytest.mark.parametrize("labels", [[], [1, 2, 1], [1, -2], [1, "2"], [True, 2], [*range(21)], 7, None])
def test_tokens_that_are_none_are_refused(labels: object) -> None:
    with pytest.raises(ValueError, match="labels must be 1 to 20 different token ids"):
        read_request(json.dumps({"labels": labels, "tree": GOOD}).encode())


def test_an_adapter_is_named_or_left_out() -> None:
    of_base = {"labels": [1, 2], "tree": GOOD}
    assert read_request(json.dumps({**of_base, "adapter": "tuned"}).encode())[2] == "tuned"
    assert read_request(json.dumps({**of_base, "adapter": None}).encode())[2] is None
    for name in ("", 7, ["tuned"], True):
        with pytest.raises(ValueError, match="adapter must be the name"):
            read_request(json.dumps({**of_base, "adapter": name}).encode())


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b"", b"[]", b"{", b'{"labels": [1]}', b'{"labels": [1, 1]}', b'{"labels": [1, 2]}']
)
def test_a_malformed_request_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_request(body)
