"""Names become paths: against a server on this machine that answers as the hub does, and against none at all."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from luthier import hub
from luthier.data.sources import Row, open_source
from luthier.errors import HubError, ModelError

COMMIT = "a" * 40
TOKEN = "hf_a_secret"
LONG = bytes(range(256)) * 2**16  # 16 MiB: the library keeps what came in pieces of 10 MiB
DEAD = "http://127.0.0.1:9"  # discard: nothing listens
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "models/o/plain": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"",
        "model.safetensors": b"w" * 5000,
        "consolidated.safetensors": b"never",
        "pytorch_model.bin": b"never",
        "pytorch_model.bin.index.json": b"never",
        "training_args.bin": b"never",
        "model.gguf": b"never",
        "original/model.safetensors": b"never",
        "README.md": b"never",
    },
    "models/o/sharded": {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        ).encode(),
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
    },
    "models/o/old": {"config.json": b"{}", "pytorch_model.bin": b"w", "training_args.bin": b"never"},
    "models/o/flaky": {"config.json": b"{}", "model.safetensors": LONG},
    "models/o/broken": {"config.json": b"{}", "model.safetensors": b"w"},
    "models/o/huge": {"config.json": b"{}", "model.safetensors": b"w"},
    "datasets/o/one": {"rows.jsonl": b'{"prompt": "p", "response": "r"}\n{"prompt": "q", "response": "s"}\n'},
    "datasets/o/splits": {"train.jsonl": b'{"a": "1"}\n', "test.jsonl": b'{"a": "2"}\n{"a": "3"}\n'},
    "datasets/o/odd": {
        "dev.jsonl": b'{"a": "1"}\n',
        "extra/validation.jsonl": b'{"a": "1"}\n',
        "test.jsonl": b'{"a": 1}\n',
    },
    "datasets/o/configured": {
        "README.md": b"---\nconfigs:\n- {config_name: en, data_files: en.jsonl}\n"
        b"- {config_name: zh, data_files: zh.jsonl}\n---\n",
        "en.jsonl": b'{"a": "en"}\n',
        "zh.jsonl": b'{"a": "zh"}\n',
    },
    "datasets/o/pictures": {"a.unknown": b"?"},
}
REFUSED = {
    "o/gated": (403, "GatedRepo"),
    "o/private": (401, "RepoNotFound"),
    "o/forbidden": (403, ""),
    "o/busy": (429, ""),
}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub and datasets ask of a hub. Every request is kept in `asked`."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str, str | None]] = []
    tokens: set[str | None] = set()

    def do_GET(self) -> None:  # noqa: N802
        path = self.path.split("?")[0]
        self.asked.append((self.command, path, self.headers.get("Range")))
        self.tokens.add(self.headers.get("Authorization"))
        kind, _, rest = path.removeprefix("/api/").partition("/") if path.startswith("/api/") else ("", "", "")
        if kind in ("models", "datasets"):
            owner, name, *tail = rest.split("/")
            self.repository(kind, f"{owner}/{name}", tail)
        elif "/resolve/" in path:
            repo, _, tail = path[1:].partition("/resolve/")
            self.file(repo if repo.startswith("datasets/") else f"models/{repo}", tail.partition("/")[2])
        else:
            self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def repository(self, kind: str, repo: str, tail: list[str]) -> None:
        files = REPOSITORIES.get(f"{kind}/{repo}")
        if repo in REFUSED:
            self.answer(REFUSED[repo][0], headers={"X-Error-Code": REFUSED[repo][1]})
        elif repo == "o/down":
            self.answer(503)
        elif files is None:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif tail[:1] == ["tree"]:
            inside = "/".join(tail[2:])
            listed = [
                {"type": "file", "path": file, "size": len(data), "oid": digest(data)} for file, data in files.items()
            ]
            self.answer(200, json.dumps([one for one in listed if str(one["path"]).startswith(inside)]).encode())
        elif tail[:1] == ["revision"] and tail[1] not in ("main", COMMIT):
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            size = 10**18 if repo == "o/huge" else None
            siblings = [{"rfilename": file, "size": size or len(data)} for file, data in files.items()]
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def file(self, repo: str, name: str) -> None:
        data = REPOSITORIES.get(repo, {}).get(name)
        place = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(data or b"")}"', "Accept-Ranges": "bytes"}
        if data is None:
            self.answer(404, headers={**place, "X-Error-Code": "EntryNotFound"})
        elif repo == "models/o/broken" and name.endswith("safetensors") and self.command == "GET":
            self.answer(410)
        elif start := int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0]):
            place["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[start:], place)
        elif repo == "models/o/flaky" and name.endswith("safetensors") and self.command == "GET":
            self.answer(200, data, place, sent=12 * 2**20)
        else:
            self.answer(200, data, place)

    def answer(self, status: int, body: bytes = b"{}", headers: dict[str, str] | None = None, sent: int = -1) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if sent < 0 else body[:sent])
        self.close_connection = sent >= 0

    def log_message(self, format: str, *values: Any) -> None:
        pass


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


SCRIPT = """
import json, sys
from pathlib import Path
from luthier import hub
from luthier.errors import LuthierError
for kind, name, revision in json.loads(sys.argv[1]):
    told, result = [], {}
    try:
        if kind == "model":
            result["path"] = str(hub.model_path(name, revision, Path.cwd(), told.append))
        else:
            result["files"] = [str(file) for file in hub.data_files(name, Path.cwd(), told.append)]
    except LuthierError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    print("RESULT" + json.dumps({**result, "told": told}), flush=True)
"""


def ask(
    folder: Path, endpoint: str, *names: str, revision: str | None = None, **environment: str
) -> list[dict[str, Any]]:
    """What hub says to each name (`data NAME` for a data set), in a fresh process whose caches lie in `folder`."""
    wanted = [["data", n[5:], None] if n.startswith("data ") else ["model", n, revision] for n in names]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "http", "HTTP", "ALL_PROXY"))}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(wanted)],
        env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert TOKEN not in run.stdout + run.stderr
    return [json.loads(line[6:]) for line in run.stdout.splitlines() if line.startswith("RESULT")]


# ---- models


def test_a_model_is_fetched_once_and_only_what_it_needs(tmp_path: Path, server: str) -> None:
    Hub.asked.clear()
    first, again, old, pinned = ask(tmp_path, server, "o/plain", "hf:o/plain", "hf:o/old", "hf:o/sharded")
    folder = Path(first["path"])
    assert sorted(file.name for file in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == b"w" * 5000
    assert first["told"] == [f"o/plain: fetching 4 files, 0.0 MB, from {server}"]
    assert again == {"path": first["path"], "told": []}
    assert sorted(file.name for file in Path(old["path"]).iterdir()) == ["config.json", "pytorch_model.bin"]
    assert len(list(Path(pinned["path"]).iterdir())) == 4
    gets = [
        path for command, path, _ in Hub.asked if command == "GET" and path.endswith("/o/plain/resolve/config.json")
    ]
    assert len(gets) <= 1
    assert f"Bearer {TOKEN}" in Hub.tokens


def test_a_broken_download_goes_on_where_it_broke_off(tmp_path: Path, server: str) -> None:
    Hub.asked.clear()
    (result,) = ask(tmp_path, server, "o/flaky")
    assert (Path(result["path"]) / "model.safetensors").read_bytes() == LONG
    ranges = [part for command, path, part in Hub.asked if command == "GET" and path.endswith("model.safetensors")]
    assert ranges[0] in (None, "bytes=0-") and ranges[1:] == [f"bytes={10 * 2**20}-"]


def test_what_the_hub_refuses(tmp_path: Path, server: str) -> None:
    gated = (
        "gated: log in at https://huggingface.co, accept its terms on its page, make a read token at"
        " https://huggingface.co/settings/tokens, then export HF_TOKEN=…"
    )
    no_access = (
        "it is not there, or private; check the name, and for a private one export HF_TOKEN=… (a read token of an"
        " account that may see it)"
    )
    expected = {
        "hf:o/none": f"hf:o/none: not to be found at {server}; check the name",
        "o/none": f"o/none: not to be found at {server}, nor is it a folder here; check the name",
        "hf:o/gated": f"hf:o/gated: {gated}",
        "hf:o/private": f"hf:o/private: {server} gives no access (401): {no_access}",
        "hf:o/forbidden": f"hf:o/forbidden: {server} gives no access (403): {no_access}",
        "hf:o/busy": f"hf:o/busy: {server} asks for a pause (429, too many requests); try again in some minutes",
        "hf:a--b": "hf:a--b: not a name on the hub: HFValidationError: Cannot have -- or .. in repo_id: 'a--b'.",
        "hf:a/b/c": "hf:a/b/c: not a name on a hub, as in hf:owner/name",
        "hf:o/broken": "hf:o/broken: could not be fetched whole (status 410); run it again, what came is kept; or put"
        " the files in a folder and give its path",
        "hf:o/down": f"hf:o/down: {server} cannot be reached (status 503); set a mirror (export HF_ENDPOINT=https://…),"
        " take modelscope:owner/name, or put the files in a folder and give its path",
        "data hf:o/none": f"hf:o/none: not to be found at {server}; check the name",
        "data hf:o/gated": f"hf:o/gated: {gated}",
        "data hf:one": "hf:one: not a data set's name, as in hf:owner/name or hf:owner/name[train]",
    }
    results = ask(tmp_path, server, *expected)
    assert [result["error"] for result in results] == [f"HubError: {message}" for message in expected.values()]
    (huge,) = ask(tmp_path, server, "hf:o/huge")
    assert huge["error"].startswith("HubError: hf:o/huge: 2,000,000,000.0 GB are to be fetched and ")
    assert huge["error"].endswith("/home/hub; make room, or move the cache: export HF_HOME=FOLDER")
    (revision,) = ask(tmp_path, server, "hf:o/plain", revision="v9")
    assert revision["error"] == (f"HubError: hf:o/plain: no branch, tag or commit 'v9' at {server}; check the revision")


def test_without_a_hub_the_cache_serves(tmp_path: Path, server: str) -> None:
    known, sharded, data = ask(tmp_path, server, "o/plain", "o/sharded", "data hf:o/one")
    (Path(sharded["path"]) / "model-2.safetensors").unlink()
    refused = f"{DEAD} cannot be reached (ConnectError: [Errno 111] Connection refused)"
    remedy = (
        "set a mirror (export HF_ENDPOINT=https://…), take modelscope:owner/name, or put the files in a folder and give"
        " its path"
    )
    cached, partial, unknown, no_data = ask(tmp_path, DEAD, "o/plain", "o/sharded", "o/none", "data hf:o/none")
    assert cached == {
        "path": known["path"],
        "told": [
            "o/plain: the hub cannot be reached (ConnectError: [Errno 111] Connection refused); taking the copy in the"
            " cache"
        ],
    }
    assert partial["error"] == (
        f"HubError: o/sharded: {refused}; {remedy}; the copy in the cache lacks model-2.safetensors"
    )
    assert unknown["error"] == f"HubError: o/none: {refused}; {remedy}"
    assert no_data["error"] == f"HubError: hf:o/none: {refused}; {remedy}"
    offline, offline_data = ask(tmp_path, DEAD, "o/plain", "data hf:o/one", HF_HUB_OFFLINE="1")
    assert offline["path"] == known["path"]
    assert offline["told"] == [
        "o/plain: the hub cannot be reached (HF_HUB_OFFLINE is set); taking the copy in the cache"
    ]
    assert offline_data["files"] == data["files"]


def test_a_copy_in_the_cache_outlives_its_token(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (fetched,) = ask(tmp_path, server, "o/old")
    monkeypatch.setitem(REFUSED, "o/old", (401, "RepoNotFound"))
    assert ask(tmp_path, server, "o/old") == [
        {"path": fetched["path"], "told": ["o/old: the hub refuses it (status 401); taking the copy in the cache"]}
    ]


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    monkeypatch.setenv("HOME", str(tmp_path))

    def path(name: str) -> Path:
        return hub.model_path(name, None, tmp_path, pytest.fail)

    assert path("here/model") == path("./here/model") == path("~/here/model") == tmp_path / "here" / "model"
    assert path(str(tmp_path / "here" / "model")) == tmp_path / "here" / "model"
    names = ["./none", "../none", str(tmp_path / "none"), "~/none", "runs/none", "here/none"]
    for name in [*names, "a/b/c", "with blank", "ms:o/m"]:
        with pytest.raises(ModelError, match=r"there is no such run or folder; a model on a hub is hf:owner"):
            path(name)
    with pytest.raises(ModelError, match=r"model\.gguf: a file, where a model's folder is expected"):
        path("model.gguf")


# ---- data sets


def test_data_sets(tmp_path: Path, server: str) -> None:
    (tmp_path / "o" / "here").mkdir(parents=True)
    one, train, test, missing, odd, config, chosen, pictures, here = ask(
        tmp_path,
        server,
        "data hf:o/one",
        "data hf:o/splits",
        "data hf:o/splits[test]",
        "data hf:o/splits[dev]",
        "data hf:o/odd",
        "data hf:o/configured",
        "data hf:o/configured/zh[train]",
        "data hf:o/pictures",
        "data hf:o/here",
    )

    def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
        read = [row for file in result["files"] for row in open_source(Path(file))]
        return [row.values for row in read if isinstance(row, Row)]

    assert rows(one) == [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "s"}]
    assert one["told"] == ["hf:o/one: split train, 2 rows"]
    assert rows(train) == [{"a": "1"}] and train["told"] == ["hf:o/splits: split train, 1 rows (not test)"]
    assert rows(test) == [{"a": "2"}, {"a": "3"}]
    assert missing["error"] == (
        "HubError: hf:o/splits[dev]: name one of its splits: hf:o/splits[train], hf:o/splits[test]"
    )
    assert odd["error"].startswith("HubError: hf:o/odd: name one of its splits: hf:o/odd[")
    assert config["error"] == (
        "HubError: hf:o/configured: name one of its configurations: hf:o/configured/en, hf:o/configured/zh"
    )
    assert rows(chosen) == [{"a": "zh"}]
    assert pictures["error"].startswith("HubError: hf:o/pictures: could not be read as a table (")
    assert here["error"] == (
        "HubError: hf:o/here: ./o/here lies here and the library would take it; for that one write ./o/here"
    )


def test_data_paths_are_given_back(tmp_path: Path) -> None:
    assert hub.data_files("rows.jsonl", tmp_path, pytest.fail) == [tmp_path / "rows.jsonl"]
    assert hub.data_files("/x/rows.jsonl", tmp_path, pytest.fail) == [Path("/x/rows.jsonl")]


def test_a_full_disk_is_said() -> None:
    full = "o/m: the disk is full; make room, or move the cache: export HF_HOME=FOLDER"
    assert str(hub._plain(OSError(28, "No space left on device"), "o/m")) == full
    wrapped = RuntimeError("Data processing error: No space left on device")  # as hf_xet says it
    assert str(hub._plain(wrapped, "o/m")) == full


# ---- the rest


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is not None, reason="modelscope is installed")
def test_modelscope_says_what_to_install(tmp_path: Path) -> None:
    for call in (
        lambda: hub.model_path("modelscope:o/m", None, tmp_path, pytest.fail),
        lambda: hub.data_files("modelscope:o/d[train]", tmp_path, pytest.fail),
    ):
        with pytest.raises(HubError) as error:
            call()
        assert str(error.value) == "modelscope: names need its library: pip install 'luthier[modelscope]'"


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = "import sys, luthier.hub; print([m for m in ('huggingface_hub', 'datasets', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
