"""vLLM's block hashes, computed once for a prefix that successive requests share.

A prefix cache finds blocks by a hash chained over the whole prefix, so vLLM hashes every token of every prompt, cached
or not: 168,000 hashes for a pool of 256 prompts of 10,500 tokens. A prompt of a tree, depth first, begins like the one
before it; comparing two lists of numbers is far faster than hashing them, and gives the same hashes. Where a pool comes
as a tree (pools.py), shared prefixes are known without comparing.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any, Final

from icm_vllm.prefixes import common_prefix

log = logging.getLogger(__name__)

Hasher = Callable[[Any], list[Any]]

REMEMBERED_TOKENS: Final = 1 << 20
"""Tokens whose block hashes an engine keeps; some 50 bytes a token."""


class RememberingHasher:
    """A vLLM request block hasher that takes over the hashes of the prefix shared with the request before.

    Called with a vllm.v1.request.Request; returns the hashes of its full blocks that are not in request.block_hashes
    yet, as the hasher of vllm.v1.core.kv_cache_utils.get_request_block_hasher does.
    """

    def __init__(self, hasher: Hasher, block_size: int) -> None:
        self.hasher = hasher
        self.block_size = block_size
        # A single attribute, read and replaced at once: vLLM calls a hasher from the thread that receives requests and
        # from the one that schedules them.
        self._last: tuple[list[int], list[Any]] = [], []

    def __call__(self, request: Any) -> list[Any]:
        """Hashes of the full blocks that have none yet."""
        # A hash also covers images, adapters and salts; requests that have these are left to vLLM, as are continued
        # ones.
        if request.block_hashes or request.mm_features or request.lora_request or request.cache_salt:
            return self.hasher(request)
        if getattr(request, "prompt_embeds", None) is not None:
            return self.hasher(request)
        tokens: list[int] = request.prompt_token_ids
        if request.num_tokens != len(tokens):  # it has begun to generate
            return self.hasher(request)
        last_tokens, last_hashes = self._last
        known = last_hashes[: common_prefix(tokens, last_tokens) // self.block_size]
        hashes = continued(self.hasher, request, known)
        self._last = tokens, hashes
        return hashes


class PathHasher:
    """A vLLM request block hasher for the prompts of trees. vLLM's hashing, some 10 us a block, is avoided in two ways:
    a prompt takes over the hashes that it shares with the one before, and because one pool is much like the next,
    hashes are remembered by what determines them, the hash of the block before and the block's token ids.

    shared: how many tokens the next new request has in common with the last one, of the same adapter.
    fresh: how many tokens of the last one cannot be in the cache from prompts before it.
    """

    def __init__(self, own: Hasher, block_size: int) -> None:
        self.shared = 0
        self.fresh = 0
        self._own = own
        self._block_size = block_size
        self._last: list[Any] = []
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, request: Any) -> list[Any]:
        """Hashes of the full blocks that have none yet."""
        tokens, size = request.prompt_token_ids, self._block_size
        if request.block_hashes or request.num_tokens != len(tokens):  # it has begun to generate
            return self._own(request)
        adapter = request.lora_request
        # vLLM hashes its name into every block, and since 0.32 its path; it stands where the first block has no other
        # before it.
        start = None if adapter is None else (adapter.lora_name, adapter.lora_path)
        hashes = self._last[: self.shared // size]
        blocks = len(tokens) // size
        while len(hashes) < blocks and (found := self._known.get(self._parts(start, tokens, hashes, len(hashes)))):
            hashes.append(found)
        remembered = len(hashes)
        hashes = continued(self._own, request, hashes)
        if len(self._known) * size > REMEMBERED_TOKENS:
            self._known.clear()
        for block in range(remembered, len(hashes)):
            self._known[self._parts(start, tokens, hashes, block)] = hashes[block]
        self._last = hashes
        self.fresh = len(tokens) - remembered * size
        return list(hashes)

    def _parts(self, start: object, tokens: list[int], hashes: list[Any], block: int) -> tuple[Any, ...]:
        """What determines the hash of a block, for prompts without images and salts. start: before the first block."""
        first = block * self._block_size
        return (hashes[block - 1] if block else start, *tokens[first : first + self._block_size])


def continued(hasher: Hasher, request: Any, known: list[Any]) -> list[Any]:
    """Hashes of a new request whose first ones are known: vLLM's hasher goes on after those that a request has."""
    request.block_hashes.extend(known)
    try:
        return known + hasher(request)
    finally:
        request.block_hashes.clear()


def installed() -> bool:
    """Whether this process's vLLM would use a RememberingHasher; the plugin runs here as in the engine's process."""
    engine_core: Any = sys.modules.get("vllm.v1.engine.core")
    return bool(getattr(getattr(engine_core, "get_request_block_hasher", None), "remembers", False))


def install() -> None:
    """Make every engine core of this process use a RememberingHasher; does nothing the second time.

    Must run before the engine core is made: vLLM calls plugins first. A vLLM without this function is left as it is.
    """
    try:
        engine_core: Any = importlib.import_module("vllm.v1.engine.core")
        make = engine_core.get_request_block_hasher
    except (ImportError, AttributeError) as error:
        log.warning("this vLLM keeps its own block hashing: %s", error)
        return
    if getattr(make, "remembers", False):
        return

    @functools.wraps(make)
    def make_remembering(block_size: int, hash_function: Callable[[Any], Any], lookahead: int = 0) -> Any:
        # Since vLLM 0.33. A hash then depends on tokens after its block, too.
        if lookahead:
            return make(block_size, hash_function, lookahead)
        return RememberingHasher(make(block_size, hash_function), block_size)

    make_remembering.remembers = True  # type: ignore[attr-defined]
    engine_core.get_request_block_hasher = make_remembering
