"""DirectEngine against a stand-in for the vllm module; tests of the `real_server` kind cover the real one."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
from pydantic import SecretStr

from core.cpu import KV_CACHE_SPACE, FastType, kv_cache_gib
from core.errors import APIError, ConfigurationError, MissingLabel, RequestRejected
from core.llm_api.engines import direct, open_engine
from core.llm_api.engines.direct import DirectEngine, DirectOptions
from core.llm_api.in_process import options
from core.llm_api.in_process.options import check_hub
from core.llm_api.labels import LabelSpace, SpelledLabels
from core.llm_api.types import Engine, EngineAnswer, PrefixCacheCounters, Prompt, Segment
from core.settings import Settings
from fakes.vllm_server import BOS, FALSE, TRUE, encode, hashed_log_odds, label_distribution
from tests.conftest import stand_in_platform
from tests.core.two_labels import log_odds, two

KEY = "hf_planted0123456789"
LABELS = two(TRUE, FALSE)


class FakeLLM:
    made: list[FakeLLM]
    failure: Exception | None = None

    def __init__(self, *, model: str, **arguments: object) -> None:
        if self.failure:
            raise self.failure
        self.arguments, self.calls, self.threads = arguments, [], set()
        self.stopped = 0
        core = SimpleNamespace(shutdown=self._shutdown)
        cache = SimpleNamespace(num_gpu_blocks=10, block_size=16, kv_cache_size_tokens=None)
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(model=model, max_model_len=2048),
            vllm_config=SimpleNamespace(
                cache_config=cache,
                model_config=SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: {"_name_or_path": model})),
            ),
            engine_core=core,
        )
        type(self).made.append(self)

    def _shutdown(self) -> None:
        self.stopped += 1

    def get_tokenizer(self) -> SimpleNamespace:
        return SimpleNamespace(
            encode=lambda text, add_special_tokens: [BOS] * add_special_tokens + encode(text),
            decode=lambda tokens: "".join({BOS: "<bos>", TRUE: " True"}[token] for token in tokens),
        )

    def get_metrics(self) -> list[SimpleNamespace]:
        names = ["prefix_cache_queries", "prefix_cache_hits", "prefix_cache_queries", "num_requests"]
        return [SimpleNamespace(name=f"vllm:{name}", value=10 + i) for i, name in enumerate(names)]

    def generate(self, inputs: list[dict], parameters: SimpleNamespace, use_tqdm: bool) -> list[SimpleNamespace]:
        assert not use_tqdm
        self.calls.append(parameters)
        self.threads.add(threading.current_thread().name)
        outputs = []
        for one in inputs:
            tokens = one["prompt_token_ids"]
            if len(tokens) > 2048:
                raise ValueError("prompt too long. ")
            if tokens[0] == 666:
                raise RuntimeError("engine died")
            true, false = label_distribution(hashed_log_odds(tokens))
            every = {TRUE: true, FALSE: false} | {t: -5.0 - i for i, t in enumerate(range(300, 330))}
            wanted = getattr(parameters, "logprob_token_ids", None)
            listed = {t: every.get(t, -30.0) for t in wanted} if wanted else dict(list(every.items())[:20])
            ill = tokens[-1] in self.arguments.get("ill", ())
            entry = {
                t: SimpleNamespace(logprob=float("nan") if ill else lp)
                for t, lp in listed.items()
                if t not in self.arguments.get("drop", ())
            }
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(logprobs=[entry])]))
        return outputs


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    FakeLLM.made, FakeLLM.failure = [], None
    module.LLM, module.SamplingParams, module.__version__ = FakeLLM, SimpleNamespace, "0.32.0"
    monkeypatch.setitem(sys.modules, "vllm", module)
    stand_in_platform(monkeypatch, cpu=True)
    monkeypatch.setattr(direct, "check_hub", lambda *_: None)  # these models are nowhere
    return module


def prompts(n: int) -> list[Prompt]:
    return [Prompt((Segment("q", [5, i]),), name=f"claim {i}") for i in range(n)]


async def test_a_pool_in_one_call_off_the_event_loops_thread(vllm: ModuleType) -> None:
    engine = DirectEngine("/models/x", DirectOptions(dtype="bfloat16", max_model_len=2048, extra={"seed": 1}))
    assert isinstance(engine, Engine)
    identity = await engine.start()
    (llm,) = FakeLLM.made
    assert llm.arguments == {
        "dtype": "bfloat16", "tensor_parallel_size": 1, "enforce_eager": False, "enable_prefix_caching": True,
        "trust_remote_code": False, "disable_log_stats": False, "max_model_len": 2048, "seed": 1,
    }  # fmt: skip
    assert (identity.kind, identity.version, identity.max_model_len) == ("vllm-direct", "0.32.0", 2048)
    assert identity.fingerprint
    assert len(identity.config) == 64
    assert engine.exact_labels
    heard: list[int] = []
    answer = await engine.score(LABELS.queries(prompts(5)), on_answer=lambda positions, _: heard.extend(positions))
    assert [log_odds(a) for a in answer.logprobs] == pytest.approx([hashed_log_odds([5, i]) for i in range(5)])
    assert (answer.prompt_tokens, heard) == (10, [0, 1, 2, 3, 4])
    asked = vars(llm.calls[-1])
    assert asked["logprob_token_ids"] == [TRUE, FALSE]
    assert asked["logprobs"] == 2  # vLLM 0.32 refuses any other number
    assert asked["max_tokens"] == 1
    assert all(name.startswith("vllm") for name in llm.threads)
    assert await engine.score(LABELS.queries([])) == EngineAnswer([], 0, requests=0)
    assert await engine.tokenize([" True"], special=True) == [[BOS, TRUE]]
    assert await engine.detokenize([[BOS], [BOS, TRUE]]) == ["<bos>", "<bos> True"]
    assert await engine.prefix_cache() == PrefixCacheCounters(10 + 12, 11)
    assert await engine.kv_cache_tokens() == 160
    assert await engine.kv_block_size() == 16
    await engine.aclose()
    await engine.aclose()
    assert llm.stopped == 1


async def test_labels_of_several_tokens_are_one_call(vllm: ModuleType) -> None:
    engine = DirectEngine("m")
    await engine.start()
    (llm,) = FakeLLM.made
    space = LabelSpace(("a", "b", "c"), (" a", " b", " c"))
    labels = SpelledLabels(space, ((FALSE,), (TRUE,), (300, TRUE)))
    calls = len(llm.calls)
    answer = await engine.score(labels.queries(prompts(2)))
    [asked] = llm.calls[calls:]
    assert (asked.logprob_token_ids, asked.logprobs) == ([300, TRUE, FALSE], 3)
    assert (answer.requests, answer.prompt_tokens) == (1, 2 * 2 + 2 * 3)
    true, false = label_distribution(hashed_log_odds([5, 1]))
    begun, _ = label_distribution(hashed_log_odds([5, 1, 300]))
    assert labels.logprobs(answer.logprobs)[1].tolist() == pytest.approx([false, true, -5.0 + begun])
    await engine.aclose()


async def test_no_call_asks_for_more_tokens_than_vllm_lists(vllm: ModuleType) -> None:
    engine = DirectEngine("m")
    await engine.start()
    (llm,) = FakeLLM.made
    names = tuple(map(str, range(20)))
    labels = SpelledLabels(LabelSpace(names, names), tuple((300 + at // 5, 400 + at) for at in range(20)))
    calls = len(llm.calls)
    heard: list[int] = []
    answer = await engine.score(labels.queries(prompts(2)), on_answer=lambda at, _: heard.extend(at))
    assert [asked.logprobs for asked in llm.calls[calls:]] == [19, 5]
    assert (answer.requests, sorted(heard)) == (2, list(range(10)))
    assert labels.logprobs(answer.logprobs).tolist() == [[-5.0 - at // 5 - 30.0 for at in range(20)]] * 2
    await engine.aclose()


async def test_an_older_vllm_lists_its_top_20(vllm: ModuleType) -> None:
    def old(**parameters: object) -> SimpleNamespace:
        if "logprob_token_ids" in parameters:
            raise TypeError("Unexpected keyword argument 'logprob_token_ids'")
        return SimpleNamespace(**parameters)

    vllm.SamplingParams = old
    engine = DirectEngine("m")
    await engine.start()
    assert not engine.exact_labels
    answer = await engine.score(LABELS.queries(prompts(1)))
    assert log_odds(answer.logprobs[0]) == pytest.approx(hashed_log_odds([5, 0]))
    assert FakeLLM.made[0].calls[-1].logprobs == 20
    await engine.aclose()


async def test_errors_are_typed(vllm: ModuleType) -> None:
    engine = DirectEngine("m", DirectOptions(extra={"drop": {TRUE}}))
    await engine.start()
    with pytest.raises(MissingLabel, match="claim 0"):
        await engine.score(LABELS.queries(prompts(1)))
    with pytest.raises(RequestRejected, match=r"prompt too long\.$"):
        await engine.score(LABELS.queries([Prompt((Segment("x", [5] * 3000),))]))
    with pytest.raises(APIError, match="engine died"):
        await engine.score(LABELS.queries([Prompt((Segment("x", [666]),))]))
    with pytest.raises(ValueError, match="claim t"):
        await engine.score(LABELS.queries([Prompt((Segment("text"),), name="claim t")]))
    await engine.aclose()


async def test_answers_beside_one_that_lacks_a_label_are_kept(vllm: ModuleType) -> None:
    engine = DirectEngine("m", DirectOptions(extra={"ill": {2}}))
    await engine.start()
    heard: dict[int, float] = {}

    def on_answer(positions: Sequence[int], answer: EngineAnswer) -> None:
        heard.update(zip(positions, (log_odds(logprobs) for logprobs in answer.logprobs), strict=True))

    with pytest.raises(MissingLabel, match=r"'claim 2'.*NaN"):
        await engine.score(LABELS.queries(prompts(4)), on_answer=on_answer)
    assert heard == {at: pytest.approx(hashed_log_odds([5, at])) for at in (0, 1, 3)}
    await engine.aclose()


async def test_a_model_that_does_not_load(vllm: ModuleType) -> None:
    FakeLLM.failure = OSError(f"no such model, token {KEY}")
    engine = DirectEngine("nowhere", hf_token=SecretStr(KEY))
    with pytest.raises(ConfigurationError, match="did not start with 'nowhere': no such model") as caught:
        await engine.start()
    assert KEY not in str(caught.value) + repr(vars(engine))
    await engine.aclose()


async def test_a_chat_template_is_applied_by_the_models_own_tokenizer(vllm: ModuleType) -> None:
    engine = DirectEngine("m")
    await engine.start()
    assert await engine.tokenize_chat(["Hello"]) is None

    def apply(messages: list[dict[str, str]], **options: bool) -> list[int]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return encode(f"{messages[0]['role']}: {messages[0]['content']}")

    tokenizer = SimpleNamespace(chat_template="jinja", apply_chat_template=apply)
    FakeLLM.made[0].get_tokenizer = lambda: tokenizer
    assert await engine.tokenize_chat(["Hello"]) == [encode("user: Hello")]
    await engine.aclose()


async def test_revision_and_token_reach_vllm(vllm: ModuleType) -> None:
    engine = DirectEngine("m", revision="abc", hf_token=SecretStr(KEY))
    assert (await engine.start()).revision == "abc"
    arguments = FakeLLM.made[0].arguments
    assert (arguments["revision"], arguments["tokenizer_revision"], arguments["hf_token"]) == ("abc", "abc", KEY)
    await engine.aclose()


async def test_kernels_named_in_the_environment_are_part_of_the_identity(
    vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_platform(monkeypatch, cpu=False)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    engine = DirectEngine("m")
    assert (await engine.start()).determinism == "VLLM_BATCH_INVARIANT=1,ICM_BATCH_INVARIANT=1"
    await engine.aclose()


async def test_vllm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = DirectEngine("m")
    with pytest.raises(ConfigurationError, match="VLLM_BASE_URL"):
        await engine.start()
    await engine.aclose()
    with pytest.raises(RuntimeError):
        await engine.tokenize(["x"])


async def test_a_process_has_one_vllm_which_engines_of_the_same_settings_share(vllm: ModuleType) -> None:
    first, second, other = DirectEngine("m"), DirectEngine("m"), DirectEngine("m", DirectOptions(max_model_len=99))
    await first.start()
    await second.start()
    (llm,) = FakeLLM.made
    with pytest.raises(ConfigurationError, match="already runs vLLM with max_model_len None, not 99"):
        await other.start()
    await other.aclose()
    await first.aclose()
    assert llm.stopped == 0, "the second one still uses it"
    assert (await second.score(LABELS.queries(prompts(1)))).prompt_tokens == 2
    await second.aclose()
    assert llm.stopped == 1
    await other.start()
    assert len(FakeLLM.made) == 2
    await other.aclose()


async def test_another_token_is_not_told(vllm: ModuleType) -> None:
    first, second = DirectEngine("m"), DirectEngine("m", hf_token=SecretStr(KEY))
    await first.start()
    with pytest.raises(ConfigurationError, match="hf_token") as caught:
        await second.start()
    assert KEY not in str(caught.value)
    await first.aclose()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cpu_mode_takes_the_local_servers_settings_where_none_are_given(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(options, "fast_type", lambda: FastType(dtype, "a test says so"))
    arguments = DirectOptions(cpu=True, max_model_len=64).engine_arguments()
    assert arguments["dtype"] == dtype
    assert DirectOptions(cpu=True, dtype="float16").engine_arguments()["dtype"] == "float16"
    assert DirectOptions().engine_arguments()["dtype"] == "auto"
    assert arguments["enforce_eager"]
    assert (arguments["block_size"], arguments["disable_hybrid_kv_cache_manager"]) == (32, True)
    assert DirectOptions(cpu=True, dtype="float32", block_size=64).engine_arguments()["block_size"] == 64
    assert "block_size" not in DirectOptions().engine_arguments()


def test_layers_with_states_share_no_block_with_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"layer_types": ["linear_attention", "full_attention"]}')
    shared = "disable_hybrid_kv_cache_manager"
    cpu = DirectOptions(cpu=True, dtype="bfloat16")
    assert shared not in DirectEngine(str(tmp_path), cpu)._arguments()
    asked = DirectOptions(cpu=True, dtype="bfloat16", extra={shared: True})
    assert DirectEngine(str(tmp_path), asked)._arguments()[shared] is True
    (tmp_path / "config.json").write_text('{"layer_types": ["sliding_attention", "full_attention"]}')
    assert DirectEngine(str(tmp_path), cpu)._arguments()[shared] is True


@pytest.mark.parametrize("preloaded", [None, "/lib/theirs.so"])
def test_all_cores_are_used_only_with_the_library_whose_threads_sleep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, preloaded: str | None
) -> None:
    openmp = tmp_path / "libiomp5.so"
    monkeypatch.setattr(options, "OPENMP", openmp)
    monkeypatch.setattr(os, "environ", {} if preloaded is None else {"LD_PRELOAD": preloaded})
    options.set_cpu_environment("bfloat16")
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" not in os.environ, "there is no such library"
    openmp.touch()
    options.set_cpu_environment("bfloat16")
    assert os.environ["LD_PRELOAD"] == (preloaded or str(openmp))
    assert os.environ.get("VLLM_CPU_NUM_OF_RESERVED_CPU") == ("0" if preloaded is None else None)


def test_the_memory_of_the_kv_cache_follows_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "kv_cache_gib", partial(kv_cache_gib, memory=64 << 30))
    for given, dtype, gib in (({}, "bfloat16", "2"), ({}, "float32", "4"), ({KV_CACHE_SPACE: "7"}, "float32", "7")):
        monkeypatch.setattr(os, "environ", dict(given))
        options.set_cpu_environment(dtype)
        assert os.environ[KV_CACHE_SPACE] == gib


def test_exact_sums_over_gpus_are_computed_eagerly() -> None:
    assert DirectOptions(tensor_parallel_size=2).engine_arguments()["enforce_eager"]
    assert not DirectOptions(tensor_parallel_size=2, deterministic=False).engine_arguments()["enforce_eager"]


async def test_cpu_mode_needs_a_vllm_for_the_cpu(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_platform(monkeypatch, cpu=False)
    engine = DirectEngine("m", DirectOptions(cpu=True))
    with pytest.raises(ConfigurationError, match="not one for the CPU"):
        await engine.connect()
    await engine.aclose()


async def test_what_it_cannot_do_is_told(vllm: ModuleType) -> None:
    engine = DirectEngine("m", DirectOptions(chat_template="no/such/file.jinja"))
    with pytest.raises(ConfigurationError, match="cannot read the chat template"):
        await engine.connect()
    engine = DirectEngine("m")
    assert (await engine.connect()).fingerprint == "", "nothing was asked"
    assert FakeLLM.made[-1].calls == []
    with pytest.raises(ConfigurationError, match="pooling"):
        await engine.embed(["x"])
    assert await engine.models() == ["m"]
    await engine.aclose()
    with pytest.raises(RuntimeError):
        await engine.models()


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("cpu", "set_already", "deterministic", "variables", "attention"),
    [
        (True, {}, True, {"ICM_BATCH_INVARIANT": "1"}, None),
        (True, {"ICM_BATCH_INVARIANT": "0"}, True, {"ICM_BATCH_INVARIANT": "0"}, None),
        (True, {}, False, {}, None),
        (False, {}, True, {"VLLM_BATCH_INVARIANT": "1", "ICM_BATCH_INVARIANT": "1"}, {"backend": "FLASH_ATTN"}),
        (False, {"VLLM_BATCH_INVARIANT": "0"}, True, {"VLLM_BATCH_INVARIANT": "0"}, None),
        (False, {}, False, {}, None),
    ],
)
async def test_scores_are_exact_as_the_launchers_are_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    cpu: bool,
    set_already: dict[str, str],
    deterministic: bool,
    variables: dict[str, str],
    attention: dict[str, object] | None,
) -> None:
    stand_in_platform(monkeypatch, cpu=cpu)
    for name, value in set_already.items():
        monkeypatch.setenv(name, value)
    engine = DirectEngine("/models/x", DirectOptions(deterministic=deterministic))
    identity = await engine.start()
    try:
        names = ("VLLM_BATCH_INVARIANT", "ICM_BATCH_INVARIANT")
        assert {name: os.environ[name] for name in names if name in os.environ} == variables
        assert FakeLLM.made[0].arguments.get("attention_config") == attention
        assert all(f"{name}={value}" in identity.determinism for name, value in variables.items())
    finally:
        await engine.aclose()


class Hub(BaseHTTPRequestHandler):
    """Hugging Face's route about a model: it has one, one that is closed to strangers, and one whose answer fails."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        there = {"/api/models/owner/name": 200, "/api/models/owner/broken": 500, "/api/models/owner/closed": 401}
        status = there.get(self.path, 404)
        body = b'{"id": "owner/name"}' if status == 200 else b"{}"
        self.send_response(status)
        if status in (401, 404):
            self.send_header("X-Error-Code", "RevisionNotFound" if "/revision/" in self.path else "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    Hub.asked.clear()
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("model", "revision", "complaint"),
    [
        ("owner/nmae", "", "there is no model owner/nmae on Hugging Face. Check the name"),
        ("owner/closed", "", "a private model needs HF_TOKEN"),
        ("owner/na me", "", "there is no model owner/na me on Hugging Face"),
        ("owner/name", "v9", "owner/name has no revision v9 on Hugging Face"),
    ],
)
async def test_a_name_that_hugging_face_does_not_have_is_refused_before_vllm_is_loaded(
    hub: type[Hub], vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, model: str, revision: str, complaint: str
) -> None:
    monkeypatch.setattr(direct, "check_hub", check_hub)
    engine = DirectEngine(model, revision=revision, hf_token=SecretStr("secret"))
    with pytest.raises(ConfigurationError) as refused:
        await engine.start()
    assert complaint in str(refused.value)
    assert "secret" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert FakeLLM.made == []


def test_what_hugging_face_has_or_cannot_say_is_left_to_vllm(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("owner/name", "owner/broken"):
        check_hub(model)
    assert len(hub.asked) >= 2
    hub.asked.clear()
    (tmp_path / "here").mkdir()
    (tmp_path / "hub" / "models--owner--kept").mkdir(parents=True)
    for model in ("here", "owner/kept", "s3://bucket/model", "/models/x", "./x"):
        check_hub(model)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    check_hub("owner/nmae")
    assert hub.asked == []


def test_where_hugging_face_cannot_be_reached_it_says_so(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="was not downloaded, and Hugging Face cannot be asked for it"):
        check_hub("owner/name")


def test_a_path_where_no_model_is_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "models" / "gemma").mkdir(parents=True)
    for missing in ("models/gema", "./gemma", str(tmp_path / "gemma"), "a/b/c"):
        with pytest.raises(ConfigurationError, match="there is no model at"):
            open_engine("direct", Settings(), missing)
    with pytest.raises(ConfigurationError, match=r"; did you mean gemma\? models/ holds gemma"):
        open_engine("direct", Settings(), "models/gema")
    (tmp_path / "hub" / "models--models--gema").mkdir(parents=True)
    for left_to_vllm in ("models/gema", "models/gemma", "owner/name", "gpt2"):
        assert isinstance(open_engine("direct", Settings(), left_to_vllm), DirectEngine)
