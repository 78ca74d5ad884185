"""What vLLM runs in each of its processes where this package is installed (entry point group vllm.general_plugins).

Changes nothing unless the environment asks for it, as our launcher does: installing the package must not alter the
other vLLM servers of the same Python.
"""

from __future__ import annotations

import os
from typing import Final

FAST_PREFIXES: Final = "ICM_FAST_PREFIXES"
"""Environment variable: "1" makes the engine reuse its work on prefixes that successive prompts share."""

BATCH_INVARIANT: Final = "ICM_BATCH_INVARIANT"
"""Environment variable: "1", beside VLLM_BATCH_INVARIANT=1, makes scores independent of what else is computed."""


def register() -> None:
    """Called by vLLM, possibly several times a process."""
    if os.environ.get(FAST_PREFIXES) == "1":
        from core.vllm_extension import block_hashes, block_lookup, token_copy

        block_hashes.install()
        block_lookup.install()
        token_copy.install()
    if os.environ.get(BATCH_INVARIANT) == "1":
        from core.vllm_extension import exact

        exact.install()
