"""vLLM's search for cached blocks, begun where a request leaves the prefix shared with the one before.

For every prompt vLLM looks up every block from the first on, until one is missing: 168,000 lookups for a pool of 256
prompts of 10,500 tokens that are all cached. The blocks found for the request before are found again by comparing two
lists; each of them is checked for its content, since it may have been evicted in between.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Callable
from typing import Any, Final

from icm_vllm.prefixes import common_prefix

log = logging.getLogger(__name__)


KNOWN: Final = {"drop_eagle_block", "alignment_tokens", "dcp_world_size", "pcp_world_size"}
"""Arguments that are understood; with any other, vLLM's own lookup is used."""


class RememberingLookup:
    """`FullAttentionManager.find_longest_cache_hit` of vLLM with a memory of one request.

    Called with vLLM's own function and its arguments, by name. Only for one group of full-attention blocks that are
    hashed as they are stored; everything else is left to `own`. Returns ([blocks],), tokens found.
    """

    def __init__(self) -> None:
        self._place: tuple[Any, list[int]] | None = None
        self._hashes: list[Any] = []
        self._blocks: list[Any] = []
        self._keys: list[Any] = []

    def __call__(
        self,
        own: Callable[..., Any],
        *,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        **rest: Any,
    ) -> Any:
        """See the class."""
        size = kv_cache_spec.block_size
        ordinary = (
            type(block_hashes) is list
            and rest.keys() <= KNOWN
            and len(kv_cache_group_ids) == 1
            and size == block_pool.hash_block_size == rest.get("alignment_tokens")
            and not rest.get("drop_eagle_block")
            and rest.get("dcp_world_size", 1) == rest.get("pcp_world_size", 1) == 1
        )
        if not ordinary:
            return own(
                block_hashes=block_hashes,
                max_length=max_length,
                kv_cache_group_ids=kv_cache_group_ids,
                block_pool=block_pool,
                kv_cache_spec=kv_cache_spec,
                **rest,
            )
        wanted, place = block_hashes[: max_length // size], (block_pool, kv_cache_group_ids)
        blocks = self._remembered(wanted) if place == self._place else []
        kept = len(blocks)
        for block_hash in itertools.islice(wanted, len(blocks), None):
            found = block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            if not found:
                break
            blocks.append(found[0])
        self._place, self._hashes, self._blocks = place, wanted[: len(blocks)], blocks
        self._keys = self._keys[:kept] + [block.block_hash for block in itertools.islice(blocks, kept, None)]
        return (list(blocks),), len(blocks) * size

    def _remembered(self, wanted: list[Any]) -> list[Any]:
        """The blocks of the prefix shared with the last request, up to the first that holds something else now."""
        blocks = self._blocks[: common_prefix(wanted, self._hashes)]
        return blocks[: common_prefix([block.block_hash for block in blocks], self._keys)]


def install() -> None:
    """Make the full-attention caches of this process remember; does nothing the second time, or to another vLLM."""
    try:
        managers: Any = importlib.import_module("vllm.v1.core.single_type_kv_cache_manager")
        manager = managers.FullAttentionManager
        own = vars(manager)["find_longest_cache_hit"].__func__
    except (ImportError, AttributeError, KeyError) as error:
        log.warning("this vLLM keeps its own block lookup: %s", error)
        return
    if getattr(own, "remembers", False):
        return
    lookup = RememberingLookup()

    @functools.wraps(own)
    def remembering(cls: type, *places: Any, **arguments: Any) -> Any:
        if places:
            return own(cls, *places, **arguments)
        return lookup(functools.partial(own, cls), **arguments)

    remembering.remembers = True  # type: ignore[attr-defined]
    manager.find_longest_cache_hit = classmethod(remembering)
