"""A faster start of a vLLM server on a CPU, in little more than half the time, without what a text model does not need.

Of 45 s and more that a start took on two cores (vLLM 0.32, Gemma 3 270M), some 17 went into importing vLLM a second and
a third time, and 12 into reading the tokenizer again, twice, and copying it. Three things change:

- Processes are forked. A server has three, the API server, the engine and the worker, and on a CPU vLLM starts each as
  a new interpreter, which imports vLLM again. A fork has imported it already; used as a library, vLLM forks by default
  (VLLM_WORKER_MULTIPROC_METHOD). It wants new interpreters on a CPU because LD_PRELOAD and OpenMP's environment
  variables count when a process begins. Our launcher preloads Intel's OpenMP library into the first process, and that
  library starts anew in a fork and reads its environment again. GNU's does not, so with that one nothing is forked. A
  fork also inherits its parent's open files, such as the server's port, so it is ended with its parent.
- The tokenizer is read once, before the fork, and copied for one thread in place of two; a second thread that needs it
  at the same time makes its own copy.
- The chat template is looked for at the first chat turn, not before: a base model has none, and looking reads the
  tokenizer again.

This only saves time: a vLLM that lacks what is replaced starts as usual.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import logging
import os
import signal
from collections.abc import Callable
from typing import Any, Final

# A child of vLLM's logger, the only one that its processes show.
log = logging.getLogger(f"vllm.{__name__}")

INTEL: Final = "libiomp"
PR_SET_PDEATHSIG: Final = 1
"""prctl(2): the signal that a process gets when its parent ends."""
METHOD: Final = "VLLM_WORKER_MULTIPROC_METHOD"
"""vLLM's environment variable: how it starts processes."""


def install() -> None:
    """Make the server of this process start quickly; does nothing the second time."""
    for part in (_fork, _copy_tokenizer_once, _look_for_chat_template_later):
        try:
            part()
        except (ImportError, AttributeError) as error:
            log.warning("this vLLM has no place for quick_start's %s: %s", part.__name__.lstrip("_"), error)


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace owner.name by make(owner.name), once."""
    own = getattr(owner, name)
    if not getattr(own, "quick_start", False):
        ours: Any = functools.wraps(own)(make(own))
        ours.quick_start = True
        setattr(owner, name, staticmethod(ours) if inspect.ismethod(own) else ours)  # a class method is bound already


def _fork() -> None:
    if INTEL not in os.environ.get("LD_PRELOAD", ""):
        log.info("processes are not forked: the OpenMP library that is preloaded is not Intel's")
        return
    platform: Any = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    tokenizers: Any = importlib.import_module("vllm.tokenizers.registry")
    read = tokenizers.cached_tokenizer_from_config

    def settling(settle: Any) -> Any:
        def settled(config: Any) -> None:
            settle(config)  # sets METHOD, and is the last to do so before processes are started
            os.environ[METHOD] = "fork"
            _end_with_parent()
            if config.model_config is not None:
                read(config.model_config)

        return settled

    _replace(platform, "check_and_update_config", settling)


@functools.cache
def _end_with_parent() -> None:
    """Make every fork of this process, and their forks, get SIGTERM when its parent ends for any reason."""
    prctl = ctypes.CDLL(None).prctl
    os.register_at_fork(after_in_child=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM))


def _copy_tokenizer_once() -> None:
    def pooling(pool: Any) -> Any:
        return lambda tokenizer, copies=1: pool(tokenizer, 1)

    _replace(importlib.import_module("vllm.renderers.hf"), "maybe_make_thread_pool", pooling)


def _look_for_chat_template_later() -> None:
    renderer: Any = importlib.import_module("vllm.renderers.online_renderer").OnlineRenderer
    _replace(renderer, "warmup", lambda warm_up: lambda self: None)
