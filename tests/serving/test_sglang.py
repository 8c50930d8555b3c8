"""Requests to an SGLang server, checked by a stub that reads them as SGLang does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from rlsedit_fast.errors import InputError, ServerError
from rlsedit_fast.export import WeightChange
from rlsedit_fast.serving import SGLang

from .conftest import models

# SGLang unpickles in a process that is no child of the sender and admits modules by prefix.
RECEIVER = """
import base64, io, json, pickle, sys
ALLOWED = ("builtins.", "collections.", "torch.", "multiprocessing.reduction.", "multiprocessing.resource_sharer.")
class Reader(pickle.Unpickler):
    def find_class(self, module, name):
        if not f"{module}.".startswith(ALLOWED):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)
tensors = Reader(io.BytesIO(base64.b64decode(sys.stdin.read(), validate=True))).load()
print(json.dumps([[name, str(tensor.dtype), tensor.tolist()] for name, tensor in tensors]))
"""


def test_adapter_is_loaded_and_unloaded(stub, adapter):
    stub.answers = {
        "/v1/models": models("base", "edited"),
        "/load_lora_adapter": (200, {"success": True, "loaded_adapters": {"edited": "..."}}),
        "/unload_lora_adapter": (200, {"success": True}),
    }
    SGLang(stub.url).load_adapter("edited", adapter, replace=True)
    assert stub.paths() == ["/v1/models", "/unload_lora_adapter", "/load_lora_adapter"]
    assert stub.posted("/load_lora_adapter") == [{"lora_name": "edited", "lora_path": str(adapter.resolve())}]
    assert stub.posted("/unload_lora_adapter") == [{"lora_name": "edited"}]


def test_weights_are_reloaded_from_disk(stub, checkpoint):
    stub.answers = {"/update_weights_from_disk": (200, {"success": True, "message": "Succeeded"})}
    SGLang(stub.url).reload_weights(checkpoint)
    assert stub.posted("/update_weights_from_disk") == [{"model_path": str(checkpoint.resolve()), "flush_cache": True}]


@pytest.mark.parametrize("status", [400, 200])
def test_failure_is_raised_with_the_message_of_the_server(stub, checkpoint, status):
    stub.answers = {"/update_weights_from_disk": (status, {"success": False, "message": "Failed to load"})}
    with pytest.raises(ServerError, match="Failed to load"):
        SGLang(stub.url).reload_weights(checkpoint)


def test_edited_weights_are_read_in_another_process(stub):
    original = torch.zeros(2, 3, dtype=torch.bfloat16)
    stored = original + 0.5
    changes = [
        WeightChange("a.down_proj", original, stored, stored, transposed=False),
        WeightChange("b.c_proj", original, stored, stored, transposed=True),
    ]
    read = []

    def receive(body):
        assert body["flush_cache"] is True
        one, two = body["serialized_named_tensors"]
        assert one == two  # one for each rank
        done = subprocess.run([sys.executable, "-c", RECEIVER], input=one, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        read.extend(json.loads(done.stdout))
        return 200, {"success": True, "message": "Success"}

    stub.answers = {"/update_weights_from_tensor": receive}
    SGLang(stub.url).update_weights(changes, ranks=2)
    dtype = "torch.bfloat16"
    assert read == [["a.down_proj.weight", dtype, stored.tolist()], ["b.c_proj.weight", dtype, stored.T.tolist()]]


def test_request_selects_an_adapter_beside_the_model(stub):
    stub.answers = {
        "/v1/models": models("base"),
        "/v1/completions": (200, {"choices": [{"index": 0, "text": " Rome"}]}),
    }
    server = SGLang(stub.url)
    server.complete(["Ann lives in"], model="edited")
    server.complete(["Ann lives in"])
    with_adapter, without = stub.posted("/v1/completions")
    assert (with_adapter["model"], with_adapter["lora_path"]) == ("base", "edited")
    assert "lora_path" not in without


def test_wrong_arguments_are_refused_before_a_request(stub, change):
    server = SGLang(stub.url)
    for wrong, call in (
        ("no changes", lambda: server.update_weights([])),
        ("ranks=0", lambda: server.update_weights([change], ranks=0)),
        ("several changes", lambda: server.update_weights([change, change])),
        ("name of the adapter", lambda: server.load_adapter("", "adapter")),
    ):
        with pytest.raises(InputError, match=wrong):
            call()
    assert not stub.requests
