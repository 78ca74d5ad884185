"""What a finished run prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from src.icm.label_names import confusion_lines, describe_counts
from src.results.messages import agreement, calibration_in_words, estimates_in_words
from src.results.run_folder import RunFolder
from src.results.run_reader import read_run
from src.results.tables import HANDED_OVER, confusion_of, result_text, results_of
from src.results.text import counted


def say_shown_again(document: Mapping[str, Any]) -> None:
    """Print on standard error that a finished run is only shown."""
    print(f"finished {document.get('finished', 'earlier')}; shown again, nothing was computed", file=sys.stderr)


def _counts(result: Mapping[str, Any]) -> str:
    if "label_counts" in result:
        return describe_counts(result)
    return f"{result['true_labels']} of {result['labelled']} True"


def _print_doubt(doubt: Mapping[str, Any]) -> None:
    """How many labels are handed over, and how often those whose gold label is known and was not used are right."""
    counts = [sum(each) for each in zip(*(part["agreement"] for part in doubt["parts"]), strict=True)]
    share = f"; of those not checked {agreement(*counts)} are as gold says" if counts[1] else ""
    print(f"  handed over          {doubt['kept']} of {doubt['claims']} labels, the others are null{share}")


def print_summary(folder: RunFolder, document: Mapping[str, Any]) -> None:
    """A finished run.json in a few lines; a warning goes to standard error."""
    result, settings, cost = document["result"], document["settings"], document["cost"]
    calibration = calibration_in_words(settings)
    print(
        f"{settings['testbed']}: {counted(result['labelled'], 'claim')} labelled by {document['engine']['model']} in "
        f"{counted(result['iterations'], 'iteration')}, {cost['seconds']:.0f} s (calibration: {calibration}; "
        f"search: {settings.get('search', 'annealing')})"
    )
    run = read_run(folder.path)
    icm, *others = results_of(run)
    print(f"  agreement with gold  {result_text(icm, run.names)}")
    if given := result.get("known"):
        where = " and ".join(document.get("known_labels", {}).get("from", []))
        source = f" (from {where})" if where else ""
        print(f"  known labels         {given}, kept{source}; the others are compared with gold")
    known = [result["icm"], result["zero_shot"], *result["predicted"].values()]
    if any(compared for _, compared in known):  # else the first line says that gold is unknown
        for row in others[:2]:
            print(f"  {row.title.replace(',', ''):<20} {result_text(row, run.names)}")
    for row in (row for row in others[2:] if row.title != HANDED_OVER):
        outside = "not taken in by the search" if row.title == "predicted" else "outside the pool"
        share = result_text(row, run.names) if row.compared else "unknown"
        print(f"  {row.title:<20} {share}  (claims {outside}, labelled from the pool's labels)")
    found = [part.estimate for part in run.searches if part.estimate is not None]
    if found:
        print(f"  {estimates_in_words(found)}")
    if doubt := document.get("doubt"):
        _print_doubt(doubt)
    if "parts" in result:
        print(f"  {len(result['parts'])} searches; U and nats are means over them, counts and seconds sums")
    print(
        f"  U {result['U']:z.2f}: {settings['alpha']:g} x {result['predictability']:z.3f} nat - "
        f"{counted(result['inconsistent'], 'inconsistent pair')}; {_counts(result)}"
    )
    if "label_counts" in result and (table := confusion_of(run)) is not None:
        print("  labels of the search by gold label:")
        print("\n".join(f"    {line}" for line in confusion_lines(table.table, table.names)))
    for change in result.get("changes_objective", []):
        print(f"  not the paper's objective: {change}")
    computed = cost["tokens_computed"]
    if computed:
        total = computed + cost["tokens_cached"]
        print(
            f"  prompt tokens {total:,.0f}, computed {computed:,.0f} (prefix cache hit rate {1 - computed / total:.3f})"
        )
    if cost.get("asked_ahead"):
        print(f"  questions asked ahead {cost['asked_ahead']:,.0f}, used {cost['ahead_used']:,.0f}")
    if cost["floored"]:
        were = "was" if cost["floored"] == 1 else "were"
        print(f"  {counted(cost['floored'], 'answer')} lacked a label token and {were} floored")
    if document["left_out"]:
        how = "--num_batches all" if "parts" in result else "--label_rest"
        are = "is" if document["left_out"] == 1 else "are"
        claims = counted(document["left_out"], "claim")
        print(f"  {claims} of the file {are} outside the pool, without a label (see {how})")
    if bad := document.get("bad_rows"):
        count = f"{bad['count']} rows of the file were" if bad["count"] > 1 else "1 row of the file was"
        print(f"  {count} left out (--skip_bad_rows), the first: {bad['first'][0]}")
    if "parts" in result:
        print(
            f"  labels {folder.labels_path}\n  parts  {folder.path}/{result['parts'][0]['part']} and so on, each a run"
        )
    else:
        print(f"  labels {folder.labels_path}\n  curves {folder.curves_path}\n  log    {folder.log_path}")
    if result["warning"]:
        print(f"warning: {result['warning']}", file=sys.stderr)
