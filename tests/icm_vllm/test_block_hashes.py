from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icm_vllm import block_hashes
from icm_vllm.block_hashes import RememberingHasher
from icm_vllm.prefixes import STRIDE, common_prefix

BLOCK = 4
TOKENS = st.lists(st.integers(0, 1), max_size=30)


@dataclass(frozen=True)
class Adapter:
    """What vLLM's hashers look at of its LoRARequest."""

    lora_name: str
    lora_path: str


@dataclass
class Request:
    """What vLLM's hashers look at of its Request."""

    prompt_token_ids: list[int]
    output: list[int] = field(default_factory=list)
    block_hashes: list[int] = field(default_factory=list)
    mm_features: list[str] = field(default_factory=list)
    lora_request: Adapter | None = None
    cache_salt: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output)


class PlainHasher:
    """Hashes chained over the prefix, as vLLM's; counts its work."""

    def __init__(self) -> None:
        self.blocks = 0

    def __call__(self, request: Request) -> list[int]:
        hashes = list(request.block_hashes)
        tokens = [*request.prompt_token_ids, *request.output]
        new = []
        for start in range(len(hashes) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
            parent = (hashes + new)[-1] if hashes + new else 0
            new.append(hash((parent, request.lora_request, request.cache_salt, *tokens[start : start + BLOCK])))
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


@pytest.mark.parametrize("salt", [{"cache_salt": "s"}, {"lora_request": Adapter("tuned", "/a")}], ids=["salt", "LoRA"])
def test_a_salted_request_takes_over_nothing_and_leaves_nothing(salt: dict[str, Any]) -> None:
    remembering = RememberingHasher(PlainHasher(), BLOCK)
    tokens = list(range(12))
    remembering(Request(tokens))
    salted = remembering(Request(tokens, **salt))
    assert salted == PlainHasher()(Request(tokens, **salt)) != PlainHasher()(Request(tokens))
    assert remembering(Request(tokens)) == PlainHasher()(Request(tokens))


@pytest.mark.parametrize(
    "request_", [Request(list(range(12)), block_hashes=[1, 2]), Request([0, 1, 2], output=[3])], ids=["later", "short"]
)
def test_a_request_that_generates_is_left_to_vllm_and_forgotten(request_: Request) -> None:
    remembering = RememberingHasher(PlainHasher(), BLOCK)
    remembering(Request([9] * 12))
    before = remembering._last
    assert remembering(request_) == PlainHasher()(request_)
    assert remembering._last is before


def test_two_threads_never_mix_one_prompt_with_anothers_hashes() -> None:
    """The receiving thread may be anywhere in its call when the scheduling thread makes one."""
    prompts = [[n] * 8 + list(range(64)) for n in range(4)]
    remembering = RememberingHasher(PlainHasher(), BLOCK)
    wrong: list[int] = []

    def ask(numbers: list[int]) -> None:
        for number in numbers:
            if remembering(Request(prompts[number])) != PlainHasher()(Request(prompts[number])):
                wrong.append(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=([start, (start + 1) % 4] * 300,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_installed_in_vllm_of_both_ways_to_ask_for_a_hasher(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.33 says how many tokens after its block a hash covers, too; only the usual none of them is ours."""
    core = ModuleType("vllm.v1.engine.core")

    def make(block_size: int, hash_function: object, lookahead: int = 0) -> Callable[[Request], list[int]]:
        return PlainHasher()

    core.get_request_block_hasher = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", core)
    block_hashes.install()
    assert isinstance(core.get_request_block_hasher(BLOCK, hash), RememberingHasher)
    assert isinstance(core.get_request_block_hasher(BLOCK, hash, 0), RememberingHasher)
    assert isinstance(core.get_request_block_hasher(BLOCK, hash, 1), PlainHasher)
