from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path

import pytest

from core.cpu import fast_type, kv_cache_gib
from core.vllm_server import free_port
from scripts import vllm_command
from scripts.vllm_command import LaunchError, Section, command, locate_model, main, read_section, serve_options, take

REPO_ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = REPO_ROOT / "scripts" / "launch_vllm_server.sh"


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_command.importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin="vllm"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "vllm_config.yaml"
    path.write_text(
        "base: {env: {A: '1', B: '2'}, options: {block-size: 16, enforce-eager: true}}\n"
        "tiny:\n  inherit: base\n  model: org/tiny\n  env: {B: '3'}\n  options: {enforce-eager: false, dtype: half}\n"
        "other: {inherit: base}\n"
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "some model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def test_a_section_is_laid_over_what_it_inherits(config: Path) -> None:
    assert read_section("tiny", config) == Section(
        "org/tiny", {"A": "1", "B": "3"}, {"block-size": 16, "enforce-eager": False, "dtype": "half"}
    )


def test_any_hugging_face_id_gets_the_section_for_others(config: Path) -> None:
    assert read_section("org/name", config) == Section(
        "org/name", {"A": "1", "B": "2"}, {"block-size": 16, "enforce-eager": True}
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a\n", "one section a size"),
        ("tiny: {inherit: tiny}\n", "cannot inherit from 'tiny'"),
        ("tiny: {inherit: nobody}\n", "cannot inherit from 'nobody'"),
        ("tiny: {modle: x}\n", "unknown key 'modle'"),
        ("tiny: {options: [a]}\n", "options must be"),
        ("tiny: {options: {a: [b]}}\n", "options must be"),
        ("tiny: {deterministic: {flags: [b]}}\n", "may hold `env` and `options`"),
        ("tiny: {\n", "cannot read"),
    ],
)
def test_a_malformed_configuration_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(LaunchError, match=complaint):
        read_section("tiny", path)


@pytest.mark.parametrize("size", ["8B", "70B", "405B", "local"])
def test_every_size_of_the_shipped_configuration_is_complete(size: str) -> None:
    section = read_section(size)
    assert section.model
    assert section.options["enable-prefix-caching"] is True
    assert section.options["block-size"] == 16 or size == "local"


@pytest.mark.parametrize("size", ["8B", "70B", "405B", "some/model"])
def test_gpu_servers_are_started_in_vllms_mode_and_ours(size: str) -> None:
    section = read_section(size)
    assert section.env["VLLM_BATCH_INVARIANT"] == section.env["ICM_BATCH_INVARIANT"] == "1"
    assert section.env["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert section.options["attention-config.backend"] == "FLASH_ATTN"
    inexact = read_section(size, deterministic=False)
    assert {"VLLM_BATCH_INVARIANT", "ICM_BATCH_INVARIANT"}.isdisjoint(inexact.env)
    assert "attention-config.backend" not in inexact.options


WINDOWS = '{"text_config": {"layer_types": ["full_attention", "sliding_attention"]}}'


@pytest.mark.parametrize(
    ("config", "given", "backend"),
    [
        ("{}", [], "FLASH_ATTN"),
        (WINDOWS, [], "TRITON_ATTN"),
        ('{"kv_lora_rank": 512}', [], "FLASH_ATTN_MLA"),
        (WINDOWS, ["--attention-config.backend", "FLEX_ATTENTION"], "FLEX_ATTENTION"),
        (WINDOWS, ["--attention_config.backend=triton_attn"], "triton_attn"),
        ("{}", ["--attention-backend", "FLASHINFER"], "FLASHINFER"),
        (WINDOWS, ["--no-deterministic"], ""),
    ],
)
def test_the_attention_is_the_one_that_is_exact_for_the_model(
    with_vllm: None, folder: Path, monkeypatch: pytest.MonkeyPatch, config: str, given: list[str], backend: str
) -> None:
    monkeypatch.setattr(vllm_command, "plugin_installed", lambda: True)
    (folder / "config.json").write_text(config)
    _, argv = command([str(folder), "--port", str(free_port()), *given], {})
    named = [value for name, value in pairwise([*argv, ""]) if name.endswith("backend")]
    named += [argument.partition("=")[2] for argument in argv if "backend=" in argument]
    assert named == [backend] * bool(backend)
    assert ("--disable-hybrid-kv-cache-manager" in argv) == (config == WINDOWS)


def test_all_blocks_of_a_prompt_are_kept_unless_told_otherwise(with_vllm: None, folder: Path) -> None:
    (folder / "config.json").write_text(WINDOWS)
    given = [str(folder), "--port", str(free_port()), "--no-deterministic", "--no-disable-hybrid-kv-cache-manager"]
    _, argv = command(given, {})
    assert "--disable-hybrid-kv-cache-manager" not in argv


def test_the_cpu_server_is_exact_in_our_way_as_vllms_fails_there() -> None:
    section = read_section("local")
    assert "VLLM_BATCH_INVARIANT" not in section.env
    assert section.env["ICM_BATCH_INVARIANT"] == "1"


@pytest.mark.parametrize(
    ("limits", "given", "dtype", "gib", "told"),
    [
        ({}, [], "bfloat16", "2", "bfloat16, because this CPU has"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, [], "float32", "4", "float32, because ONEDNN_MAX_CPU_ISA=AVX2"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, ["--dtype", "bfloat16"], "bfloat16", "2", ""),
        ({}, ["--dtype=float32"], "float32", "4", ""),
        ({"VLLM_CPU_KVCACHE_SPACE": "9"}, ["--dtype=float32"], "float32", "9", ""),
    ],
)
def test_a_cpu_server_computes_in_the_fast_type_unless_told_otherwise(
    with_vllm: None,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limits: dict[str, str],
    given: list[str],
    dtype: str,
    gib: str,
    told: str,
) -> None:
    monkeypatch.setattr(vllm_command, "plugin_installed", lambda: True)
    monkeypatch.setattr(vllm_command, "kv_cache_gib", partial(kv_cache_gib, memory=64 << 30))
    monkeypatch.setattr(vllm_command, "fast_type", lambda environ: fast_type(environ, folder.parent / "cpuinfo"))
    (folder.parent / "cpuinfo").write_text("flags : avx2 avx512_bf16 amx_bf16\n")
    env, argv = command(["local", "--model", str(folder), "--port", str(free_port()), *given], limits)
    types = [value for name, value in pairwise([*argv, ""]) if name == "--dtype"]
    types += [argument.split("=")[1] for argument in argv if argument.startswith("--dtype=")]
    assert types == [dtype]
    assert {**env, **limits}["VLLM_CPU_KVCACHE_SPACE"] == gib
    said = capsys.readouterr().err
    assert said.count("\n") == bool(told)
    assert told in said


def test_memory_that_vllm_would_not_take_is_refused(with_vllm: None, folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("local: {model: x, env: {VLLM_CPU_KVCACHE_SPACE: 2.5}, options: {dtype: cpu}}\n")
    with pytest.raises(LaunchError, match=r"VLLM_CPU_KVCACHE_SPACE: 2\.5: vLLM takes a whole number"):
        command(["local", "--model", str(folder), "--port", str(free_port())], {}, config)


@pytest.mark.parametrize("size", ["8B", "70B", "405B", "local", "some/model"])
def test_no_deterministic_leaves_vllms_own_kernels(size: str) -> None:
    exact, fast = read_section(size), read_section(size, deterministic=False)
    assert not [name for name in fast.env if "BATCH_INVARIANT" in name]
    assert not [name for name in fast.options if name.startswith("attention-config")]
    assert exact.options.items() >= fast.options.items()
    assert exact.env.items() >= fast.env.items()


@pytest.mark.parametrize(
    ("flags", "exact"),
    [
        ([], True),
        (["--deterministic"], True),
        (["--no-deterministic"], False),
        (["--deterministic", "--no-deterministic"], False),
        (["--no-deterministic", "--deterministic"], True),
    ],
)
@pytest.mark.usefixtures("with_vllm")
def test_the_last_flag_decides_and_none_reaches_vllm(flags: list[str], exact: bool, folder: Path) -> None:
    env, argv = command([str(folder), "--port", str(free_port()), *flags], {})
    assert ("VLLM_BATCH_INVARIANT" in env) is exact
    assert not [argument for argument in argv if "deterministic" in argument]


@pytest.mark.parametrize("size", ["9B", "gpu", "other", "local2"])
def test_an_unknown_size_lists_the_known_ones(size: str) -> None:
    with pytest.raises(LaunchError, match="8B, 70B, 405B, local"):
        read_section(size)


@pytest.mark.parametrize(
    "given", [["--block-size", "32"], ["--block-size=32"], ["--block_size=32"], ["--no-block-size"]]
)
def test_an_option_on_the_command_line_replaces_the_configured_one(given: list[str]) -> None:
    section = Section("m", {}, {"block-size": 16, "enforce-eager": True, "async": False})
    assert serve_options(section, given) == ["--enforce-eager", "--no-async", *given]


def test_a_middleware_on_the_command_line_comes_beside_ours() -> None:
    section = Section("m", {}, {"middleware": "core.ours"})
    assert serve_options(section, ["--middleware", "theirs.X"]) == [
        "--middleware",
        "core.ours",
        "--middleware",
        "theirs.X",
    ]


def test_take_finds_both_spellings_and_the_last_one() -> None:
    assert take("port", ["--port", "1", "--x", "--port=2"], "0") == ("2", ["--x"])
    assert take("port", ["--portly"], "0") == ("0", ["--portly"])
    with pytest.raises(LaunchError, match="needs a value"):
        take("port", ["--port"], "0")


def test_a_folder_and_an_id_are_told_apart(folder: Path) -> None:
    assert locate_model(str(folder)) == str(folder)
    assert locate_model("org/name") == "org/name"
    for missing in ("/no/such/folder", "./nothing", "a/b/c", "~/nothing-here"):
        with pytest.raises(LaunchError, match="no model in"):
            locate_model(missing)
    with pytest.raises(LaunchError, match="make setup-local MODEL=tiny"):
        locate_model("models/tiny", folder.parent)
    with pytest.raises(LaunchError, match=r"no model in models/gema-3; did you mean gemma-3-270m\?"):
        locate_model("models/gema-3", folder.parent)


@pytest.mark.usefixtures("with_vllm")
def test_the_command_of_a_server(folder: Path, config: Path) -> None:
    environ = {"B": "mine", "PYTHONPATH": "/elsewhere"}
    env, argv = command([str(folder), "--port", "18431", "--dtype", "half"], environ, config)
    assert env == {"A": "1", "PYTHONPATH": f"{REPO_ROOT}:/elsewhere"}
    assert argv[:4] == [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert argv[4:] == [
        *("--model", str(folder), "--host", "127.0.0.1", "--port", "18431", "--served-model-name", "some model"),
        *("--block-size", "16", "--enforce-eager", "--dtype", "half"),
    ]


NODES = ["--tensor-parallel-size", "8", "--pipeline-parallel-size", "2", "--nnodes", "2", "--master-addr", "10.0.0.1"]


@pytest.mark.usefixtures("with_vllm")
def test_options_of_several_machines_reach_vllm() -> None:
    for own in (["--node-rank", "0", *NODES], ["--distributed-executor-backend", "ray", *NODES[:4]]):
        env, argv = command(["405B", "--host", "0.0.0.0", "--port", "18431", *own], {})
        assert argv[3] == "vllm.entrypoints.openai.api_server"
        assert argv[-len(own) :] == own
        assert argv.count("--tensor-parallel-size") == 1, "the configured 8 is replaced, not doubled"
        assert argv[argv.index("--host") + 1] == "0.0.0.0"
        assert env["VLLM_BATCH_INVARIANT"] == "1"


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [("0.0.0.0", "", True), ("::", "", True), ("0.0.0.0", "secret", False), ("127.0.0.2", "", False),
     ("localhost", "", False)],
)  # fmt: skip
def test_a_server_that_others_reach_without_a_key_is_warned_of(
    host: str, key: str, warned: bool, folder: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"VLLM_API_KEY": key} if key else {}
    command([str(folder), "--host", host, "--port", "18431"], environ, config)
    told = capsys.readouterr().err
    assert told.startswith(f"launch_vllm_server: --host {host}: whoever reaches this machine") == warned
    assert len(told.splitlines()) == warned


@pytest.mark.usefixtures("with_vllm")
def test_a_file_of_the_callers_folder_is_no_module_of_the_server(folder: Path, config: Path, tmp_path: Path) -> None:
    env, argv = command([str(folder), "--port", "18431"], {}, config)
    (tmp_path / "shadowing.py").write_text("")
    interpreter = argv[: argv.index("-m")]
    done = subprocess.run([*interpreter, "-m", "shadowing"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "No module named shadowing" in done.stderr
    done = subprocess.run(
        [*interpreter, "-c", "import icm_vllm"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_headless_node_has_the_servers_settings_but_listens_nowhere() -> None:
    _, server = command(["405B", "--port", "18431", "--node-rank", "0", *NODES], {})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env, node = command(["405B", "--port", port, "--node-rank", "1", *NODES, "--headless"], {})
    # The module of a server parses --headless and ignores it; `vllm serve` takes its model as an argument.
    assert node[:4] == [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]
    assert node[4:6] == ["serve", "meta-llama/Llama-3.1-405B-FP8"]
    assert "--host" not in node
    assert "--port" not in node
    rank = server.index("--node-rank")
    assert node[6:] == [*server[server.index("--served-model-name") : rank + 1], "1", *NODES, "--headless"]
    assert env == command(["405B", "--port", "18431"], {})[0]


@pytest.mark.usefixtures("with_vllm")
def test_a_port_in_use_is_refused(folder: Path, config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LaunchError, match="in use"):
            command([str(folder), "--port", str(taken.getsockname()[1])], {}, config)


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize("port", ["http", "-1", "65536", ""])
def test_a_port_that_is_none_is_refused(folder: Path, config: Path, port: str) -> None:
    with pytest.raises(LaunchError, match="number between"):
        command([str(folder), f"--port={port}"], {}, config)


@pytest.mark.usefixtures("with_vllm")
def test_a_key_is_not_taken_from_the_command_line(folder: Path, config: Path) -> None:
    for given in (["--api-key", "sk-1"], ["--api_key=sk-1"]):
        with pytest.raises(LaunchError) as error:
            command([str(folder), *given], {}, config)
        assert "VLLM_API_KEY" in str(error.value)
        assert "sk-1" not in str(error.value)


@pytest.mark.usefixtures("with_vllm")
def test_libraries_of_the_environment_are_named_only_where_they_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("other: {env: {LD_PRELOAD: '{prefix}/lib/some.so', CORES: '0 if {prefix}/lib/some.so'}}")
    monkeypatch.setattr(vllm_command.sys, "prefix", str(tmp_path))
    assert not {"LD_PRELOAD", "CORES"} & set(command([str(folder)], {}, config)[0])
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "some.so").touch()
    environment = command([str(folder)], {}, config)[0]
    assert environment["LD_PRELOAD"] == f"{tmp_path}/lib/some.so"
    assert environment["CORES"] == "0"


def test_without_vllm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, folder: Path, config: Path) -> None:
    monkeypatch.setattr(vllm_command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="vLLM is not installed"):
        command([str(folder)], {}, config)


def test_no_argument_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCHER), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_launcher_prints_the_command_instead_of_running_it(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    done = launch(str(folder), "--print", "--seed", "1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[0] == "env"
    assert words[words.index("--model") + 1] == str(folder)
    assert words[-2:] == ["--seed", "1"]


def test_a_port_in_use_does_not_matter_to_what_is_only_printed(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = launch("--print", str(folder), "--port", port, PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stderr
        words = shlex.split(done.stdout)
        assert words[words.index("--port") + 1] == port
        assert "--print" not in words
        refused = launch(str(folder), "--port", port, PYTHONPATH=str(tmp_path))
    assert refused.returncode == 2
    assert "in use" in refused.stderr


@pytest.mark.parametrize("arguments", [("9B",), (), ("/no/such/model",)])
def test_the_launcher_refuses_in_one_line_with_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = launch(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("launch_vllm_server: ")
    assert done.stderr.count("\n") == 1


def test_the_launcher_says_where_there_is_no_python() -> None:
    done = launch("8B", PYTHON="/no/such/python")
    assert done.returncode == 2
    assert "make setup" in done.stderr


def test_the_launcher_explains_itself() -> None:
    done = launch("--help")
    assert done.returncode == 0
    assert "405B|70B|8B|local" in done.stdout


def test_exact_scores_are_refused_where_vllm_would_not_find_our_plugin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(vllm_command, "vllm_installed", lambda: True)
    monkeypatch.setattr(vllm_command, "entry_points", lambda group: [])
    with pytest.raises(LaunchError, match="--no-deterministic"):
        command([str(tmp_path)], {})
    assert "ICM_BATCH_INVARIANT" not in command([str(tmp_path), "--no-deterministic"], {})[0]
    assert command([str(tmp_path)], {"ICM_BATCH_INVARIANT": "0"})


WINDOWED = '{"model_type": "mistral", "sliding_window": 4096}'


@pytest.mark.usefixtures("with_vllm")
def test_what_is_known_not_to_be_exact_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_command, "plugin_installed", lambda: True)
    (folder / "config.json").write_text(WINDOWED)
    server = [str(folder), "--port", str(free_port())]
    inexact = ["--attention-config.backend", "FLASH_ATTN"]
    with pytest.raises(LaunchError, match=r"windows of attention, by FlashAttention: .*--no-deterministic") as refused:
        command([*server, *inexact], {})
    assert "\n" not in str(refused.value)
    command([*server, *inexact, "--no-deterministic"], {})
    command([*server, *inexact], {"ICM_BATCH_INVARIANT_CHECK": "0"})
    command([*server, *inexact], {"ICM_BATCH_INVARIANT": "0"})
    command([*server, "--attention-config.backend=TRITON_ATTN"], {})
    command(["local", "--model", *server], {})
    graphs = ["--no-enforce-eager", "--tensor-parallel-size=2", "--attention-config.backend=TRITON_ATTN"]
    with pytest.raises(LaunchError, match="CUDA graphs with tensor parallelism"):
        command([*server, *graphs], {})


@pytest.mark.usefixtures("with_vllm")
def test_a_model_that_cannot_be_read_is_left_to_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_command, "plugin_installed", lambda: True)
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        command([str(folder), "--port", str(free_port())], {})


RECURRENT = '{"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}'


@pytest.mark.usefixtures("with_vllm")
def test_recurrent_layers_are_refused_on_a_cpu_and_start_without_exact_scores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_command, "plugin_installed", lambda: True)
    (folder / "config.json").write_text(RECURRENT)
    server = ["local", "--model", str(folder), "--port", str(free_port())]
    with pytest.raises(LaunchError, match=r"recurrent layers .*--no-deterministic starts it"):
        command(server, {})
    _, argv = command([*server, "--no-deterministic"], {})
    assert "--disable-hybrid-kv-cache-manager" not in argv
    (folder / "config.json").write_text("{}")
    assert "--disable-hybrid-kv-cache-manager" in command(server, {})[1]


QUANTIZED = {
    "fp8 with scales of blocks": '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}',
    "mixture of experts, mxfp4": '{"num_local_experts": 8, "quantization_config": {"quant_method": "mxfp4"}}',
}


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_that_this_cpu_has_no_kernel_for_are_refused_at_once(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_command, "plugin_installed", lambda: True)
    monkeypatch.setattr(vllm_command, "cpu_flags", lambda: frozenset({"avx512f"}))
    (folder / "config.json").write_text(QUANTIZED[name])
    port = ["--port", str(free_port())]
    server = ["local", "--model", str(folder), *port]
    for given in ([], ["--no-deterministic"]):
        with pytest.raises(LaunchError, match=f"vLLM computes {name} on a CPU with AMX alone") as refused:
            command([*server, *given], {})
        assert "\n" not in str(refused.value)
    command(server, {"ICM_BATCH_INVARIANT_CHECK": "0"})
    command([str(folder), *port], {})
    for flags in (frozenset[str](), frozenset({"avx512f", "amx_tile"})):
        monkeypatch.setattr(vllm_command, "cpu_flags", lambda flags=flags: flags)
        command(server, {})


BOTH = ["--no-enforce-eager", "--attention-config.backend", "TRITON_ATTN"]


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(
    "given",
    [
        *(["-tp", "2", *BOTH], ["-tp=2", *BOTH], ["-t", "2", *BOTH], ["--tensor-para", "2", *BOTH]),
        ["--tensor_parallel_size=2", *BOTH],
        ["-tp", "2", "--no-enf", *BOTH[1:]],
        *(["-ac.backend", "FLASH_ATTN"], ["-ac", '{"backend": "FLASH_ATTN"}'], ["-ac.backend=FLASH_ATTN"]),
        ["--attention-config", '{"backend": "FLASH_ATTN", "flash_attn_version": 3}'],
        ['--attention_conf={"backend": "FLASH_ATTN"}'],
        ["--attention-b=FLASH_ATTN"],
    ],
)
def test_what_is_not_exact_is_refused_however_it_is_spelled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    monkeypatch.setattr(vllm_command, "plugin_installed", lambda: True)
    (folder / "config.json").write_text(WINDOWED)
    with pytest.raises(LaunchError, match="scores would not be exact with"):
        command([str(folder), "--port", str(free_port()), *given], {})


@pytest.mark.usefixtures("with_vllm")
def test_the_attention_of_a_json_object_takes_the_place_of_the_configured_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_command, "plugin_installed", lambda: True)
    given = ["-ac", '{"backend": "TRITON_ATTN", "flash_attn_version": 3}']
    _, argv = command([str(folder), "--port", str(free_port()), *given], {})
    assert argv[-4:] == [
        *("--attention-config.backend", "TRITON_ATTN", "--attention-config.flash_attn_version", "3"),
    ]
    assert "FLASH_ATTN" not in argv, "vLLM would take the last of two"


@pytest.mark.usefixtures("with_vllm")
def test_the_launchers_own_options_may_be_abbreviated(folder: Path, config: Path) -> None:
    port = str(free_port())
    _, argv = command([str(folder), "--por", port, "--ho=0.0.0.0", "--ser", "x", "-q", "fp8"], {}, config)
    assert argv[argv.index("--port") + 1] == port
    assert argv[argv.index("--host") + 1] == "0.0.0.0"
    assert argv[argv.index("--served-model-name") + 1] == "x"
    assert argv[-2:] == ["--quantization", "fp8"]
    with pytest.raises(LaunchError, match="VLLM_API_KEY"):
        command([str(folder), "--api-k", "sk-1"], {}, config)


@pytest.mark.usefixtures("with_vllm")
def test_a_model_may_have_several_names(folder: Path, config: Path) -> None:
    given = ["--served-model-name", "a", "b", "--dtype", "half"]
    _, argv = command([str(folder), "--port", str(free_port()), *given], {}, config)
    assert argv[-len(given) :] == given
    assert argv.count("--served-model-name") == 1


@pytest.mark.usefixtures("with_vllm")
@pytest.mark.parametrize(
    "wrong",
    [
        *("ICM_BATCH_INVARIANT_WINDOW_TILE=abc", "ICM_BATCH_INVARIANT_WINDOW_TILE=63x64"),
        *("ICM_BATCH_INVARIANT_WINDOW_TILE=64x32x3x2", "ICM_BATCH_INVARIANT_TILE=64x128"),
        *("ICM_BATCH_INVARIANT=true", "ICM_BATCH_INVARIANT_FP8=off", "ICM_FAST_PREFIXES=yes", "ICM_QUICK_START=2"),
    ],
)
def test_a_wrong_value_of_a_variable_is_refused_by_name(
    folder: Path, config: Path, wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, value = wrong.partition("=")
    monkeypatch.setenv(name, value)
    assert main([str(folder)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"launch_vllm_server: {wrong}: ")
    assert told.count("\n") == 1
