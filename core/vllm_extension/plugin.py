"""What vLLM runs in each of its processes where this package is installed (entry point group vllm.general_plugins).

Changes nothing unless the environment asks for it, as our launcher does: installing the package must not alter the
other vLLM servers of the same Python.
"""

from __future__ import annotations

import os
from typing import Final

SHARED_HASHES: Final = "ICM_SHARED_BLOCK_HASHES"
"""Environment variable: "1" turns block_hashes on."""


def register() -> None:
    """Called by vLLM, possibly several times a process."""
    if os.environ.get(SHARED_HASHES) == "1":
        from core.vllm_extension import block_hashes

        block_hashes.install()
