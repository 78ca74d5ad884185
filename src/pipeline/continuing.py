"""Going on from another run's labels (`--continue_from RUN`): a data file that grew or was edited is not labelled anew.

A claim is known by what its prompt shows, its text. The other run's claims that are still in the file come into the new
pool first, with their labels in place of random ones. Where that run is finished, the search goes on from its end
(src/icm/carried.py): its demonstrations keep their order and new ones follow, so that its answers need not be asked
again and the server's prefix cache holds what it computed. Nothing is fixed.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from core.llm_api.types import EngineIdentity
from src.icm.carried import Carried, layout_record, read_layout
from src.icm.consistency import Label, Labels
from src.icm.label_names import Names, counts_of, describe_counts, written_label
from src.icm.objective import LogOdds
from src.icm.problem import Problem, SearchSettings
from src.icm.searches.seam import Found
from src.icm.testbeds import BadInput, Claim, Testbed, split_pools
from src.results.run_reader import read_known_outside, read_run
from src.results.run_record import LabelledClaim, RunRecord, final_scores
from src.results.text import counted

NAMED: Final = 3
"""How many of the claims that are gone are named; the others are counted."""
SHOWN: Final = 60
"""Characters of such a claim."""


@dataclass(frozen=True)
class End:
    """Where a finished search ended. Positions are those of its pool.

    layout: see layout_record. log_odds: of every labelled claim after all others, nats. positions: of the claims that
    are still in the file, ascending. engine, tokens: what was asked, and in which tokens (run.json). settled: whether
    it ended by itself, and not because it had made all its iterations.
    """

    layout: Mapping[str, Any]
    log_odds: Mapping[int, LogOdds]
    positions: tuple[int, ...]
    engine: Mapping[str, Any]
    tokens: Mapping[str, Any]
    iterations: int
    accepted: int
    settled: bool

    def fits(self, settings: SearchSettings) -> bool:
        """Whether a search with these settings can go on in its layout."""
        if settings.context_cap is not None or ("upstream" in self.layout) != (settings.layout == "upstream"):
            return False
        return settings.layout == "upstream" or settings.anchors == self.layout.get("anchors")

    @property
    def digest(self) -> str:
        """Of what decides how a search goes on from here."""
        content = [self.layout, sorted(self.log_odds.items()), self.iterations, self.accepted, self.settled]
        return hashlib.sha256(orjson.dumps(content)).hexdigest()

    def answers_are_of(self, identity: EngineIdentity, tokens: Mapping[str, Any]) -> bool:
        """Whether the other run asked an engine like this one, in such tokens (token_record)."""
        alike = all(_ids(self.tokens.get(name)) == _ids(tokens.get(name)) for name in ("prefix", "separator"))
        return alike and self.tokens.get("labels") == tokens.get("labels") and identity.has_content_of(self.engine)


@dataclass(frozen=True)
class Continued:
    """What another run's pool gives to the claims of a file.

    digest: of that pool's texts, groups and labels. labels: by position in the file's claims, in that pool's order;
    None for a claim that its search gave no label. names: of the labels. gone: claims of that pool that are not in the
    file. regrouped: how many are in another group now. known: the claims (by position) whose labels that run was given;
    they stay known. known_outside: known labels of claims outside its pool, by position. known_gone: how many of those
    are of claims that are not in the file. end: where its search ended, None where that is not known (it is not
    finished, or of a version that did not keep it). as_before: whether the pool is drawn as by versions without an end,
    with new claims of a group among its others.
    """

    run: str
    model: str
    digest: str
    labels: Mapping[int, Label]
    names: Names
    gone: tuple[LabelledClaim, ...]
    regrouped: int
    known: frozenset[int] = frozenset()
    end: End | None = None
    as_before: bool = False
    known_outside: Mapping[int, int] = field(default_factory=dict)
    known_gone: int = 0

    def carried(self, pool: Sequence[int], groups: Sequence[str], settings: SearchSettings) -> Carried | None:
        """The end of its search in the positions of a pool of the file's claims at `pool`, in groups `groups`; None
        where it is not known, or of another layout than `settings` ask for. Raises BadInput where it is damaged."""
        if self.end is None or self.as_before or not self.end.fits(settings):
            return None
        at_place = {at: position for position, at in enumerate(pool)}
        places = {before: at_place[at] for before, at in zip(self.end.positions, self.labels, strict=True)}
        labels = self.start_labels(pool)
        try:
            layout = read_layout(self.end.layout, places, groups)
            if set(layout.questions) != {at for at, label in enumerate(labels) if label is not None}:
                raise ValueError("it is of other claims than those that have a label")
        except ValueError as error:
            raise BadInput(f"--continue_from {self.run}: its layout.json is damaged: {error}") from None
        whole = not self.gone and not self.regrouped
        log_odds = {places[before]: self.end.log_odds[before] for before in self.end.log_odds} if whole else {}
        return Carried(
            labels=labels,
            claims=frozenset(places.values()),
            layout=layout,
            log_odds={claim: log_odds[claim] for claim in layout.questions} if whole else {},
            iterations=self.end.iterations,
            accepted=self.end.accepted,
            settled=self.end.settled,
        )

    def pool(self, claims: Sequence[Claim], batch_size: int, rng: np.random.Generator) -> list[int]:
        """Positions in the file's claims: first the whole groups of those that were labelled, even beyond batch_size;
        then other groups, drawn as for any pool, as long as there is room."""
        members: dict[str, list[int]] = defaultdict(list)
        for at, claim in enumerate(claims):
            members[claim.group].append(at)
        known = dict.fromkeys(claims[at].group for at in self.labels)
        if self.as_before:
            first = [at for group in known for at in members[group]]
        else:
            first = [*self.labels, *(at for group in known for at in members[group] if at not in self.labels)]
        room = batch_size - len(first)
        fitting = {group: places for group, places in members.items() if group not in known and len(places) <= room}
        if not fitting:
            return first
        [drawn] = split_pools([claims[at] for places in fitting.values() for at in places], room, 1, rng)
        return first + [at for group in dict.fromkeys(claim.group for claim in drawn) for at in fitting[group]]

    def start_labels(self, pool: Sequence[int]) -> Labels:
        """What the claims at these positions start with; None for those that are new."""
        return tuple(self.labels.get(at) for at in pool)

    def summary(self) -> dict[str, Any]:
        """For run.json."""
        known = [label for label in self.labels.values() if label is not None]
        return {
            "run": self.run,
            "model": self.model,
            "labels": len(known),
            **counts_of(known, self.names),
            "gone": len(self.gone),
            "regrouped": self.regrouped,
        }

    def notes(
        self, *, file: str, model: str, pool: int, outside: int, batch_size: int | None = None, listed: str = ""
    ) -> list[str]:
        """What a user should know before it starts, one line each. pool: its claims; outside: those left out of it;
        listed: where all claims that are gone are listed."""
        found = self.summary()
        new, unlabelled = pool - len(self.labels), len(self.labels) - found["labels"]
        others = f"{counted(new, 'new claim') if new else 'no new claim'} of {file} in the pool with them"
        lines = [
            f"starts with {counted(found['labels'], 'label')} of {self.run} ({describe_counts(found)}) in place of "
            f"random ones; {others}"
        ]
        if unlabelled:
            begin = "begins" if unlabelled == 1 else "begin"
            lines.append(
                f"{counted(unlabelled, 'claim')} of {self.run} got no label from its search and {begin} without one, "
                "as new claims do"
            )
        if self.gone:
            named = ", ".join(f"row {claim.row} ({_shown(claim)})" for claim in self.gone[:NAMED])
            more = f", and {len(self.gone) - NAMED} more" if len(self.gone) > NAMED else ""
            more += f" (all in {listed})" if more and listed else ""
            lines.append(
                f"{counted(len(self.gone), 'claim')} of {self.run} not in {file}, removed or edited: {named}{more}"
            )
        if self.known_gone:
            lines.append(
                f"{counted(self.known_gone, 'known label')} of {self.run} not kept: of claims that are not in {file}"
            )
        if self.regrouped:
            lines.append(
                f"{counted(self.regrouped, 'claim')} of {self.run} in another group (consistency_id) in {file}"
            )
        if self.model != model:
            lines.append(f"the labels of {self.run} were found with {self.model}; from here on {model} is asked")
        if batch_size is not None and pool > batch_size:
            lines.append(
                f"the pool has {pool} claims, those of {self.run} and their groups, whatever --batch_size {batch_size}"
            )
        if outside:
            lines.append(
                f"no room for {counted(outside, 'claim')} of {file}: --batch_size {pool + outside} takes in all"
            )
        return lines


def read_continued(name: str, runs_dir: Path, testbed: Testbed, claims: Sequence[Claim], path: Path) -> Continued:
    """What the run `name` (in runs_dir, or a path) gives to the claims of `path`. It may be finished or not.

    Raises BadInput where there is no such run, where it holds no label, where none of its claims is in the file, or
    where the model was asked in other words.
    """
    folder = _folder(name, runs_dir)
    run = read_run(folder)
    _check(run, testbed, path)
    known = run.pool
    texts = [testbed.text(claim.fields) for claim in known]
    if not any(claim.searched or claim.is_known for claim in known):
        raise BadInput(f"--continue_from {name}: {folder} holds no labels yet")
    found = _matched(known, texts, claims)
    labels = {
        at: known[before].label if known[before].searched or known[before].is_known else None
        for before, at in found.items()
    }
    if all(label is None for label in labels.values()):
        raise BadInput(f"--continue_from {name}: none of the claims that it labelled is in {path}")
    content = [[text, claim.group, claim.label] for text, claim in zip(texts, known, strict=True)]
    outside = read_known_outside(folder, run)
    elsewhere = _matched(outside, [testbed.text(claim.fields) for claim in outside], claims, found.values())
    return Continued(
        end=_end_of(folder, run, tuple(found)),
        run=run.name,
        model=run.model,
        digest=hashlib.sha256(orjson.dumps(content)).hexdigest(),
        labels=labels,
        names=run.names,
        gone=tuple(claim for before, claim in enumerate(known) if before not in found),
        regrouped=sum(_was_regrouped(known[before], claims[at]) for before, at in found.items()),
        known=frozenset(
            at for before, at in found.items() if known[before].is_known and known[before].label is not None
        ),
        known_outside={at: label for before, at in elsewhere.items() if (label := outside[before].label) is not None},
        known_gone=len(outside) - len(elsewhere),
    )


def end_record(problem: Problem, found: Found) -> dict[str, Any] | None:
    """layout.json of a search that ended: what End needs that the run's other files do not hold. None where nothing can
    go on in such a layout."""
    layout = layout_record(found.layout)
    before = (0, 0) if problem.carried is None else (problem.carried.iterations, problem.carried.accepted)
    counts = {"iterations": before[0] + found.iteration, "accepted": before[1] + found.accepted}
    return None if layout is None else {"layout": layout, **counts}


def gone_rows(continued: Continued) -> Iterator[dict[str, Any]]:
    """The lines of gone.jsonl: claims of the other run that are not in the file, and their label there."""
    for claim in continued.gone:
        yield {
            "row": claim.row,
            "consistency_id": claim.group,
            "question": claim.question,
            "choice": claim.choice,
            **({} if claim.choice_2 is None else {"choice_2": claim.choice_2}),
            "label": written_label(claim.label, continued.names),
        }


def _end_of(folder: Path, run: RunRecord, positions: tuple[int, ...]) -> End | None:
    """Where its search ended; None where it is not finished, or did not keep that."""
    path = folder / "layout.json"
    if run.result is None or not path.is_file():
        return None
    try:
        document = orjson.loads((folder / "run.json").read_bytes())
        layout = orjson.loads(path.read_bytes())
        result, settings = document["result"], document["settings"]
        return End(
            layout=layout["layout"],
            log_odds=final_scores(run.journal),
            positions=positions,
            engine=document["engine"],
            tokens=document["tokens"],
            iterations=layout["iterations"],
            accepted=layout["accepted"],
            settled=run.search != "annealing" or result["iterations"] < settings["K"],
        )
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: cannot be read ({type(error).__name__}: {error}); without that file its labels are taken over "
            "and asked anew"
        ) from None


def _folder(name: str, runs_dir: Path) -> Path:
    for folder in (runs_dir / name, Path(name)):
        if (folder / "run.json").is_file():
            return folder
    raise BadInput(f"--continue_from {name}: no run of that name in {runs_dir}, and no run's folder")


def _check(run: RunRecord, testbed: Testbed, path: Path) -> None:
    if run.parts:
        raise BadInput(
            f"--continue_from {run.name}: was labelled in several searches; name one of them, as in "
            f"{run.name}/{run.parts[0].name.rsplit('/', 1)[-1]}"
        )
    if run.skipped:
        raise BadInput(f"--continue_from {run.name}: {run.skipped} lines of its files are damaged")
    before = run.asked_by
    if before.space != testbed.space:
        raise BadInput(
            f"--continue_from {run.name}: its labels are {' and '.join(map(repr, before.space.texts))}, those of "
            f"{path} are {' and '.join(map(repr, testbed.space.texts))}"
        )
    if before.template != testbed.template:
        raise BadInput(
            f"--continue_from {run.name}: its claims were asked as {before.template!r}, those of {path} are asked as "
            f"{testbed.template!r}: its labels answer other questions"
        )


def _matched(
    known: Sequence[LabelledClaim], texts: Sequence[str], claims: Sequence[Claim], others: Collection[int] = ()
) -> dict[int, int]:
    """Position in the file's claims by position in the run's pool. Of equal texts those of one group belong together,
    the others in their order. others: positions in the file that are taken already."""
    found: dict[int, int] = {}
    taken = set(others)
    for by_group in (True, False):
        free: dict[tuple[str, str], deque[int]] = defaultdict(deque)
        for at, claim in enumerate(claims):
            if at not in taken:
                free[claim.text, claim.group if by_group else ""].append(at)
        for before, text in enumerate(texts):
            places = free.get((text, known[before].group if by_group else ""))
            if before not in found and places:
                found[before] = places.popleft()
        taken = {*others, *found.values()}
    return dict(sorted(found.items()))


def _was_regrouped(before: LabelledClaim, now: Claim) -> bool:
    """Whether it is in another group. A name after the row, without a consistency_id, does not count: it changes."""
    unnamed = before.group == f"row {before.row}" and now.group == f"row {now.row}"
    return before.group != now.group and not unnamed


def _ids(recorded: Any) -> Any:
    """Token ids of a token_record, without their texts, which not every server gives."""
    return [each[0] for each in recorded] if isinstance(recorded, list) else recorded


def _shown(claim: LabelledClaim) -> str:
    text = " / ".join(part for part in (claim.question, claim.choice, claim.choice_2) if part)
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= SHOWN else flat[: SHOWN - 3] + "...")
