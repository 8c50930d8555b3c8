"""A stub of an inference server that records requests and answers like vLLM or SGLang."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rlsedit_fast.export import WeightChange, write_adapter


class Stub:
    """Requests that the server received, and its answers by path: (status, JSON)."""

    def __init__(self):
        self.requests: list[tuple[str, str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[str, object] = {}
        self.url = ""

    def posted(self, path):
        return [body for method, at, body in self.requests if at == path and method == "POST"]

    def paths(self):
        return [path for _, path, _ in self.requests]


@pytest.fixture
def stub():
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer("GET", None)

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer("POST", json.loads(text) if text else None)

        def answer(self, method, body):
            state.requests.append((method, self.path, body))
            state.headers.append(dict(self.headers))
            found = state.answers.get(self.path, (404, {"detail": "Not Found"}))
            if isinstance(found, list):  # one after the other
                found = found.pop(0) if len(found) > 1 else found[0]
            status, answer = found(body) if callable(found) else found
            text = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def models(*names, root=""):
    return 200, {"object": "list", "data": [{"id": name, "root": root} for name in names]}


@pytest.fixture
def change():
    torch.manual_seed(0)
    original = torch.randn(6, 8)
    stored = original + torch.outer(torch.randn(6), torch.randn(8))
    return WeightChange("model.layers.0.mlp.down_proj", original, stored, stored, transposed=False)


@pytest.fixture
def adapter(change, tmp_path):
    write_adapter([change], tmp_path / "adapter", engine="vllm")
    return tmp_path / "adapter"


@pytest.fixture
def checkpoint(tmp_path):
    """The files by which a checkpoint is recognized."""
    folder = tmp_path / "edited"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "dtype": "float32"}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder
