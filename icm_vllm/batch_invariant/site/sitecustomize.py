"""Batch-invariant mode in every Python process of an engine that loads no plugins.

    SITE=$(python -c 'import icm_vllm.batch_invariant.site as site; print(*site.__path__)')
    ICM_BATCH_INVARIANT=1 PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" python -m some.engine ...

Python imports a module of this name when it starts. With ICM_BATCH_INVARIANT=1 the mode is switched on at the end of
the first `import torch`; without it, nothing happens. The package must be importable where the engine runs. Python
imports only one such module: the next one on the path, if there is one, is run from here.

vLLM needs none of this (icm_vllm/plugin.py), and this alone would not make it exact.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch as usual, and switches the mode on once it is imported."""

    def __init__(self) -> None:
        self._spec: importlib.machinery.ModuleSpec | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        self._spec = importlib.util.find_spec(name)
        if self._spec is None or self._spec.loader is None:
            return None
        found = importlib.util.spec_from_file_location(
            name, self._spec.origin, loader=self, submodule_search_locations=self._spec.submodule_search_locations
        )
        return found or self._spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        assert self._spec is not None
        assert self._spec.loader is not None
        return self._spec.loader.create_module(self._spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._spec is not None
        assert self._spec.loader is not None
        module.__spec__, module.__loader__ = self._spec, self._spec.loader
        self._spec.loader.exec_module(module)
        from icm_vllm.batch_invariant import enable_batch_invariant_mode

        enable_batch_invariant_mode()


def _run_next() -> None:
    """Run the sitecustomize that this one hides."""
    here = Path(__file__).resolve().parent
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("ICM_BATCH_INVARIANT") == "1":
    # For all threads (icm_vllm/batch_invariant/compiled.py); torch reads it when it is imported.
    os.environ.setdefault("TORCH_COMPILE_CACHE_KEY_TAG", "icm-batch-invariant")
    sys.meta_path.insert(0, _AfterTorch())
if __name__ == "sitecustomize":
    _run_next()
