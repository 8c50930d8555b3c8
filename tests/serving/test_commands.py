"""`rlsedit deploy` with a stub of a server, and `rlsedit export` for servers."""

from __future__ import annotations

import json

import pytest
import torch

from rlsedit_fast.cli import main
from rlsedit_fast.export import read_patch
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.world import load_demo_model

from .conftest import models


@pytest.fixture
def facts(tmp_path):
    rows = [{"prompt": "{} lives in", "subject": name, "target": "Rome"} for name in ("Ann", "Ben")]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "facts.jsonl"


def answers(body):
    texts = {"Ann lives in": " Rome", "Ben lives in": " Paris"}
    return 200, {"choices": [{"index": at, "text": texts[one]} for at, one in enumerate(body["prompt"])]}


def test_adapter_is_deployed_and_its_answers_counted(stub, adapter, facts, tmp_path, capsys):
    stub.answers = {
        "/v1/models": [models("base"), models("base", "edited")],
        "/v1/load_lora_adapter": (200, "ok"),
        "/v1/completions": answers,
    }
    command = ["deploy", "--url", stub.url, "--adapter", str(adapter), "--name", "edited", "--edits", str(facts)]
    assert main([*command, "--json", str(tmp_path / "result.json")]) == 1  # one target is not stated
    out = capsys.readouterr().out
    assert "1 of 2 targets are stated by edited" in out
    assert "'Rome', answer ' Paris'" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["stated"], result["asked"], result["models"]) == (1, 2, ["base", "edited"])
    assert stub.posted("/v1/completions")[0]["model"] == "edited"


def test_key_comes_from_the_environment(stub, monkeypatch):
    stub.answers = {"/v1/models": models("base"), "/v1/unload_lora_adapter": (200, "ok")}
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert main(["deploy", "--url", stub.url, "--unload", "edited"]) == 0
    assert {header["Authorization"] for header in stub.headers} == {"Bearer secret"}


def test_sglang_is_selected(stub, checkpoint, capsys):
    stub.answers = {"/v1/models": models("base"), "/update_weights_from_disk": (200, {"success": True})}
    assert main(["deploy", "--engine", "sglang", "--url", stub.url, "--checkpoint", str(checkpoint)]) == 0
    assert f"serves the weights of {checkpoint}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((), "nothing to do"),
        (("--adapter", "a"), "--adapter requires --name"),
        (("--adapter", "a", "--checkpoint", "c"), "exclude each other"),
        (("--checkpoint", "c", "--name", "edited"), "--name cannot be combined with --checkpoint"),
        (("--unload", "edited", "--overwrite"), "--overwrite requires --adapter"),
        (("--unload", "edited", "--limit", "3"), "--limit requires --edits"),
    ],
)
def test_contradictory_options_are_refused_before_a_request(stub, given, reason, capsys):
    assert main(["deploy", "--url", stub.url, *given]) == 2
    assert reason in capsys.readouterr().err
    assert not stub.requests


def test_export_writes_an_adapter_and_a_patch_for_vllm(tmp_path, capsys):
    torch.manual_seed(0)
    model, tokenizer = load_demo_model()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (projection,) = find_decoder(model).select([1])
    projection.write(projection.weight + torch.randn(128, 3) @ torch.randn(3, projection.weight.shape[1]))
    model.save_pretrained(tmp_path / "edited")
    tokenizer.save_pretrained(tmp_path / "edited")
    command = ["export", "--model", str(tmp_path / "base"), "--edited", str(tmp_path / "edited")]
    outputs = ["--adapter", str(tmp_path / "adapter"), "--for", "vllm", "--patch", str(tmp_path / "patch.safetensors")]
    assert main([*command, *outputs]) == 0
    out = capsys.readouterr().out
    assert "rank 8\n" in out
    assert "rank 3 of 3" in out
    assert "of 1 weight" in out
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    (patch,) = read_patch(tmp_path / "patch.safetensors")
    assert torch.equal(patch.values, projection.weight.flatten()[patch.indices.long()])
    assert main([*command, *outputs]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*command, "--for", "vllm", "--delta", str(tmp_path / "d")]) == 2
    assert "--for vllm requires --adapter" in capsys.readouterr().err


def test_model_without_adapters_in_vllm_is_refused_before_the_weights_are_loaded(
    make_model, tokenizer, tmp_path, capsys, monkeypatch
):
    make_model("gpt2").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr("rlsedit_fast.cli.setup.load_model", lambda *_, **__: pytest.fail("weights are loaded"))
    base = str(tmp_path / "base")
    command = ["export", "--model", base, "--edited", base, "--adapter", str(tmp_path / "adapter"), "--for", "vllm"]
    assert main(command) == 2
    assert "vLLM serves GPT2LMHeadModel without LoRA" in capsys.readouterr().err


def test_paths_on_the_server_are_named(stub, capsys):
    stub.answers = {"/v1/models": models("base"), "/v1/load_lora_adapter": (200, "ok")}
    assert main(["deploy", "--url", stub.url, "--adapter", "/on/the/server", "--name", "edited"]) == 0
    assert "taken as a path on the machine of the server" in capsys.readouterr().err
    assert main(["deploy", "--url", stub.url, "--adapter", "not/here", "--name", "edited"]) == 2
