"""The application's options: where it listens, its limits, its texts, its token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from core.errors import ConfigurationError
from core.settings import REPO_ROOT, read_secrets

TOKEN_NAME: Final = "ICM_SERVE_TOKEN"  # noqa: S105 - the name of the variable
DEFAULT_DOCUMENTS: Final = REPO_ROOT / "docs"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request and of all together. Times in seconds.

    body_bytes: of one request. body_seconds: for its body to arrive. request_seconds: for its answer, from then on.
    concurrent: requests at work at once; one more is answered 429. shutdown_seconds: how long requests may go on once
    the application was asked to end. canary_seconds: for the model's answer to /ready.
    """

    body_bytes: int = 1_000_000
    body_seconds: float = 10.0
    request_seconds: float = 120.0
    concurrent: int = 32
    shutdown_seconds: float = 20.0
    canary_seconds: float = 10.0


def read_token(environ: Mapping[str, str], secrets_path: Path | None = None) -> SecretStr | None:
    """The bearer token from the environment, else from SECRETS; None where neither has one.

    Raises ConfigurationError, without the token, for one that no header could carry.
    """
    named = secrets_path or (Path(environ["ICM_SECRETS"]) if environ.get("ICM_SECRETS") else None)
    secrets = read_secrets(named or REPO_ROOT / "SECRETS", required=named is not None)
    token = (environ.get(TOKEN_NAME) or secrets.get(TOKEN_NAME, "")).strip()
    if not token:
        return None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(f"{TOKEN_NAME} holds blanks or characters that no HTTP header can carry.")
    return SecretStr(token)
