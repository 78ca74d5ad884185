"""The remembering lookup against a plain one over a cache that loses and refills blocks in between."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from icm_vllm.block_lookup import RememberingLookup

BLOCK = 16


@dataclass(eq=False)
class Block:
    """What vLLM's KVCacheBlock shows of itself."""

    block_hash: bytes | None = None


@dataclass(eq=False)
class Pool:
    """A cache of a few blocks; counts lookups, as vLLM's BlockPool answers them."""

    hash_block_size: int = BLOCK
    blocks: list[Block] = field(default_factory=lambda: [Block() for _ in range(12)])
    lookups: int = 0

    def get_cached_block(self, block_hash: bytes, groups: list[int]) -> list[Block] | None:
        self.lookups += 1
        key = block_hash + bytes(groups)
        found = [block for block in self.blocks if block.block_hash == key]
        return found[:1] or None

    def fill(self, place: int, block_hash: bytes, group: int = 0) -> None:
        key = block_hash + bytes([group])
        if all(block.block_hash != key for block in self.blocks):
            self.blocks[place].block_hash = key


@dataclass(frozen=True)
class Spec:
    block_size: int = BLOCK


def vllms_own(
    block_hashes: list[bytes], max_length: int, kv_cache_group_ids: list[int], block_pool: Pool, **_: Any
) -> Any:
    blocks = []
    for block_hash in block_hashes[: max_length // BLOCK]:
        found = block_pool.get_cached_block(block_hash, kv_cache_group_ids)
        if not found:
            break
        blocks.append(found[0])
    return (blocks,), len(blocks) * BLOCK


def remembering(own: Any = None) -> Any:
    return functools.partial(RememberingLookup(), own or vllms_own)


def ask(find: Any, hashes: list[bytes], pool: Pool, *, length: int = 10**6, group: int = 0, **more: Any) -> Any:
    return find(
        block_hashes=hashes,
        max_length=length,
        kv_cache_group_ids=[group],
        block_pool=pool,
        kv_cache_spec=Spec(),
        **{"drop_eagle_block": False, "alignment_tokens": BLOCK, **more},
    )


HASHES = [bytes([65 + i]) for i in range(6)]
CHAIN = st.lists(st.integers(0, 1), max_size=6)


def chain(path: list[int]) -> list[bytes]:
    """Hashes chained over the prefix, as vLLM's are: equal only where all before is equal."""
    return [bytes(path[: end + 1]) + b"." for end in range(len(path))]


@given(
    st.lists(
        st.tuples(CHAIN, st.lists(st.tuples(st.integers(0, 11), CHAIN), max_size=6), st.integers(0, 120)), max_size=10
    )
)
def test_it_finds_what_vllm_finds(steps: list[tuple[list[int], list[tuple[int, list[int]]], int]]) -> None:
    pool, lookup = Pool(), remembering()
    for path, refills, length in steps:
        for place, other in refills:
            pool.blocks[place].block_hash = None  # evicted
            if other:
                pool.fill(place, chain(other)[-1])
        assert ask(lookup, chain(path), pool, length=length) == ask(vllms_own, chain(path), pool, length=length)


def test_a_shared_prefix_is_looked_up_once() -> None:
    pool, lookup = Pool(), remembering()
    for place, block_hash in enumerate(HASHES):
        pool.fill(place, block_hash)
    assert ask(lookup, HASHES, pool)[1] == 6 * BLOCK
    pool.lookups = 0
    assert ask(lookup, HASHES, pool)[1] == 6 * BLOCK
    assert pool.lookups == 0
    pool.blocks[2].block_hash = None
    assert ask(lookup, HASHES, pool)[1] == 2 * BLOCK
    assert pool.lookups == 1


def test_groups_and_pools_are_kept_apart() -> None:
    pool, lookup = Pool(), remembering()
    pool.fill(0, HASHES[0], group=0)
    pool.fill(1, HASHES[0], group=1)
    [first], _ = ask(lookup, HASHES[:1], pool, group=0)
    [second], _ = ask(lookup, HASHES[:1], pool, group=1)
    assert (first, second) == ([pool.blocks[0]], [pool.blocks[1]])
    assert ask(lookup, HASHES[:1], Pool(), group=1) == (([],), 0)


def test_what_it_returns_may_be_changed() -> None:
    pool, lookup = Pool(), remembering()
    pool.fill(0, HASHES[0])
    (blocks,), _ = ask(lookup, HASHES, pool)
    blocks.clear()
    assert ask(lookup, HASHES, pool)[1] == BLOCK


def test_anything_out_of_the_ordinary_goes_to_vllm() -> None:
    asked: list[dict[str, Any]] = []

    def own(**arguments: Any) -> str:
        asked.append(arguments)
        return "vLLM's"

    for more in ({"drop_eagle_block": True}, {"alignment_tokens": 32}, {"dcp_world_size": 2}, {"pcp_world_size": 2}):
        assert ask(remembering(own), HASHES, Pool(), **more) == "vLLM's"
    assert ask(remembering(own), HASHES, Pool(hash_block_size=8)) == "vLLM's"
    assert ask(remembering(own), tuple(HASHES), Pool()) == "vLLM's"  # type: ignore[arg-type]
    assert [len(arguments["block_hashes"]) for arguments in asked] == [6] * 6
