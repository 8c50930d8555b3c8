"""Requests to a vLLM server, checked by a stub; `make deploy-test` runs a real server."""

from __future__ import annotations

import json
import shutil

import pytest

from rlsedit_fast import Edit
from rlsedit_fast.errors import InputError, ServerError
from rlsedit_fast.serving import VLLM, count_stated

from .conftest import models


def test_adapter_is_loaded_under_its_name(stub, adapter):
    stub.answers = {"/v1/models": models("base"), "/v1/load_lora_adapter": (200, "Success: LoRA adapter added.")}
    VLLM(stub.url + "/v1", api_key="secret").load_adapter("edited", adapter)
    assert stub.posted("/v1/load_lora_adapter") == [{"lora_name": "edited", "lora_path": str(adapter.resolve())}]
    assert stub.headers[-1]["Authorization"] == "Bearer secret"


def test_name_that_is_served_already_is_refused_before_loading(stub, adapter):
    stub.answers = {"/v1/models": models("base", "edited"), "/v1/load_lora_adapter": (200, "ok")}
    with pytest.raises(InputError, match="serves 'edited' already"):
        VLLM(stub.url).load_adapter("edited", adapter)
    assert not stub.posted("/v1/load_lora_adapter")


def test_replaced_adapter_drops_cached_prefixes(stub, adapter):
    stub.answers = {
        "/v1/models": models("base", "edited", root="/elsewhere"),
        "/v1/load_lora_adapter": (200, "ok"),
        "/reset_prefix_cache": [(200, {"success": False}), (200, {"success": True})],
    }
    VLLM(stub.url).load_adapter("edited", adapter, replace=True)
    assert stub.posted("/v1/load_lora_adapter")[0]["load_inplace"] is True
    assert stub.paths()[-2:] == ["/reset_prefix_cache", "/reset_prefix_cache"]  # the first one was refused


def test_same_path_is_not_replaced_if_the_cache_cannot_be_dropped(stub, adapter):
    stub.answers = {
        "/v1/models": models("base", "edited", root=str(adapter.resolve())),
        "/v1/load_lora_adapter": (200, "ok"),
    }
    with pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE"):
        VLLM(stub.url).load_adapter("edited", adapter, replace=True)
    assert not stub.posted("/v1/load_lora_adapter")


@pytest.mark.parametrize(
    ("status", "answer", "hint"),
    [
        (404, {"detail": "Not Found"}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (500, {"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16."}}, "--max-lora-rank"),
        (500, {"error": {"message": "LoRA is not enabled."}}, "--enable-lora"),
        (401, {"error": "Unauthorized"}, "--api-key"),
    ],
)
def test_refused_adapter_states_what_to_do(stub, adapter, status, answer, hint):
    stub.answers = {"/v1/models": models("base"), "/v1/load_lora_adapter": (status, answer)}
    with pytest.raises(ServerError) as raised:
        VLLM(stub.url).load_adapter("edited", adapter)
    assert hint in str(raised.value)


def test_unknown_adapter_is_not_taken_for_a_server_without_adapters(stub):
    stub.answers = {"/v1/unload_lora_adapter": (404, {"error": {"message": "The lora adapter 'x' cannot be found."}})}
    with pytest.raises(ServerError, match="cannot be found") as raised:
        VLLM(stub.url).unload_adapter("x")
    assert raised.value.hint is None


def test_files_are_checked_before_the_server_is_asked(stub, adapter, tmp_path):
    server = VLLM(stub.url)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 1024}))
    with pytest.raises(InputError, match="has rank 1024"):
        server.load_adapter("edited", adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="does not contain adapter_model"):
        server.load_adapter("edited", adapter)
    with pytest.raises(InputError, match="does not exist"):
        server.load_adapter("edited", "no/such/folder")
    with pytest.raises(InputError, match="name of the adapter is empty"):
        server.load_adapter("", adapter)
    assert not stub.requests


def test_path_on_the_machine_of_the_server_is_passed_on(stub):
    stub.answers = {"/v1/models": models("base"), "/v1/load_lora_adapter": (200, "ok")}
    VLLM(stub.url).load_adapter("edited", "/on/the/server")
    assert stub.posted("/v1/load_lora_adapter")[0]["lora_path"] == "/on/the/server"


def test_weights_are_reloaded_while_requests_are_held(stub, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "base")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))  # may differ
    stub.answers = {
        "/v1/models": models("base", root=str(tmp_path / "base")),
        "/pause?mode=wait": (200, {"status": "paused"}),
        "/collective_rpc": (200, {"results": [None]}),
        "/reset_prefix_cache": (200, {"success": True}),
        "/resume": (200, {"status": "resumed"}),
    }
    VLLM(stub.url).reload_weights(checkpoint)
    assert stub.paths() == ["/v1/models", "/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert stub.posted("/collective_rpc") == [
        {"method": "reload_weights", "kwargs": {"weights_path": str(checkpoint.resolve())}}
    ]


def test_server_resumes_after_a_failed_reload(stub, checkpoint):
    stub.answers = {
        "/v1/models": models("base"),
        "/pause?mode=wait": (200, {}),
        "/collective_rpc": (500, {"error": {"message": "size mismatch"}}),
        "/resume": (200, {}),
    }
    with pytest.raises(ServerError, match="size mismatch; the server may have incomplete weights"):
        VLLM(stub.url).reload_weights(checkpoint)
    assert stub.paths()[-1] == "/resume"


def test_server_without_development_mode_is_explained(stub, checkpoint):
    stub.answers = {"/v1/models": models("base")}
    with pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE=1"):
        VLLM(stub.url).reload_weights(checkpoint)


def test_cache_that_stays_in_use_is_an_error(stub, checkpoint, monkeypatch):
    monkeypatch.setattr("rlsedit_fast.serving.vllm._PAUSE", 0.0)
    stub.answers = {
        "/v1/models": models("base"),
        "/pause?mode=wait": (200, {}),
        "/collective_rpc": (200, {"results": [None]}),
        "/reset_prefix_cache": (200, {"success": False}),
        "/resume": (200, {}),
    }
    with pytest.raises(ServerError, match="prefix cache was not reset"):
        VLLM(stub.url).reload_weights(checkpoint)


def test_checkpoint_of_another_model_is_not_loaded(stub, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "base")
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 128}))
    stub.answers = {"/v1/models": models("base", root=str(tmp_path / "base"))}
    with pytest.raises(InputError, match=r"differs from that of the served model .* in hidden_size"):
        VLLM(stub.url).reload_weights(checkpoint)
    assert stub.paths() == ["/v1/models"]


def test_completions_are_in_the_order_of_the_prompts(stub):
    def answer(body):
        assert body == {"prompt": ["a", "b"], "max_tokens": 3, "temperature": 0.0, "logprobs": 1, "model": "edited"}
        choices = [
            {"index": at, "text": text, "logprobs": {"tokens": [text], "token_logprobs": [-0.5]}}
            for at, text in ((1, " second"), (0, " first"))
        ]
        return 200, {"choices": choices}

    stub.answers = {"/v1/completions": answer}
    first, second = VLLM(stub.url).complete(["a", "b"], model="edited", max_tokens=3)
    assert (first.text, second.text, second.logprobs) == (" first", " second", (-0.5,))
    with pytest.raises(InputError, match="at least one prompt"):
        VLLM(stub.url).complete([])


def test_stated_targets_are_counted(stub):
    answers = {"Ann lives in": " Rome, the", "Ben lives in": " Paris"}
    stub.answers = {
        "/v1/models": models("base", "edited"),
        "/v1/completions": lambda body: (
            200,
            {"choices": [{"index": at, "text": answers[prompt]} for at, prompt in enumerate(body["prompt"])]},
        ),
    }
    report = count_stated(VLLM(stub.url), [Edit("{} lives in", "Ann", "Rome"), Edit("{} lives in", "Ben", "Oslo")])
    assert (report.stated, report.asked, report.unstated) == (1, 2, (1,))
    assert stub.posted("/v1/completions")[0]["model"] == "base"


@pytest.mark.parametrize("answer", [(200, "<html>"), (200, {"models": []}), (200, {"data": [{}]})])
def test_another_program_at_the_address_is_an_error(stub, answer):
    stub.answers = {"/v1/models": answer}
    with pytest.raises(ServerError, match="expected a list of models"):
        VLLM(stub.url).models()


def test_no_server_is_an_error_with_its_address():
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/v1/models: no answer"):
        VLLM("http://127.0.0.1:9").models()
    for url in ("localhost:8000", "ftp://host", ""):
        with pytest.raises(InputError, match="expected the address of a server"):
            VLLM(url)
    with pytest.raises(InputError, match="timeout"):
        VLLM(timeout=0)
