from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from core.vllm_extension.block_hashes import RememberingHasher
from core.vllm_extension.prefixes import STRIDE, common_prefix

BLOCK = 4
TOKENS = st.lists(st.integers(0, 1), max_size=30)


@dataclass
class Request:
    """What vLLM's hashers look at of its Request."""

    prompt_token_ids: list[int]
    block_hashes: list[int] = field(default_factory=list)
    mm_features: list[str] = field(default_factory=list)
    lora_request: str | None = None
    cache_salt: str | None = None


class PlainHasher:
    """Hashes chained over the prefix, as vLLM's; counts its work."""

    def __init__(self) -> None:
        self.blocks = 0

    def __call__(self, request: Request) -> list[int]:
        hashes = list(request.block_hashes)
        new = []
        for start in range(len(hashes) * BLOCK, len(request.prompt_token_ids) - BLOCK + 1, BLOCK):
            parent = (hashes + new)[-1] if hashes + new else 0
            new.append(hash((parent, request.cache_salt, *request.prompt_token_ids[start : start + BLOCK])))
            self.blocks += 1
        return new


@given(TOKENS, TOKENS)
def test_common_prefix(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == expected
    # The same behind whole strides that agree.
    assert common_prefix([7] * (2 * STRIDE) + a, [7] * (2 * STRIDE) + b) == 2 * STRIDE + expected


@given(st.lists(TOKENS, max_size=8))
def test_the_hashes_are_the_plain_ones(prompts: list[list[int]]) -> None:
    remembering = RememberingHasher(PlainHasher(), BLOCK)
    for tokens in prompts:
        request = Request(tokens)
        assert remembering(request) == PlainHasher()(Request(tokens))
        assert request.block_hashes == []


def test_a_shared_prefix_is_hashed_once() -> None:
    plain = PlainHasher()
    remembering = RememberingHasher(plain, BLOCK)
    for last in range(10):
        remembering(Request([*range(100), last]))
    assert plain.blocks == 25


def test_a_salted_request_takes_over_nothing_and_leaves_nothing() -> None:
    remembering = RememberingHasher(PlainHasher(), BLOCK)
    tokens = list(range(12))
    remembering(Request(tokens))
    salted = remembering(Request(tokens, cache_salt="s"))
    assert salted == PlainHasher()(Request(tokens, cache_salt="s"))
    assert remembering(Request(tokens)) == PlainHasher()(Request(tokens))


def test_a_continued_request_is_left_to_vllm() -> None:
    request = Request(list(range(12)), block_hashes=[1, 2])
    assert RememberingHasher(PlainHasher(), BLOCK)(request) == PlainHasher()(request)
    assert request.block_hashes == [1, 2]
