"""Pushing an exported data set to a hub, by huggingface_hub: HF_ENDPOINT says which, HF_TOKEN or a login who."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from core.errors import APIError
from src.icm.testbeds import BadInput

OF_THE_LIBRARY: Final = HfHubHTTPError.__bases__
"""What its requests raise: the error of the HTTP library that it uses, and OSError."""
MADE_BY_THE_HUB: Final = {".gitattributes"}
"""Files of a repository in which nothing was put yet."""


class PushFailed(APIError):
    """The hub cannot be reached, or refuses what is sent."""


def check_can_push(name: str) -> None:
    """Raises BadInput, before anything is written, where it is certain that nothing can be pushed under this name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(f"--hub {name}: {_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise BadInput("--hub: HF_HUB_OFFLINE is set, so nothing can be pushed")
    if get_token() is None:
        raise BadInput("--hub: no token is known: set HF_TOKEN, or run hf auth login")


def push(folder: Path, files: Sequence[Path], name: str, *, public: bool, message: str) -> str:
    """Push `files` of `folder` into a new data set repository; returns its address.

    name: as NAMESPACE/NAME, or NAME in the token's own namespace. A repository without files, as an interrupted push
    leaves it, is taken; raises BadInput for one that has some, and PushFailed where the hub does not do it.
    """
    api = HfApi()
    try:
        whole = name if "/" in name else f"{api.whoami()['name']}/{name}"
        address = api.create_repo(whole, repo_type="dataset", private=not public, exist_ok=True)
        known = api.dataset_info(whole)
        if {file.rfilename for file in known.siblings or ()} - MADE_BY_THE_HUB:
            raise BadInput(f"--hub {whole}: holds files already; choose another name, or delete it")
        if bool(known.private) == public:
            is_now, wanted = ("private", "public") if public else ("public", "private")
            raise BadInput(f"--hub {whole}: is there, empty and {is_now}, not {wanted}; delete it first")
        api.upload_folder(
            repo_id=whole,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=[file.relative_to(folder).as_posix() for file in files],
            commit_message=message,
        )
    except OfflineModeIsEnabled:
        raise BadInput("--hub: HF_HUB_OFFLINE is set, so nothing can be pushed") from None
    except OF_THE_LIBRARY as error:
        raise PushFailed(f"--hub {name}: {_said(error)}") from None
    return str(address)


def _said(error: BaseException) -> str:
    """What the hub said, or why it could not be asked."""
    response = getattr(error, "response", None)
    status = "" if response is None else f"the hub answers {response.status_code}: "
    told = getattr(error, "server_message", None)
    return f"{status}{_line(told or error)}"


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300] or "no reason given"
