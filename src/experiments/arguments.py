"""The flags of the search, shared by every command that runs it: those of the published code, and this project's."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from core.flags import FlagParser, meant, number
from src.experiments.contradictions import contradicted, message_of, out_of_range
from src.experiments.request import DataRequest, ModelRequest
from src.icm.objective import Calibration
from src.icm.problem import BootstrapStart, LayoutName, Scheduler, SearchSettings, StartShare, Stop
from src.icm.searches import DEFAULT, SEARCHES, default_search
from src.icm.testbeds import TESTBEDS, BadInput, ConsistencyMode, GroupedBy
from src.pipeline.testbed_files import SUFFIXES, testbed_path

Arguments = argparse._ArgumentGroup | argparse.ArgumentParser


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, model and search: every flag of the published code under its own name and default, and ours."""
    defaults, of_data, of_model = SearchSettings(), DataRequest(), ModelRequest()
    data = parser.add_argument_group("data")
    data.add_argument(
        "--testbed",
        type=testbed_named,
        default=of_data.testbed,
        metavar="{NAME,FILE}",
        help=f"{', '.join(TESTBEDS)} (icm testbed --list), or mine.yaml, or mine.py, whose code is "
        "run (docs/testbeds.md)",
    )
    data.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="your own claims instead of a testbed, or in place of those that --testbed FILE names: JSON, JSON lines, "
        "CSV, Parquet, or a folder by save_to_disk (docs/data.md)",
    )
    data.add_argument("--data_dir", type=Path, default=of_data.data_dir, help="where the testbeds' files lie")
    data.add_argument(
        "--batch_size", type=at_least(2), default=of_data.batch_size, help="claims in the pool (whole groups)"
    )
    data.add_argument(
        "--consistency",
        choices=get_args(ConsistencyMode),
        default=of_data.consistency,
        help="constraints between claims of a group; upstream reproduces keys that leak gold labels",
    )
    add_reading_arguments(data)
    data.add_argument(
        "--known",
        type=Path,
        metavar="FILE",
        help="labels that are known and kept, such as answers of a person: CSV, JSON or JSON lines with a column label "
        "(empty or unsure: not known) and either row (as in labels.jsonl) or the claim's own columns "
        "(docs/known-labels.md). A column of --data: --columns known=THEIRS",
    )
    data.add_argument(
        "--gold_seeds",
        type=at_least(0),
        default=of_data.gold_seeds,
        metavar="N",
        help="for experiments: the gold labels of N claims of the pool are known, drawn at random by the seed "
        "(default: 0, none)",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", default=of_model.model, help="name under which the model is served")
    model.add_argument(
        "--use_vllm",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a vLLM server without rate limits, or an external API; default: whichever is configured",
    )
    model.add_argument("--direct", action="store_true", help="vLLM in this process, no server; --model is a path or id")
    model.add_argument(
        "--missing_label",
        choices=("error", "floor"),
        default=None,
        help="an answer without a label token: stop, or floor it and count it (default: error)",
    )
    model.add_argument(
        "--prompts_per_request",
        type=at_least(1),
        default=None,
        help="split a pool into requests of this many prompts (default: one request)",
    )
    model.add_argument("--read_timeout", type=above_zero, default=None, help="seconds for one answer (default: 900)")

    search = parser.add_argument_group("search")
    search.add_argument("--alpha", type=finite, default=30.0, help="weight of mutual predictability in U")
    search.add_argument(
        "--num_seed",
        type=at_least(0),
        default=None,
        help=f"claims labelled at random (default: {defaults.num_seed}, or 0 where labels are known)",
    )
    search.add_argument("--K", type=at_least(0), default=defaults.K, help="iterations at most")
    search.add_argument(
        "--consistency_fix_K",
        type=at_least(0),
        default=defaults.consistency_fix_K,
        help="repairs tried for an inconsistent proposal",
    )
    search.add_argument(
        "--decay", type=finite, default=defaults.decay, help="the paper's beta with --scheduler log; the base with exp"
    )
    search.add_argument("--initial_T", type=finite, default=defaults.initial_T, help="first temperature, units of U")
    search.add_argument("--final_T", type=finite, default=defaults.final_T, help="lowest temperature, units of U")
    search.add_argument(
        "--scheduler",
        choices=get_args(Scheduler),
        default=defaults.scheduler,
        help="log: T0/(1+decay*ln(n)); log-upstream: T0/(1+2*ln(1+accepted)); exp: T0*decay^accepted",
    )
    search.add_argument(
        "--stop",
        choices=get_args(Stop),
        default=defaults.stop,
        help="labelled: when no claim is left to try and --patience proposals changed nothing; K: after K",
    )
    search.add_argument("--patience", type=at_least(1), default=defaults.patience, help="see --stop")
    search.add_argument(
        "--calibrate",
        choices=get_args(Calibration),
        default="none",
        help="mean: subtract the pool's mean log-odds from every score (changes the objective)",
    )
    search.add_argument(
        "--prior",
        type=share_or_auto,
        default=None,
        metavar="{P,auto}",
        help="with --calibrate mean: the share of claims that are True, where it is known and not a half; the "
        "(1 - P)-quantile of the pool's log-odds is then subtracted in place of their mean; auto: estimated from the "
        "model's answers before the search, without labels, and the mean where they do not say (docs/algorithm.md)",
    )
    search.add_argument(
        "--start_share",
        choices=get_args(StartShare),
        default=None,
        help="share of True among random first labels: a half, or what --prior says (default: prior with --prior, else "
        "half)",
    )
    search.add_argument(
        "--layout",
        choices=get_args(LayoutName),
        default=defaults.layout,
        help="order of demonstrations: prefix tree, or the published code's fixed order",
    )
    search.add_argument(
        "--anchors",
        type=at_least(0),
        default=defaults.anchors,
        help="labels that stand last in every prompt of a tree, the same for all",
    )
    search.add_argument(
        "--max_tail",
        type=at_least(1),
        default=defaults.max_tail,
        help="labels appended to the tree before it is rebuilt at the latest (default: as a cost model says)",
    )

    search.add_argument(
        "--context_cap",
        type=at_least(2),
        default=None,
        metavar="C",
        help="cheaper: at most C demonstrations in every prompt, a balanced sample drawn anew whenever the pool has "
        "doubled (changes the objective; default: all other labels)",
    )
    search.add_argument(
        "--best_of",
        type=at_least(1),
        default=defaults.best_of,
        metavar="M",
        help="cheaper: predict M claims an iteration and evaluate only the surest change (same objective)",
    )
    search.add_argument(
        "--local_gain",
        action="store_true",
        help="cheaper: take in a new claim by its own term of U; the whole pool is asked before labels are changed, "
        "when it has doubled, and at the end (growth follows an estimate of the objective)",
    )
    search.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=defaults.mirror,
        help="once settled, flip every label if U says so: inverted labels are a second optimum",
    )


def add_choice_of_search(parser: argparse.ArgumentParser) -> None:
    """Which search labels the pool, and the settings of those that are not the paper's."""
    defaults = SearchSettings()
    search = parser.add_argument_group("which search")
    each = "; ".join(f"{name}: {what}" for name, what in SEARCHES.items())
    meant = "" if DEFAULT == "annealing" else ", or annealing where a setting is given that only annealing uses"
    search.add_argument("--search", choices=list(SEARCHES), help=f"{each} (default: {DEFAULT}{meant})")
    search.add_argument(
        "--bootstrap_rounds",
        type=at_least(1),
        default=defaults.bootstrap_rounds,
        metavar="R",
        help="with --search bootstrapping: rounds at most",
    )
    search.add_argument(
        "--bootstrap_start",
        choices=get_args(BootstrapStart),
        default=defaults.bootstrap_start,
        help="with --search bootstrapping: the labels that the first round shows",
    )
    search.add_argument(
        "--ascent_starts",
        type=at_least(1),
        default=defaults.ascent_starts,
        metavar="S",
        help="with --search ascent: labelings that it starts with, the model's own labels and random ones",
    )
    search.add_argument(
        "--ascent_sweeps",
        type=at_least(1),
        default=defaults.ascent_sweeps,
        metavar="S",
        help="with --search ascent: sweeps over the pool of the start that goes on; the other starts are halved each",
    )
    search.add_argument(
        "--ascent_questions",
        type=at_least(1),
        default=defaults.ascent_questions,
        metavar="Q",
        help="with --search ascent: questions for each claim of the pool after which nothing new is begun",
    )
    search.add_argument(
        "--ascent_error",
        type=chance,
        default=defaults.ascent_error,
        metavar="P",
        help="with --search ascent: probability that a better labeling is refused on a part of its questions; "
        "0: refuse on all of them only",
    )
    search.add_argument(
        "--gibbs_sweeps",
        type=at_least(1),
        default=defaults.gibbs_sweeps,
        metavar="S",
        help="with --search gibbs: sweeps over the pool at most, each of two questions a claim",
    )
    search.add_argument(
        "--gibbs_temperature",
        type=not_negative,
        default=defaults.gibbs_temperature,
        metavar="T",
        help="with --search gibbs: of the first sweep; 1: labels are drawn with the model's own probabilities, 0: the "
        "likeliest are taken",
    )
    search.add_argument(
        "--gibbs_cooling",
        type=up_to_one,
        default=defaults.gibbs_cooling,
        metavar="C",
        help="with --search gibbs: each sweep's temperature is this times the one before's; 1: all have the same",
    )


class AddedUp(argparse.Action):
    """A flag that is given twice keeps both values."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if isinstance(before, str):
            values = f"{before},{values}"
        elif isinstance(before, list):
            values = [*before, *values]
        setattr(namespace, self.dest, values)


def add_reading_arguments(data: Arguments) -> None:
    """Add the flags that say how a data file is read."""
    data.add_argument(
        "--columns",
        action=AddedUp,
        metavar="OURS=THEIRS,...",
        help="of --data: which of its columns is which, as in question=prompt,choice=answer",
    )
    data.add_argument(
        "--map",
        nargs="+",
        action=AddedUp,
        metavar="COLUMN=THEIRS:OURS,...",
        help="of --data: what its values mean, as in label=yes:true,no:false",
    )
    data.add_argument(
        "--group_by",
        choices=get_args(GroupedBy),
        help="of --data: what rows of one group have in common; none: every row is a group by itself (default: "
        "consistency_id where the file has that column, else question)",
    )
    data.add_argument(
        "--skip_bad_rows",
        action="store_true",
        help="leave out rows that cannot be used (nothing in a column, a label that cannot be read, a line of JSON "
        "lines that is no JSON, a CSV row with too many or too few cells) and say how many they are",
    )


class Parser(FlagParser):
    """Reports bad input in one line, also flags that contradict each other.

    contradiction: between two settings of the search in the arguments last parsed, or one setting without a meaning
    (see out_of_range); None where there is none. A new run is refused for it. A run that an earlier version began with
    it can go on, and needs the same flags. raises: whether bad input is raised as BadInput (in a library) and does not
    end the program.
    """

    contradiction: str | None = None
    raises = False

    def error(self, message: str) -> NoReturn:
        if self.raises:
            raise BadInput(message)
        super().error(message)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """As argparse does. Raises SystemExit where two flags that were given contradict each other."""
        parsed = super().parse_args(args, namespace)
        absent = object()
        seen = super().parse_args(args, argparse.Namespace(**{action.dest: absent for action in self._actions}))
        given = {name for name, value in vars(seen).items() if value is not absent}
        if "search" in parsed:
            parsed.search_by_default = parsed.search is None
            parsed.search = parsed.search or default_search(given)
        broken = contradicted(parsed, given)
        for rule in broken:
            if not rule.of_the_search:
                self.error(message_of(rule, parsed))
        self.contradiction = next((message_of(rule, parsed) for rule in broken), None) or out_of_range(parsed)
        return parsed


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the epilog as it is, and shows each flag's default, unless there is none or its text names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS, False) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


def command_parser(
    program: str,
    docstring: str | None,
    formatter: type[argparse.HelpFormatter] = HelpFormatter,
    *,
    allow_abbrev: bool = True,
) -> Parser:
    """A parser with the module's docstring as help: the first line above the flags, the rest below."""
    first, _, rest = (docstring or "").partition("\n\n")
    return Parser(prog=program, description=first, epilog=rest, formatter_class=formatter, allow_abbrev=allow_abbrev)


def testbed_named(text: str) -> str:
    """The name of a testbed, or the path of a file that defines one."""
    if text not in TESTBEDS and testbed_path(text) is None:
        beside = {file.name for file in Path().iterdir()}
        here = [file for suffix in SUFFIXES if (file := f"{text}{suffix}") in beside]
        nearest = f"; did you mean {here[0]}?" if here else meant(text, TESTBEDS)
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r}{nearest} (choose from {', '.join(TESTBEDS)}, or a file: mine.yaml)"
        )
    return text


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    value = number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value


def share(text: str) -> float:
    """A number above 0 and below 1."""
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a share above 0 and below 1, not {text}")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def up_to_one(text: str) -> float:
    """A number above 0 and up to 1."""
    value = finite(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value


def share_or_auto(text: str) -> float | str:
    """The value of --prior."""
    if text == "auto":
        return text
    try:
        float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto, or a share above 0 and below 1, not {text!r}") from None
    return share(text)


def chance(text: str) -> float:
    """0, or a number from a millionth on and below a half."""
    value = number(text)
    if value and not 1e-6 <= value < 0.5:
        raise argparse.ArgumentTypeError(f"must be 0, or a probability from 0.000001 on and below 0.5, not {text}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of at least `least` that every library takes."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from error
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 2^63, not {value}")
        return value

    return whole_number


def lookahead_of(text: str) -> int | None:
    """The value of --lookahead; None is auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"must be auto, or a whole number up to 1024, not {text}")
    return int(text)
