"""push_to_hub: what a run leaves arrives whole, in one commit, at a Hub on loopback."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from conftest import Ended, write_jsonl
from launching import TINY_BERT, TINY_RUN, checkpoints, command_line
from recipes.causal_lm import finetune as instruction
from recipes.classification import finetune as classification
from utils import plots, run_folder

LORA = {"r": 4, "lora_alpha": 8}


class Hub:
    """Repositories as dicts of files; what huggingface_hub asks of the Hub when it uploads."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, Any] = {}
        self.commits: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.broken = ""  # the part of a path at which the server fails
        self.endpoint = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if self.broken and self.broken in path:
            return 500, {"error": "out of order"}
        if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if token not in ("hf_write", "hf_read"):
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'someone'}/{asked['name']}"
            there = {"url": f"{self.endpoint}/{name}"}
            if name in self.repositories:
                return 409, there | {"error": "You already created this model repo"}
            if token == "hf_read":
                return 403, {"error": "You don't have the rights to create a model"}
            self.repositories[name], self.visibility[name] = {}, asked.get("visibility")
            return 200, there
        if name := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            actions = [
                entry | {"actions": {"upload": {"href": f"{self.endpoint}/blobs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": actions}
        name, what = re.fullmatch(r"/api/models/(.+?)(?:/(\w+)/main)?", path).groups()
        files = self.repositories.get(name)
        if files is None:
            return 404, {"error": "Repository not found"}
        if what is None:
            return 200, {"id": name, "private": self.visibility.get(name) == "private"}
        if what == "tree":
            return 200, [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in files]
        if token == "hf_read":
            return 403, {"error": "a write token is needed"}
        if what == "preupload":
            named = [entry["path"] for entry in json.loads(body)["files"]]
            modes = {
                file: "lfs" if file.endswith((".safetensors", ".png")) else "regular"
                for file in named
            }
            return 200, {
                "files": [
                    {"path": f, "uploadMode": m, "shouldIgnore": False} for f, m in modes.items()
                ]
            }
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": 40 * "1"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Where huggingface_hub looks for the Hub, with a token that may write."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, answer = hub.answer(self.command, self.path, token, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://localhost:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def with_plots(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files where plots would be."""

    def write(folder: Any) -> list[Path]:
        path = folder.path / "plots" / "loss.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x89PNG of the loss")
        return [path]

    monkeypatch.setattr(plots, "write_plots", write)


def exported(folder: Path) -> dict[str, bytes]:
    files = [path for path in (folder / "model").rglob("*") if path.is_file()]
    return {path.relative_to(folder / "model").as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def train(
    request: pytest.FixtureRequest, call: Callable, pretrain: Callable, tmp_path: Path
) -> Callable[..., Ended]:
    """train(kind, **settings): a run of one step that leaves a model, an adapter, a classifier."""
    turns = [{"role": "user", "content": "ka"}, {"role": "assistant", "content": "to mi"}]
    chats = write_jsonl(tmp_path / "chats.jsonl", 4 * [{"messages": turns}])
    texts = write_jsonl(
        tmp_path / "texts.jsonl", 4 * [{"text": "ka", "label": "a"}, {"text": "to", "label": "b"}]
    )
    given = {"max_steps": 1, "sequence_length": 64, "global_batch_size": 4, "report_to": []}
    conversations = given | {"train_data": [{"path": chats}], "chat_template": "plain"}
    labelled = given | {"train_data": [{"path": texts}], "model": TINY_BERT["model"]}

    def run(kind: str, **settings: Any) -> Ended:
        folder = tmp_path / "a-run"
        settings = {"push_to_hub": True, **settings}
        if kind == "model":
            return pretrain("a-run", max_steps=1, **settings)
        if kind == "adapter":
            own = {
                "model": TINY_RUN["model"],
                "lora": LORA,
                "tokenizer": request.getfixturevalue("tokenizer_folder"),
            }
            words = command_line({"output_dir": folder, **conversations, **own, **settings})
            return call(instruction.main, words, folder)
        own = {"tokenizer": request.getfixturevalue("wordpiece_folder")}
        words = command_line({"output_dir": folder, **labelled, **own, **settings})
        return call(classification.main, words, folder)

    return run


@pytest.mark.parametrize("kind", ["model", "adapter", "classifier"])
def test_what_arrives_is_what_was_exported(kind, train, hub, with_plots):
    given = {"license": "apache-2.0", "language": ["en", "code"], "tags": ["tiny"]}
    ended = train(kind, **given, hub_private_repo=True)
    assert (ended.status, ended.error) == (0, "")
    assert f"pushed: {hub.endpoint}/someone/a-run\n" in ended.output
    files = hub.repositories["someone/a-run"]
    assert files == exported(ended.folder)
    assert ("adapter_config.json" in files) == (kind == "adapter")
    assert files["plots/loss.png"] == b"\x89PNG of the loss"
    assert b"](plots/loss.png)" in files["README.md"]
    assert (len(hub.commits), hub.visibility) == (1, {"someone/a-run": "private"})
    data = ModelCard(files["README.md"].decode()).data
    assert {name: data.get(name) for name in ("license", "language")} | {"tags": ["tiny"]} == given
    assert data.tags == (["lora", "tiny"] if kind == "adapter" else ["tiny"])
    assert data.library_name == ("peft" if kind == "adapter" else "transformers")


def refusals(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Callable, str]]:
    """What is wrong → (how it comes about, what is said)."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        nobody = f"http://localhost:{probe.getsockname()[1]}"
    token = "there is no token: set HF_TOKEN, or run hf auth login"
    return {
        "no token": (lambda: monkeypatch.delenv("HF_TOKEN"), token),
        "a wrong token": (
            lambda: monkeypatch.setenv("HF_TOKEN", "hf_typo"),
            "the Hub does not know the token",
        ),
        "a token to read": (
            lambda: monkeypatch.setenv("HF_TOKEN", "hf_read"),
            "the token may not write there",
        ),
        "a token to read, and a repository": (
            lambda: (
                monkeypatch.setenv("HF_TOKEN", "hf_read"),
                hub.repositories.update({"someone/a-run": {}}),
            ),
            "the token may not write there",
        ),
        "no Hub": (
            lambda: monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody),
            "ConnectError: ",
        ),
    }


@pytest.mark.parametrize("what", refusals(None, None))
def test_what_would_fail_at_the_end_is_told_before_the_training(what, train, hub, monkeypatch):
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(huggingface_hub.constants, name, "/nowhere")
    happens, told = refusals(hub, monkeypatch)[what]
    happens()
    ended = train("model")
    endpoint = huggingface_hub.constants.ENDPOINT
    start = f"error: push_to_hub: cannot write to a-run at {endpoint}: {told}"
    assert ended.status == 2
    assert ended.error.startswith(start)
    assert ended.error.count("\n") == 1
    assert not ended.folder.exists()


def test_what_is_to_be_private_goes_to_no_public_repository(train, hub):
    hub.repositories["someone/a-run"] = {}
    ended = train("model", hub_private_repo=True)
    assert (ended.status, hub.repositories) == (2, {"someone/a-run": {}})
    there = f"{hub.endpoint}/someone/a-run"
    assert ended.error == f"error: hub_private_repo: {there} is there already, and public\n"


@pytest.mark.parametrize("what", ["/blobs/", "/commit/"])
def test_an_upload_that_fails_leaves_a_finished_run_and_is_repeated(what, train, hub, monkeypatch):
    monkeypatch.setattr(run_folder, "command_line", lambda: "python recipe.py")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before tries that come
    hub.broken = what
    failed = train("model")
    assert (failed.status, hub.commits) == (2, [])
    assert failed.error.startswith("error: push_to_hub: cannot write to a-run at ")
    assert failed.error.endswith(
        f"{failed.folder} is finished all the same; to upload it: python recipe.py\n"
    )
    before = exported(failed.folder)
    hub.broken = ""
    ended = train("model")
    assert (ended.status, ended.error) == (0, "")
    assert "is finished at step 1" in ended.output
    assert f"pushed: {hub.endpoint}/someone/a-run\n" in ended.output
    assert hub.repositories["someone/a-run"] == before == exported(ended.folder)
    assert "pushed" not in train("model").output
    assert len(hub.commits) == 1
    assert train("model", hub_model_id="team/other").status == 0
    assert hub.repositories["team/other"] == before


def test_a_finished_run_is_pushed_when_it_is_told_to(train, hub):
    folder = train("model", push_to_hub=False).folder
    assert hub.repositories == {}
    assert train("model").status == 0
    assert hub.repositories == {"someone/a-run": exported(folder)}
    assert train("model", license="mit").status == 0
    assert b"\nlicense: mit\n" in hub.repositories["someone/a-run"]["README.md"]
    assert len(checkpoints(folder)) == 1


def test_of_the_model_before_nothing_is_left(train, hub):
    """Else whoever loads it would get that one, or a mixture."""
    stale = {name: b"{}" for name in ("adapter_config.json", "model-00002-of-00002.safetensors")}
    kept = {name: b"kept" for name in (".gitattributes", "model.gguf", "onnx/model.onnx")}
    hub.repositories["someone/a-run"] = stale | kept
    ended = train("model")
    assert hub.repositories["someone/a-run"] == exported(ended.folder) | kept
    assert len(hub.commits) == 1


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("language", "english", "'english' is no code of ISO 639 such as en, de, yue"),
        ("language", ["en", "jp"], "'jp' is no code of ISO 639"),
        ("license", "Apache 2.0", "'Apache 2.0' is not spelt as on the Hub: apache-2.0, "),
    ],
)
def test_what_the_hub_does_not_know(name, value, told, train, hub):
    ended = train("model", **{name: value})
    assert (ended.status, hub.repositories) == (2, {})
    assert ended.error.startswith(f"error: {name}: {told}")


def test_an_adapter_of_a_base_that_others_do_not_have(train, hub, tmp_path):
    base = train("model", push_to_hub=False).folder / "model"
    words = {"model_name_or_path": str(base), "tokenizer": str(base), "model": {}}
    ended = train("adapter", **words, output_dir=str(tmp_path / "adapter"))
    assert ended.status == 2
    assert ended.error == (
        f"error: push_to_hub: the adapter's base {base} is a folder here, which others do not "
        "have: give its name on the Hub, or set merge_adapter: true\n"
    )
    merged = {"merge_adapter": True, "output_dir": str(tmp_path / "merged")}
    assert train("adapter", **words, **merged).status == 0
    card = ModelCard(hub.repositories["someone/merged"]["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (None, "transformers")
