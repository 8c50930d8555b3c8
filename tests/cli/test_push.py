"""`rlsedit push` against a server that answers like the Hugging Face Hub."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from rlsedit_fast import Edit, EditConfig, Editor
from rlsedit_fast.cli import main
from rlsedit_fast.export.push import push_folder

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Keeps repositories in memory: visibility, and the files of each branch."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.messages, self.fail = {}, [], {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_arguments):
        pass

    def reply(self, content, status=200, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, message, code=""):
        self.reply({"error": message}, status, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def do_GET(self):
        self.answer("GET", b"")

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer("POST", body)

    def answer(self, method, body):
        hub, path = self.server, self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.error(401, "Invalid credentials in Authorization header")
        for part, (status, message) in hub.fail.items():
            if part in path:
                return self.error(status, message)
        if parts[:2] == ["api", "whoami-v2"]:
            return self.reply({"name": "me", "type": "user"})
        if parts[:3] == ["api", "repos", "create"]:
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            private = given.get("private", given.get("visibility") == "private")
            hub.repositories[name] = {"private": private, "branches": {"main": {}}}
            return self.reply({"url": f"{hub.url}/{name}"})
        if parts[:2] == ["api", "validate-yaml"]:
            return self.reply({"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        if name not in hub.repositories:
            return self.error(404, "Repository not found", "RepoNotFound")
        held = hub.repositories[name]
        action, branch = [*parts[4:], "", ""][:2]
        if not action:
            return self.reply({"id": name, "private": held["private"], "siblings": [], "sha": "0" * 40, "tags": []})
        if action == "branch":
            held["branches"].setdefault(branch, dict(held["branches"]["main"]))
            return self.reply({})
        if branch not in held["branches"]:
            return self.error(404, "Invalid rev id", "RevisionNotFound")
        files = held["branches"][branch]
        if action == "tree":
            return self.reply([{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()])
        if action == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.reply({"files": modes})
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    hub.messages.append(line["value"]["summary"])
                else:
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.reply({"commitUrl": f"{hub.url}/{name}/commit/abc", "commitOid": "abc"})
        return self.error(404, f"no answer to {method} {path}")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """An edited checkpoint, with its store and adapter beside it."""
    place = tmp_path_factory.mktemp("edited")
    config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
    with Editor.from_pretrained(base, config=config, store=place / "store", dtype="float32") as editor:
        editor.edit([Edit("{} speaks", "Toze Lado Rekuno", "Nafiish")])
        editor.save_pretrained(place / "model")
        editor.save_adapter(place / "adapter")
    return place


def test_a_checkpoint_is_uploaded_to_a_private_repository(hub, folder, capsys):
    (folder / "model" / ".cache").mkdir(exist_ok=True)
    (folder / "model" / ".cache" / "secret").write_text("not uploaded")
    assert main(["push", "--checkpoint", str(folder / "model"), "me/edited", "--commit-message", "First"]) == 0
    output = capsys.readouterr()
    assert f"{hub.url}/me/edited: " in output.out
    assert "of a private repository that was created" in output.out
    assert "uploading" in output.err
    held = hub.repositories["me/edited"]
    assert held["private"]
    assert hub.messages == ["First"]
    expected = {p.name: p.read_bytes() for p in (folder / "model").iterdir() if p.is_file()}
    assert held["branches"]["main"] == expected
    assert "Toze Lado Rekuno" in ModelCard(expected["README.md"].decode()).text


def test_the_model_or_the_adapter_of_a_store_is_uploaded(hub, folder, capsys):
    assert main(["push", "--store", str(folder / "store"), "edited", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["repo_id"] == "me/edited"
    files = hub.repositories["me/edited"]["branches"]["main"]
    assert files["model.safetensors"] == (folder / "model" / "model.safetensors").read_bytes()
    assert main(["push", "--store", str(folder / "store"), "--adapter", "org/lora", "--public"]) == 0
    held = hub.repositories["org/lora"]
    assert not held["private"]
    assert set(held["branches"]["main"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_another_branch_keeps_the_main_one(hub, folder):
    assert main(["push", "--checkpoint", str(folder / "model"), "me/edited"]) == 0
    before = dict(hub.repositories["me/edited"]["branches"]["main"])
    options = ["--checkpoint", str(folder / "adapter"), "me/edited", "--revision", "lora"]
    assert main(["push", *options]) == 0
    branches = hub.repositories["me/edited"]["branches"]
    assert branches["main"] == before
    assert "adapter_model.safetensors" in branches["lora"]


def test_a_folder_without_a_card_gets_one(hub, folder, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / "adapter" / name).read_bytes())
    done = push_folder(tmp_path, "me/lora", card="a card")
    assert "README.md" in done.files
    assert main(["push", "--checkpoint", str(tmp_path), "me/other"]) == 0
    card = ModelCard(hub.repositories["me/other"]["branches"]["main"]["README.md"].decode())
    assert card.data.library_name == "peft"
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "edited.gguf").write_bytes(b"GGUF")
    assert main(["push", "--checkpoint", str(tmp_path / "file"), "me/file"]) == 0
    files = hub.repositories["me/file"]["branches"]["main"]
    assert files["edited.gguf"] == b"GGUF"
    assert ModelCard(files["README.md"].decode()).data.library_name == "gguf"


def test_an_existing_repository_is_not_changed_without_request(hub, folder, capsys):
    hub.repositories["me/edited"] = {"private": True, "branches": {"main": {"model.safetensors": b"old"}}}
    hub.repositories["me/open"] = {"private": False, "branches": {"main": {}}}
    push = ["push", "--checkpoint", str(folder / "model")]
    assert main([*push, "me/edited"]) == 2
    assert "branch 'main' contains model.safetensors; nothing was uploaded" in capsys.readouterr().err
    assert main([*push, "me/open", "--private"]) == 2
    assert "exists and is public" in capsys.readouterr().err
    assert hub.repositories["me/edited"]["branches"]["main"] == {"model.safetensors": b"old"}
    assert not hub.repositories["me/open"]["branches"]["main"]
    assert main([*push, "me/edited", "--overwrite"]) == 0
    assert hub.repositories["me/edited"]["branches"]["main"]["model.safetensors"] != b"old"
    assert main([*push, "me/open", "--public"]) == 0


@pytest.mark.parametrize(
    ("options", "fail", "message"),
    [
        (["me/bad name"], {}, "'me/bad name' is not a valid name"),
        (["a/b/c"], {}, "is not a valid name"),
        (["me/edited", "--token", "hf_wrong"], {}, "does not accept the access token"),
        (["me/edited", "--token", " "], {}, "there is no access token"),
        (["other/edited"], {"repos/create": (403, "You do not own it")}, "may not write to 'other/edited': You do not"),
        (["me/edited"], {"commit": (413, "Too large")}, "refuses the upload to 'me/edited' (413): Too large"),
    ],
)
def test_refusals_are_explained(hub, folder, capsys, options, fail, message):
    hub.fail = fail
    assert main(["push", "--checkpoint", str(folder / "model"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "unexpected" not in error


def test_without_a_token_nothing_is_loaded(hub, folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("rlsedit_fast.models.loading.load_model", None)
    assert main(["push", "--store", str(folder / "store"), "me/edited"]) == 2
    error = capsys.readouterr().err
    assert "there is no access token" in error
    assert "hf auth login" in error


def test_folders_that_are_no_model_are_refused(hub, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for place, message in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", "contains no checkpoint"),
        (folder / "store", "is a store"),
    ):
        assert main(["push", "--checkpoint", str(place), "me/edited"]) == 2
        assert message in capsys.readouterr().err
    assert main(["push", "me/edited"]) == 2
    assert "pass either --store DIR" in capsys.readouterr().err
    assert not hub.repositories


def test_a_refused_connection_is_explained(folder):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "rlsedit_fast", "push", "--checkpoint", str(folder / "model"), "me/edited"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert f"the Hub (http://127.0.0.1:{port}) cannot be reached" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr
