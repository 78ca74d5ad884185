"""Whether a run can go on: with the settings, engine and tokens that it began with. Otherwise it is refused."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import orjson

from core.llm_api.types import EngineIdentity, known_to_differ
from src.icm.problem import SearchSettings
from src.icm.testbeds import BadInput
from src.pipeline.labelling import Labelling
from src.results.run_folder import FORMAT, RunFolder

log = logging.getLogger(__name__)

OF_TESTBED_FILE = ("testbed_sha256", "labels", "label_texts")
"""Settings that come from a testbed file, not from a flag."""
OF_OTHERS = ("bootstrap_share",)
"""Settings that follow from others."""
OF_CONTENT = ("data_sha256", "continue_from", "continued", "known", "known_outside")
"""Settings that are digests of other files."""


def _value(settings: Mapping[str, Any], name: str) -> Any:
    """Of a run's settings, which leave out some at their defaults."""
    defaults = {field.name: field.default for field in fields(SearchSettings)}
    return settings.get(name, defaults.get(name))


def check_readable(folder: RunFolder, known: Mapping[str, Any]) -> None:
    """Raises BadInput for an unfinished run of an older format, whose tree was rebuilt by another rule."""
    if known.get("format", 0) < FORMAT and "result" not in known:
        raise BadInput(
            f"{folder.path}: was begun by an earlier version, whose journal this one cannot go on with. "
            "Move it away, or choose another --run"
        )


def _flag_of(name: str, *both: Mapping[str, Any]) -> str:
    """The flag that a setting is from: a data file has its name in place of a testbed's."""
    files = all("." in str(settings.get("testbed")) and "testbed_sha256" not in settings for settings in both)
    return "data" if name == "testbed" and files else name


def check_same_run(
    folder: RunFolder,
    known: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    renamed: bool = False,
    continues: bool = False,
) -> None:
    """Raises BadInput where `folder` was started with other settings.

    renamed: see may_be_renamed. continues: whether the command takes --continue_from, so that it can be advised.
    """
    changed = [name for name in {**known, **settings} if known.get(name) != settings.get(name)]
    if renamed:
        changed = [name for name in changed if name != "model"]
    if changed:
        flags = [name for name in changed if name not in (*OF_TESTBED_FILE, *OF_CONTENT, *OF_OTHERS)]
        differences = [
            _other_value(_flag_of(name, known, settings), _value(known, name), _value(settings, name)) for name in flags
        ]
        if any(name in OF_TESTBED_FILE for name in changed):
            file = known.get("testbed")
            differences.insert(0, f"another content of its testbed file {file} (see {folder.path}/run.json)")
        if not {"continue_from", "continued"}.isdisjoint(changed):
            differences.insert(0, _other_continued(known.get("continue_from"), settings.get("continue_from")))
        if "known" in changed:
            differences = [each for each in differences if not each.startswith("--num_seed ")]
            differences.insert(0, _other_known(known.get("known"), settings.get("known")))
        elif "known_outside" in changed:
            differences.insert(0, "other known labels of claims outside the pool of the run that it goes on from")
        advice = "Use the same flags, or another --run"
        if continues and {"known"} <= set(changed) <= {"known", "num_seed"} and settings.get("known") is not None:
            advice = f"To go on from its labels: --continue_from {folder.path.name} --run NEW"
        if "data_sha256" in changed and known.get("testbed") == settings.get("testbed"):
            differences.insert(0, f"another content of {settings['testbed']}, which has changed since")
            if set(changed) <= set(OF_CONTENT):
                advice = "Use another --run"
                if continues:
                    advice = f"To go on from its labels: --continue_from {folder.path.name} --run NEW"
        raise BadInput(f"{folder.path}: was started with {', '.join(differences)}. {advice}")


def _other_value(name: str, before: Any, now: Any) -> str:
    if before is None:
        return f"no --{name}, now {now}"
    return f"--{name} {before}, now without" if now is None else f"--{name} {before}, now {now}"


def _other_continued(before: str | None, now: str | None) -> str:
    """What differs in --continue_from, without the digests, which tell a user nothing."""
    if before is None:
        return "no --continue_from"
    if now is None:
        return "--continue_from, now without"
    return "other labels of another run (--continue_from)"


def _other_known(before: str | None, now: str | None) -> str:
    if before is None:
        return "no known labels, now with some"
    return "known labels, now without" if now is None else "other known labels"


def may_be_renamed(known: Mapping[str, Any]) -> bool:
    """Whether the run of this run.json can go on under another name of its model: it is not finished, and
    check_same_engine can see by the fingerprint whether it is the same model."""
    return "result" not in known and bool(known["engine"].get("fingerprint"))


def check_same_engine(folder: RunFolder, known: Mapping[str, Any], identity: EngineIdentity) -> None:
    """Raises BadInput where scores of two engines would mix in one run: where the version differs, the type or the
    model's configuration (if both are known), or the model. Its path and name may differ if it answers alike."""
    now = asdict(identity)
    names = [name for name in ("model", "root") if known.get(name) != now[name]]
    moved = bool(names) and identity.has_content_of(known)
    changed = [] if moved else names
    changed += [name for name in ("revision", "version") if known.get(name) != now[name]]
    changed += [name for name in ("dtype", "config") if known_to_differ(known.get(name, ""), now[name])]
    if changed:
        differences = ", ".join(f"{name} {_short(known.get(name))!r}, now {_short(now[name])!r}" for name in changed)
        raise BadInput(
            f"{folder.path}: was started on another engine ({differences}). Start that one, or use another --run"
        )
    if moved:
        differences = ", ".join(f"{name} {known.get(name)!r}, now {now[name]!r}" for name in names)
        print(f"the run goes on: the model answers as before ({differences})", file=sys.stderr, flush=True)
    if known.get("fingerprint") != now["fingerprint"]:
        log.warning(
            "the engine answers a fixed prompt differently than when this run began (other hardware, "
            "precision or kernels?): its scores differ slightly from the run's first part"
        )


async def check_same_tokens(folder: RunFolder, known: Mapping[str, Any] | None, labelling: Labelling) -> None:
    """Raises BadInput where the run began with other tokens for the same claims: because the tokenizer changed, or an
    earlier version, which did not record tokens (known: None), spelled the labels differently."""
    now = orjson.loads(orjson.dumps(await labelling.token_record()))
    if known is None:
        changed = [] if await labelling.asks_as_before() else ["demonstration"]
    else:
        changed = [name for name in now if _ids(known.get(name)) != _ids(now[name])]
    if changed:
        raise BadInput(
            f"{folder.path}: was started with other tokens for its {' and '.join(changed)}, by an earlier version or "
            "another tokenizer, and scores of two kinds of prompts must not mix. Move it away, or use another --run"
        )


def _ids(recorded: Any) -> Any:
    """The token ids, without their texts, which not every server gives."""
    return [token for token, _ in recorded] if isinstance(recorded, list) else recorded


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value
