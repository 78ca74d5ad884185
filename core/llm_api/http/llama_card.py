"""How a llama-server (llama.cpp) describes the model that it serves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import orjson

from core.errors import ConfigurationError
from core.flags import meant
from core.llm_api.http.transport import HttpTransport

OWNER: Final = "llamacpp"
"""What its model cards name as `owned_by`."""
_OF_THE_FILE: Final = ("vocab_type", "n_vocab", "n_ctx_train", "n_embd", "n_params", "size")
"""What distinguishes GGUF files: the vocabulary, the shape, and the bytes of the weights, which show their type."""


async def llama_card(http: HttpTransport, path: str, model: str) -> dict[str, Any] | None:
    """The card of `model` at `path`, by one attempt; None where no llama-server answers.

    A llama-server answers under whatever name it is asked by, so the name is checked here: raises ConfigurationError
    where it serves another one. Other errors are those of HttpTransport.send.
    """
    try:
        cards = orjson.loads(await http.send("GET", path))["data"]
        ours = [card for card in cards if card.get("owned_by") == OWNER]
        served = {str(name): card for card in ours for name in (card["id"], *(card.get("aliases") or ()))}
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
        return None
    if served and model not in served:
        names = ", ".join(map(repr, served))
        raise ConfigurationError(
            f"the llama-server at {http.base_url} serves {names}, not {model!r}{meant(model, served) or '.'}",
            hint="Give its name as --model, or start it with --alias.",
        )
    return served.get(model)


def digest_of_file(card: Mapping[str, Any]) -> str:
    """SHA-256 of what a card says about the GGUF file, without what depends on the server's options."""
    meta = card.get("meta")
    facts = [meta.get(key) if isinstance(meta, dict) else None for key in _OF_THE_FILE]
    return hashlib.sha256(orjson.dumps(facts)).hexdigest()
