"""Label a data set batch by batch, each batch with a model fine-tuned on the labels of the batches before it.

    python scripts/finetune_rounds.py --testbed truthfulQA --model meta-llama/Llama-3.1-8B --rounds 4 \\
        --trainer trl --train "trl sft --config {config}" --out runs/rounds -- --alpha 50 --calibrate mean

The paper's iterative fine-tuning (Wen et al. 2025): the pretrained model labels batch 1; then, for j = 1, 2, ..., it is
fine-tuned on the labels of batches 1 to j, always from the pretrained weights, and the tuned model labels batch j + 1.

This script does not train. --train is a command of yours that is run once a round, in which these are replaced:
{config} (a YAML file for --trainer), {data} (JSONL), {model} (what to begin from), {output} (the folder to write the
tuned model to) and {round}. What comes after -- goes to ICM.py, which asks each model in this process (--direct), or on
a server that is started for it (--serve), or as --label says. Finished steps are not repeated: the same command goes on
after an interruption.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

    from core.packages import need_packages

    need_packages()

import orjson  # noqa: E402

from contrib.training import Trainer, axolotl_rows, beginning_token, read_extra, trainer_config  # noqa: E402
from core.errors import StorageFailed  # noqa: E402
from core.files import write_atomically  # noqa: E402
from core.flags import FlagParser  # noqa: E402
from core.vllm_server import ServerFailed, VLLMServer  # noqa: E402
from src.experiments.arguments import Parser, add_reading_arguments, testbed_named  # noqa: E402
from src.experiments.loading import check_bad_rows  # noqa: E402
from src.experiments.request import DataRequest  # noqa: E402
from src.icm.consistency import Relation  # noqa: E402
from src.icm.problem import Stream, generator  # noqa: E402
from src.icm.testbeds import TESTBEDS, BadInput, sample_pool  # noqa: E402
from src.pipeline.datafiles import (  # noqa: E402
    claims_of,
    load_data_file,
    load_testbed,
    load_testbed_file,
    named_rows,
    read_rows,
)
from src.pipeline.testbed_files import read_testbed, testbed_path  # noqa: E402
from src.results.exports import chosen_claims, plain_rows, training_rows  # noqa: E402
from src.results.handover import write_jsonl  # noqa: E402
from src.results.messages import agreement  # noqa: E402
from src.results.run_reader import read_run  # noqa: E402
from src.results.tail import is_finished  # noqa: E402

ICM = [sys.executable, str(ROOT / "src" / "experiments" / "ICM.py")]


def build_parser() -> FlagParser:
    """The script's flags; everything after -- is ICM.py's."""
    text = (__doc__ or "").partition("\n\n")
    parser = FlagParser(description=text[0], epilog=text[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, testbed in TESTBEDS.items() if testbed.file]
    parser.add_argument(
        "--testbed", type=testbed_named, metavar="{NAME,FILE}", help=f"{', '.join(names)}, or mine.yaml, or mine.py"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="your own claims (docs/data.md); with --testbed FILE those it is for"
    )
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data", help="where the testbeds' files lie")
    parser.add_argument("--model", required=True, help="the pretrained model: path or id")
    parser.add_argument("--batch_size", type=int, default=256, help="claims in a batch, whole groups (default: 256)")
    parser.add_argument("--rounds", type=int, default=None, help="batches to label (default: all there are)")
    parser.add_argument("--seed", type=int, default=0, help="of the split into batches, and of the training")
    parser.add_argument("--trainer", choices=get_args(Trainer), default="trl", help="whose config is written")
    parser.add_argument("--extra", type=Path, metavar="FILE", help="YAML: keys that are added to that config, or win")
    parser.add_argument("--train", required=True, metavar="COMMAND", help="trains one model; see above")
    parser.add_argument("--train_last", action="store_true", help="also train on the last batch: a model of all labels")
    parser.add_argument("--least", type=float, default=0.0, metavar="NATS", help="train on labels at least so sure")
    parser.add_argument(
        "--serve",
        choices=("local", "gpu"),
        help="start scripts/launch_vllm_server.sh for each model: as a small one on this CPU, or by its path or id",
    )
    parser.add_argument("--server_flags", default="", metavar="FLAGS", help="with --serve: for vLLM")
    parser.add_argument("--label", metavar="COMMAND", help="labels one batch instead of ICM.py; {model} is replaced")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="everything is written there")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="for ICM.py: --alpha 50 --calibrate mean ...")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all rounds done, 1 a labelling or training command failed, 2 bad input, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if complaint := source_complaint(args):
        parser.error(complaint)
    try:
        rounds = Rounds(args)
        rounds.run()
    except (BadInput, StorageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"error: {error}\nWhat was finished is kept; the same command goes on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped. What was finished is kept; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def source_complaint(args: argparse.Namespace) -> str | None:
    """What is wrong with --testbed and --data together; None where they name one source of claims."""
    if args.testbed is None:
        return "name your claims: --testbed NAME, --testbed FILE or --data FILE" if args.data is None else None
    if testbed_path(args.testbed) is not None:
        return None
    if args.data is not None:
        return f"--data replaces the claims of a testbed file, and {args.testbed} is none"
    return None if TESTBEDS[args.testbed].file else f"{args.testbed} has no file to split into batches"


class CommandFailed(Exception):
    """A labelling or training command ended badly; the message names it."""


@dataclass
class Rounds:
    """The loop and its folder: batch-J/, runs/batch-J/, train-J.jsonl, train-J.yaml, model-J/, labels.jsonl."""

    args: argparse.Namespace

    def __post_init__(self) -> None:
        self.out: Path = self.args.out.resolve()
        self.testbed_file = testbed_path(self.args.testbed or "")
        parser = Parser(add_help=False, allow_abbrev=False)
        add_reading_arguments(parser)
        source = argparse.Namespace(data=self.args.data, testbed=self.args.testbed or "")
        reads, self.flags = parser.parse_known_args(self.args.flags, source)
        self.reads = DataRequest.of(reads)
        if self.reads.group_by is not None:  # batches have our columns and values; their groups are made again
            self.flags += ["--group_by", self.reads.group_by]
        self.batches = self._split()
        self._same_plan()

    def run(self) -> None:
        """Label, train, label, ... ; prints one line a step."""
        model: str = self.args.model
        labels: list[dict[str, Any]] = []
        for number in range(1, len(self.batches) + 1):
            run = self._label(number, model)
            labels += [{**row, "batch": number} for row in plain_rows(run, chosen_claims(run))]
            counts = (run.result or {}).get("icm", (0, 0))
            print(f"batch {number}: {len(run.claims)} claims by {model}; gold {agreement(*counts)}", flush=True)
            if number < len(self.batches) or self.args.train_last:
                model = self._train(number)
        write_jsonl(self.out / "labels.jsonl", labels)
        print(f"{self.out / 'labels.jsonl'}: {len(labels)} labels of {len(self.batches)} batches; last model {model}")

    def _split(self) -> list[Path]:
        """Write each batch as a data file; the split depends only on the data and --seed."""
        args = self.args
        if args.batch_size < 2 or (args.rounds is not None and args.rounds < 1):
            raise BadInput("--batch_size must be at least 2 and --rounds at least 1")
        reading, bad, weaker_as = self.reads.reading(), list[str](), "consistency_relation"
        if self.testbed_file is not None:
            testbed = read_testbed(self.testbed_file)
            testbed, claims, path = load_testbed_file(testbed, self.testbed_file, args.data_dir, args.data, bad.append)
            # The batches are also read by the testbed file, so they keep its columns and values.
            rows, weaker_as = read_rows(path), testbed.reading.columns.get(weaker_as, weaker_as)
        elif args.data is not None:
            testbed, claims, path = load_data_file(args.data, reading, bad.append)
            rows = named_rows(path, reading)
        else:
            testbed, claims, path = load_testbed(args.testbed, args.data_dir, bad.append)
            rows = named_rows(path, reading)
        check_bad_rows(self.reads, path, bad)
        name = "claims.json" if args.data is not None or self.testbed_file is not None else testbed.file
        files: list[Path] = []
        while claims and (args.rounds is None or len(files) < args.rounds):
            batch = sample_pool(claims, args.batch_size, generator(args.seed, Stream.POOL, len(files)))
            taken = {claim.of_row for claim in batch}
            claims = [claim for claim in claims if claim.of_row not in taken]
            file = self.out / f"batch-{len(files) + 1}" / name
            fields = [rows[row].fields for row in sorted(taken)]
            weaker = {claim.of_row for claim in batch if claim.relation is Relation.AT_MOST_ONE}  # a row was left out
            for at, row in enumerate(sorted(taken)):
                if row in weaker:
                    fields[at] = fields[at] | {weaker_as: "at most one"}
            content = orjson.dumps(fields, default=str, option=orjson.OPT_INDENT_2)
            if not file.exists():
                write_atomically(file, content)
            elif file.read_bytes() != content:
                raise BadInput(
                    f"{self.out}: was begun with other data, another --seed, or other groups (of a file without "
                    "consistency_id, -- --group_by none makes those of earlier versions); choose another --out"
                )
            claims_of(testbed, read_rows(file), file, testbed.reading)
            files.append(file)
        self.digest = testbed.digest
        return files

    def _same_plan(self) -> None:
        """Raises BadInput where a setting that decides labels or models changed since this folder was begun."""
        names = ("model", "batch_size", "seed", "trainer", "train", "least", "flags")
        plan: dict[str, Any] = {name: getattr(self.args, name) for name in names}
        if self.digest:  # of a testbed file's content
            plan["testbed"] = self.digest
        path = self.out / "plan.json"
        if not path.exists():
            write_atomically(path, orjson.dumps(plan, option=orjson.OPT_INDENT_2))
            return
        known = orjson.loads(path.read_bytes())
        changed = [name for name in (*names, "testbed") if known.get(name) != plan.get(name)]
        if changed:
            raise BadInput(f"{self.out}: was begun with another --{changed[0]}; use the same, or another --out")

    def _label(self, number: int, model: str) -> Any:
        file = self.batches[number - 1]
        if self.testbed_file is not None:
            data = ["--testbed", str(self.testbed_file), "--data", str(file)]
        elif self.args.data is not None:
            data = ["--data", str(file)]
        else:
            data = ["--testbed", self.args.testbed, "--data_dir", str(file.parent)]
        more = [
            *data,
            *("--batch_size", str(self.args.batch_size), "--runs_dir", str(self.out / "runs")),
            *("--run", f"batch-{number}", *self.flags),
        ]
        folder, what = self.out / "runs" / f"batch-{number}", f"labelling batch {number}"
        if is_finished(folder):
            return read_run(folder)
        if self.args.label is not None:
            _run([*_filled(self.args.label, {"model": model, "round": str(number)}), *more], what)
        elif self.args.serve is None:
            _run([*ICM, "--direct", "--model", model, *more], what)
        else:
            self._label_on_server(model, more, what)
        return read_run(folder)

    def _label_on_server(self, model: str, more: Sequence[str], what: str) -> None:
        name = Path(model).name
        options = ("--served-model-name", name, *shlex.split(self.args.server_flags))
        size = "local" if self.args.serve == "local" else model
        try:
            with VLLMServer(size=size, model=model, options=options, log=self.out / "server.log") as server:
                _run([*ICM, "--model", name, *more], what, {**os.environ, "VLLM_BASE_URL": server.url})
        except ServerFailed as error:
            raise CommandFailed(f"{what}: {error}") from None

    def _train(self, number: int) -> str:
        """Fine-tune the pretrained model on the labels of batches 1 to `number`; returns the tuned model's folder."""
        done, output = self.out / f"model-{number}", self.out / f"model-{number}.partial"
        if done.is_dir():
            return str(done)
        rows = []
        for earlier in range(1, number + 1):
            run = read_run(self.out / "runs" / f"batch-{earlier}")
            rows += list(training_rows(run, chosen_claims(run, least=self.args.least, abstained=False)))
        if not rows:
            raise BadInput(f"--least {self.args.least} leaves no label to train on")
        data, config = self.out / f"train-{number}.jsonl", self.out / f"train-{number}.yaml"
        if self.args.trainer == "axolotl":
            write_jsonl(data, axolotl_rows(rows, beginning_token(Path(self.args.model))))
        else:
            write_jsonl(data, rows)
        extra = read_extra(self.args.extra) if self.args.extra else {}
        write_atomically(
            config,
            trainer_config(
                self.args.trainer, model=self.args.model, data=data, output=output, seed=self.args.seed, extra=extra
            ),
        )
        if output.exists():
            shutil.rmtree(output)  # left by an interrupted training
        names = {"config": config, "data": data, "model": self.args.model, "output": output, "round": number}
        command = _filled(self.args.train, {name: str(value) for name, value in names.items()})
        print(f"training model {number} on {len(rows)} labels: {shlex.join(command)}", flush=True)
        _run(command, f"training model {number}")
        if not output.is_dir() or not any(output.iterdir()):
            raise CommandFailed(f"training model {number} left nothing in {output}; is that its {{output}}?")
        output.rename(done)
        return str(done)


def _filled(template: str, values: dict[str, str]) -> list[str]:
    """The words of a command with {name} replaced in each. No shell: a path stays one word."""
    words = shlex.split(template)
    for name, value in values.items():
        words = [word.replace("{" + name + "}", value) for word in words]
    return words


def _run(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> None:
    try:
        code = subprocess.run(command, check=False, env=environment).returncode
    except OSError as error:
        raise CommandFailed(f"{what}: {command[0]} cannot be run ({error.strerror})") from None
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise CommandFailed(f"{what} ended with exit code {code}: {shlex.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
