"""What a vLLM server's extension (icm_vllm) says about the server, and pools that are sent to it as trees."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

import orjson

from core.errors import APIError, RequestRejected
from core.llm_api.http.completions import Answers, of_an_answer, read_tree_answer
from core.llm_api.http.pool_tree import tree_of
from core.llm_api.http.transport import HttpTransport
from core.llm_api.http.vllm_questions import VLLMQuestions
from core.llm_api.types import Prompt
from icm_vllm.prompt_tree import ADAPTER_PATH, FORMAT, PATH

log = logging.getLogger(__name__)

TREES_AGAIN: Final = 60.0
"""Seconds until a server that lost our extension, or did not say whether it has it, is asked again."""


class VLLMExtension:
    """used: False sends whole prompts to every server.

    takes_trees: whether the server takes pools as trees. fast_prefixes: whether it says that it does work on shared
    prefixes once. kernels, dtype, config: see EngineIdentity; empty where it does not say.
    """

    def __init__(self, http: HttpTransport, questions: VLLMQuestions, model: str, *, used: bool) -> None:
        self._http = http
        self._questions = questions
        self._model = model
        self._used = used
        self.takes_trees = False
        self.fast_prefixes = False
        self.kernels = self.dtype = self.config = ""
        self._is_adapter = False  # a LoRA adapter of the server's model
        self._most_labels = 0  # tokens that a tree's request may ask for, where the server says so; two always
        self.again: float | None = None  # when to ask about it again, monotonic seconds; None: no need

    def takes(self, token_ids: Sequence[int]) -> bool:
        """Whether a tree may ask for these tokens; an extension that states no maximum takes exactly two."""
        return self.takes_trees and (len(token_ids) == 2 or len(token_ids) <= self._most_labels)

    async def probe(self) -> None:
        """Ask whether the server has our extension, in our format and for our model or LoRA adapter.

        Extensions of earlier versions take no adapters.
        """
        self.again = None
        self.takes_trees = False
        try:
            said = await self._questions.extension()
        except RequestRejected:
            return
        except APIError:
            self.again = time.monotonic() + TREES_AGAIN
            return
        self.fast_prefixes = said.get("fast_prefixes") is True
        self.kernels = str(said.get("kernels", ""))
        self.dtype = str(said.get("dtype", ""))
        self.config = str(said.get("config", ""))
        most = said.get("max_labels")
        self._most_labels = most if isinstance(most, int) else 0
        models, adapters = said.get("models"), said.get("adapters")
        is_base = isinstance(models, list) and self._model in models
        self._is_adapter = not is_base and isinstance(adapters, list) and self._model in adapters
        self.takes_trees = self._used and said.get("format") == FORMAT and (is_base or self._is_adapter)

    async def look_again(self) -> None:
        """Ask whether a lost extension is back, where it is time to."""
        if self.again is not None and time.monotonic() >= self.again:
            self.again = time.monotonic() + TREES_AGAIN  # others need not ask meanwhile
            again = self.again
            await self.probe()
            if self.takes_trees:
                log.warning("%s takes pools as trees again", self._http.base_url)
            else:
                self.again = again

    async def ask(self, prompts: Sequence[Prompt], token_ids: Sequence[int]) -> Answers | None:
        """The answers; None where the server no longer has its extension, as after a restart without it, or no longer
        has the adapter, which vLLM says itself where it is asked by whole prompts."""
        try:
            path = ADAPTER_PATH if self._is_adapter else PATH
            said = await self._http.send("POST", path, self.body(prompts, token_ids))
            with of_an_answer():
                return read_tree_answer(said, token_ids, prompts)
        except RequestRejected as error:
            if error.status not in (404, 405):
                raise
        log.warning("%s no longer takes pools as trees; sending whole prompts", self._http.base_url)
        self.takes_trees = False
        self.again = time.monotonic() + TREES_AGAIN
        return None

    def body(self, prompts: Sequence[Prompt], token_ids: Sequence[int]) -> bytes:
        """A request for these tokens after each of the prompts."""
        named = {"adapter": self._model} if self._is_adapter else {}
        return orjson.dumps({**named, "labels": token_ids, "tree": tree_of(prompts)})
