"""The environment variables of this package, checked before a server starts; needs neither vLLM nor PyTorch.

    python -m icm_vllm.environment             # each variable, what it takes, and what is set here

A wrong value is told in one line by the launcher, and by the plugin in the first process of a vLLM that was started
otherwise, rather than taken for another one or met in a worker (docs/environment.md).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from icm_vllm.plugin import (
    ALL_REDUCE,
    ATTENTION,
    BATCH_INVARIANT,
    CHECK,
    EXPERTS,
    FAST_PREFIXES,
    FP8,
    QUICK_START,
    TILE,
    WINDOW_TILE,
)

MOST_WARPS: Final = 32
"""Of one program on a GPU: 1,024 threads."""
WINDOW_FORMS: Final = ("QUERIESxKEYS", "QUERIESxKEYSxWARPSxSTAGES")
PRODUCT_FORM: Final = "ROWSxCOLUMNSxDEPTH"
NUMBER: Final = re.compile("[0-9]{1,6}")


def switch(name: str, text: str) -> bool | None:
    """True of "1", False of "0", None of "", which is as if it were not set. Raises ValueError."""
    if text not in ("", "0", "1"):
        raise ValueError(f"{name}={text}: 1 (on) or 0 (off) was expected")
    return None if not text else text == "1"


def numbers(name: str, text: str, forms: Sequence[str], example: str) -> tuple[int, ...]:
    """The numbers of a tile such as `64x32`, () of "". forms: ROWSxCOLUMNS and so on. Raises ValueError."""
    if not text:
        return ()
    found = tuple(int(part) if NUMBER.fullmatch(part) else 0 for part in text.split("x"))
    if len(found) not in {form.count("x") + 1 for form in forms} or min(found) < 1:
        raise ValueError(f"{name}={text}: {' or '.join(forms)} was expected, as in {example}")
    return found


def window_tile(name: str, text: str) -> tuple[int, ...]:
    """(queries, keys) or (queries, keys, warps, stages) of `64x32`, `64x32x4x2`; () of "". Raises ValueError."""
    found = numbers(name, text, WINDOW_FORMS, "64x32")
    if any(size < 16 or size & (size - 1) for size in found[:2]):
        raise ValueError(f"{name}={text}: queries and keys must be powers of 2, and 16 or more")
    if any(warps > MOST_WARPS or warps & (warps - 1) for warps in found[2:3]):
        raise ValueError(f"{name}={text}: warps must be a power of 2, and {MOST_WARPS} or fewer")
    return found


def product_tile(name: str, text: str) -> tuple[int, ...]:
    """(rows, columns, depth) of `64x128x128`; () of "". Raises ValueError; which tiles a GPU has is not known here."""
    return numbers(name, text, (PRODUCT_FORM,), "64x128x128")


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable: how its value is read (ValueError of a wrong one), and what it takes, in words."""

    read: Callable[[str, str], object]
    takes: str
    does: str


VARIABLES: Final[Mapping[str, Variable]] = {
    BATCH_INVARIANT: Variable(
        switch, "1", "every score depends only on its prompt; on GPUs with VLLM_BATCH_INVARIANT=1"
    ),
    CHECK: Variable(switch, "0", "starts what is known not to be exact, with a warning"),
    ATTENTION: Variable(switch, "0", "vLLM's attention"),
    ALL_REDUCE: Variable(switch, "0", "vLLM's sums over GPUs"),
    FP8: Variable(switch, "0", "vLLM's products of fp8 models"),
    EXPERTS: Variable(switch, "0", "vLLM's tiles for mixtures of experts"),
    TILE: Variable(product_tile, PRODUCT_FORM, "one tile for all products of 16-bit types; one of those of the GPU"),
    WINDOW_TILE: Variable(window_tile, " or ".join(WINDOW_FORMS), "the tile of attention with windows, by Triton"),
    FAST_PREFIXES: Variable(switch, "1", "work on prefixes that prompts share is done once"),
    QUICK_START: Variable(switch, "1", "a server on a CPU starts faster"),
}
"""Every variable of this package. Switches take 1 and 0; `takes` names the value that is not the default."""


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError, in one line with its name, for the first variable whose value is wrong, and for one that
    begins as these do and does not exist."""
    for name, variable in VARIABLES.items():
        variable.read(name, environ.get(name, ""))
    for name in environ:
        if name.startswith(f"{BATCH_INVARIANT}_") and name not in VARIABLES:
            near = get_close_matches(name, VARIABLES, n=1)
            meant = f"; did you mean {near[0]}?" if near else f": there are {', '.join(VARIABLES)}"
            raise ValueError(f"{name} is no variable of this package{meant}")


def main() -> int:
    """Print each variable; 2 where a value here is wrong."""
    for name, variable in VARIABLES.items():
        print(f"{name}={variable.takes}: {variable.does} (here: {os.environ.get(name) or 'not set'})")
    try:
        check()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
