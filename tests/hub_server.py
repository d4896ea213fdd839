"""A Hub on this machine: what huggingface_hub calls to create, write and read a repository.

``python tests/hub_server.py FOLDER [--slow SECONDS]`` prints its address. Blobs go to
``FOLDER/blobs``, repositories to ``FOLDER/repos.json``, a line for each request to
``FOLDER/requests.jsonl``; so a test can look at both from outside, and stop it.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = r"([\w.-]+/[\w.-]+)"
LFS_ABOVE = 100_000  # the Hub decides by file type as well; size is enough here


class Hub:
    def __init__(self, folder: Path, slow: float, fail_commit: int) -> None:
        self.folder, self.slow, self.fail_commit = folder, slow, fail_commit
        self.lock = threading.Lock()
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        path = folder / "repos.json"
        self.repos = json.loads(path.read_text()) if path.is_file() else {}
        self.commits = 0

    def save(self) -> None:
        (self.folder / "repos.json").write_text(json.dumps(self.repos))

    def blob(self, oid: str) -> Path:
        return self.folder / "blobs" / oid

    def put(self, data: bytes) -> str:
        oid = hashlib.sha256(data).hexdigest()
        self.blob(oid).write_bytes(data)
        return oid

    def head(self, repo: str) -> dict:
        return self.repos[repo]["commits"][-1]

    def at(self, repo: str, revision: str) -> dict | None:
        if repo not in self.repos:
            return None
        if revision == "main":
            return self.head(repo)
        return next((c for c in self.repos[repo]["commits"] if c["oid"] == revision), None)

    def commit(self, repo: str, files: dict, title: str) -> str:
        commits = self.repos[repo]["commits"]
        oid = hashlib.sha1(json.dumps([len(commits), files, title]).encode()).hexdigest()
        commits.append({"oid": oid, "files": files, "title": title})
        self.save()
        return oid


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, value, status=200, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, one in headers:
            self.send_header(name, one)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self, slow=0.0) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
                time.sleep(slow)
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        line = json.dumps({"method": self.command, "path": path})
        with self.hub.lock, (self.hub.folder / "requests.jsonl").open("a") as log:
            log.write(line + "\n")
        for pattern, route in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return route(self, *found.groups())
        self.body()
        return self.answer({"error": f"no route for {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def missing(self, code="RepoNotFound"):
        return self.answer({"error": code}, 404, [("X-Error-Code", code)])

    def whoami(self):
        self.answer({"name": "me", "type": "user", "orgs": []})

    def yaml(self):
        content = json.loads(self.body())["content"]
        good = content.startswith("---\n") and "\nlicense: " in content.replace("---", "", 1)
        self.answer({"errors": [] if good else [{"message": "no licence"}]}, 200 if good else 400)

    def create(self):
        asked = json.loads(self.body())
        if "Bearer hf_test" not in (self.headers.get("Authorization") or ""):
            return self.answer({"error": "log in"}, 401)
        repo = f"{asked['organization']}/{asked['name']}"
        with self.hub.lock:
            if repo in self.hub.repos:
                return self.answer({"error": "exists", "url": self.url(repo)}, 409)
            self.hub.repos[repo] = {"private": asked.get("visibility") != "public", "commits": []}
            self.hub.commit(repo, {}, "initial commit")
        return self.answer({"url": self.url(repo)})

    def url(self, repo):
        return f"http://{self.headers['Host']}/{repo}"

    def info(self, repo, revision=None):
        at = self.hub.at(repo, revision or "main")
        if at is None:
            return self.missing()
        return self.answer(
            {
                **{"id": repo, "_id": "0", "sha": at["oid"], "downloads": 0, "likes": 0},
                **{"private": self.hub.repos[repo]["private"], "tags": []},
                "siblings": [{"rfilename": name} for name in at["files"]],
            }
        )

    def tree(self, repo, revision):
        at = self.hub.at(repo, revision)
        if at is None:
            return self.missing()
        return self.answer([entry(self.hub, *item) for item in sorted(at["files"].items())])

    def preupload(self, repo, revision):
        asked = json.loads(self.body())["files"]
        at = self.hub.at(repo, revision)
        if at is None:
            return self.missing()
        files = []
        for one in asked:
            mode = "lfs" if one["size"] > LFS_ABOVE else "regular"
            there = at["files"].get(one["path"])
            oid = there and entry(self.hub, one["path"], there)["oid"]
            if there and there["lfs"]:
                oid = there["oid"]
            file = {"path": one["path"], "uploadMode": mode, "shouldIgnore": False}
            files.append(file | ({"oid": oid} if oid else {}))
        return self.answer({"files": files})

    def batch(self, repo):
        asked = json.loads(self.body())
        objects = []
        for one in asked["objects"]:
            if not self.hub.blob(one["oid"]).is_file():
                href = f"http://{self.headers['Host']}/lfs/{one['oid']}"
                one = one | {"actions": {"upload": {"href": href, "header": {}}}}
            objects.append(one)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        time.sleep(self.hub.slow)
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer({"error": "another checksum"}, 422)
        self.hub.put(data)
        return self.answer(b"")

    def commit(self, repo, revision):
        lines = [json.loads(line) for line in self.body().splitlines()]
        with self.hub.lock:
            self.hub.commits += 1
            if self.hub.commits == self.hub.fail_commit:
                return self.answer({"error": "the Hub is down"}, 500)
            files = dict(self.hub.head(repo)["files"])
            for line in lines[1:]:
                value, name = line["value"], line["value"]["path"]
                if line["key"] == "file":
                    oid = self.hub.put(base64.b64decode(value["content"]))
                    files[name] = {"oid": oid, "lfs": False}
                elif line["key"] == "lfsFile":
                    assert self.hub.blob(value["oid"]).stat().st_size == value["size"]
                    files[name] = {"oid": value["oid"], "lfs": True}
                else:
                    assert line["key"] == "deletedFile"
                    del files[name]
            oid = self.hub.commit(repo, files, lines[0]["value"]["summary"])
        return self.answer({"commitUrl": f"{self.url(repo)}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo, revision, name):
        at = self.hub.at(repo, revision)
        if at is None:
            return self.missing()
        commit = ("X-Repo-Commit", at["oid"])
        if name not in at["files"]:
            code = ("X-Error-Code", "EntryNotFound")
            return self.answer({"error": "no file"}, 404, [code, commit])
        data = self.hub.blob(at["files"][name]["oid"]).read_bytes()
        tag = entry(self.hub, name, at["files"][name])["oid"]
        if at["files"][name]["lfs"]:
            tag = at["files"][name]["oid"]
        return self.answer(data, 200, [("ETag", f'"{tag}"'), commit])


def entry(hub: Hub, name: str, file: dict) -> dict:
    data = hub.blob(file["oid"]).read_bytes()
    found = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
    if file["lfs"]:
        found["lfs"] = {"oid": file["oid"], "size": len(data), "pointerSize": 130}
    return found


ROUTES = (
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/validate-yaml", Handler.yaml),
    ("POST /api/repos/create", Handler.create),
    (f"POST /api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (f"POST /api/models/{REPO}/commit/(.+)", Handler.commit),
    (f"POST /{REPO}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT /lfs/([0-9a-f]{64})", Handler.upload),
    (f"GET /api/models/{REPO}/tree/([^/]+)/?", Handler.tree),
    (f"GET /api/models/{REPO}/revision/(.+)", Handler.info),
    (f"GET /api/models/{REPO}", Handler.info),
    (f"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slow", type=float, default=0.0, help="seconds before a blob is taken")
    parser.add_argument("--fail-commit", type=int, default=0, help="the commit answered with 500")
    given = parser.parse_args()
    Handler.hub = Hub(given.folder, given.slow, given.fail_commit)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    (given.folder / "address").write_text(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


if __name__ == "__main__":
    main()
