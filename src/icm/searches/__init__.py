"""Searches for labels, one file each, imported when the search is asked for by its name.

Such a file has `run(problem, ask, journal)`, which asks a model and ends with the labels that it found, and `SETTINGS`,
the settings that it uses and not every search does (`seam.Search`). To add one: a file like that, and a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from src.icm.searches.seam import Search

SEARCHES: Final[Mapping[str, str]] = {
    "annealing": "one claim at a time is taken in, or its label changed, by simulated annealing (the paper's search)",
    "ascent": "all claims are labelled from several starts, in blocks; what raises U of the whole pool is kept",
    "bootstrapping": "all labels are predicted from those of the round before, and the best of all rounds are kept",
    "gibbs": "labels of one group after another are drawn from the model's answers; the best after any sweep are kept",
}
"""What each does, in one line."""
DEFAULT: Final[str] = "ascent"
"""The search where none is named; see `default_search`."""


def default_search(given: Collection[str]) -> str:
    """The search where none is named. given: the settings that were given, by the names of their flags.

    It is DEFAULT, but annealing where a setting is given that annealing uses and DEFAULT does not: so a command line
    that was written for annealing, as those of the published code, still means it.
    """
    of_annealing = set(search_named("annealing").SETTINGS) - set(search_named(DEFAULT).SETTINGS)
    return DEFAULT if of_annealing.isdisjoint(given) else "annealing"


def search_named(name: str) -> Search:
    """The search of that name, which is a file of this folder. Raises KeyError for a name that is none."""
    if name not in SEARCHES:
        raise KeyError(f"there is no search {name!r}, only {', '.join(SEARCHES)}")
    search: Search = importlib.import_module(f"{__name__}.{name}")
    return search
