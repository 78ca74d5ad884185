"""Who imports whom, as docs/architecture.md says: downwards only, and the algorithm asks nobody."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = (
    ("icm_vllm",),
    ("core",),
    ("src.icm",),
    ("src.results",),
    ("src.pipeline",),
    ("contrib",),
    ("src.experiments",),
)
"""The packages, each row below the next one."""
WHAT_PROMPTS_ARE_MADE_OF = {f"core.llm_api.{name}" for name in ("types", "labels", "tokens")}
"""What src/icm may know of core: texts, tokens and labels. Whoever tokenizes is handed to it."""
PURE = {"asyncio", "aiohttp", "io", "os", "pathlib", "shutil", "socket", "sqlite3", "subprocess", "threading", "urllib"}
"""What src/icm imports none of: files, processes, network."""


def imports(package: str) -> dict[str, set[str]]:
    """Module -> everything that it imports, by full name."""
    folder = REPOSITORY / package.replace(".", "/")
    found = {}
    for file in sorted(folder.rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names.add(node.module or "")
        found[str(file.relative_to(REPOSITORY))] = names
    assert found, package
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_every_package_stands_in_a_row() -> None:
    packages = {f"src.{folder.name}" for folder in (REPOSITORY / "src").iterdir() if (folder / "__init__.py").exists()}
    assert packages | {"contrib", "core", "icm_vllm"} == {package for row in ROWS for package in row}


def test_imports_go_downwards() -> None:
    for height, row in enumerate(ROWS):
        above = [package for higher in ROWS[height + 1 :] for package in higher]
        above += ["scripts", "benchmarks", "tests"]
        for package in row:
            for module, names in imports(package).items():
                upwards = {name for name in names for other in above if within(name, other)}
                assert not upwards, f"{module} imports {upwards}"


def test_the_algorithm_asks_no_engine_and_no_file() -> None:
    for module, names in imports("src.icm").items():
        ours = {name for name in names if within(name, "core")}
        assert ours <= WHAT_PROMPTS_ARE_MADE_OF, f"{module} imports {ours}"
        outside = {name for name in names if name.partition(".")[0] in PURE}
        assert not outside, f"{module} imports {outside}"
