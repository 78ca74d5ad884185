"""The model behind the application: connected in the background, tried again while it is away, asked a canary.

The application must come up without its model, so that a probe gets the reason why it is not ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from contrib.serving.scoring import Scorer
from core.errors import APIError, ConfigurationError, RequestRejected
from core.llm_api.llm import ModelAPI

log = logging.getLogger(__name__)

RETRY_EVERY: Final = 2.0
"""Seconds between attempts to connect."""
FRESH: Final = 1.0
"""Seconds for which the canary's answer is passed on instead of asking again: several probers cost as much as one."""


class NotReady(Exception):
    """There is no model to ask; the message says why, for the log. Clients do not learn where the server is."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A started ModelAPI and what scoring needs to know of its model."""

    api: ModelAPI
    scorer: Scorer

    @property
    def name(self) -> str:
        return self.api.identity.model


class ModelConnection:
    """open_api: makes a ModelAPI, not started; called again for each attempt. canary_seconds: see Limits."""

    def __init__(self, open_api: Callable[[], Awaitable[ModelAPI]], *, canary_seconds: float) -> None:
        self._open_api = open_api
        self._canary_seconds = canary_seconds
        self._connected: Connected | None = None
        self._reason = "the model was not connected yet"
        self._lost = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._canary: asyncio.Task[float] | None = None
        self._asked = -FRESH

    def get(self) -> Connected:
        """The model, if it was ever reached. Raises NotReady."""
        if self._connected is None:
            raise NotReady(self._reason)
        return self._connected

    def start(self) -> None:
        """Begin to connect, in the background."""
        self._keeping = asyncio.create_task(self._keep())

    @property
    def failed(self) -> bool:
        """Whether what keeps the connection has ended by an error that was not foreseen: only a restart helps."""
        return self._keeping is not None and self._keeping.done()

    async def aclose(self) -> None:
        """Close the connection; idempotent."""
        tasks = [task for task in (self._keeping, self._canary) if task is not None]
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, NotReady):
                log.error("the connection to the model failed", exc_info=outcome)
        await self._drop()

    async def _keep(self) -> None:
        """Connect, and again whenever the model was found to be another one."""
        while True:
            await self._connect()
            self._lost.clear()
            await self._lost.wait()
            await self._drop()

    @property
    def api(self) -> ModelAPI | None:
        """The ModelAPI, if it was ever reached."""
        return None if self._connected is None else self._connected.api

    async def canary(self) -> float:
        """Seconds that the model took for one token, at most FRESH seconds ago. Raises NotReady."""
        self.get()
        now = time.monotonic()
        if self._canary is None or (self._canary.done() and now - self._asked >= FRESH):
            self._asked = now
            self._canary = asyncio.create_task(self._ask())
        return await asyncio.shield(self._canary)

    async def _ask(self) -> float:
        try:
            async with asyncio.timeout(self._canary_seconds):
                return await self.get().api.ready()
        except TimeoutError:
            raise NotReady(f"the model did not answer within {self._canary_seconds:g} s") from None
        except (RequestRejected, ConfigurationError) as error:
            self._lost.set()  # another model at the same place, or another key: nothing that waiting would mend
            raise NotReady(str(error)) from None
        except APIError as error:
            raise NotReady(str(error)) from None

    async def _connect(self) -> None:
        while self._connected is None:
            try:
                api = await self._open_api()
                await api.start()
                try:
                    self._connected = Connected(api, await Scorer.open(api))
                except BaseException:
                    await api.aclose()
                    raise
                log.info("connected: %s", api.identity.describe())
            except APIError as error:
                if str(error) != self._reason:
                    log.warning("no model yet: %s", error)
                self._reason = str(error)
                await asyncio.sleep(RETRY_EVERY)

    async def _drop(self) -> None:
        connected, self._connected = self._connected, None
        if connected is not None:
            with contextlib.suppress(APIError):
                await connected.api.aclose()
