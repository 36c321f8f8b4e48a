"""A Hub on the loopback interface: the endpoints that `huggingface_hub` needs, with everything in memory.

Model repositories with commits, branches and tags; regular and LFS files; private repositories; tokens that may only
read. Set `HF_ENDPOINT` to its `url` before `huggingface_hub` is imported, and `HF_HUB_DISABLE_XET=1`: it has no Xet.
"""

import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

DATE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self):
        """Return the id that the Hub and the client's cache use: SHA-256 of a large file, git's blob id of others."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    parent: str
    message: str
    files: dict[str, File]

    @property
    def oid(self):
        """Return an id that depends on parent, message and files."""
        listing = sorted((path, file.oid) for path, file in self.files.items())
        return hashlib.sha1(repr((self.parent, self.message, listing)).encode()).hexdigest()


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch, commit):
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid

    def history(self, branch="main"):
        """Return the commit messages of a branch, oldest first."""
        messages, oid = [], self.branches[branch]
        while oid in self.commits:
            messages.append(self.commits[oid].message)
            oid = self.commits[oid].parent
        return messages[::-1]


class Refusal(Exception):
    """An error response; the client distinguishes errors by `code`."""

    def __init__(self, status, message, code="", **facts):
        super().__init__(message)
        self.status, self.code, self.facts = status, code, facts


NOT_FOUND = "Repository not found"


class Request(BaseHTTPRequestHandler):
    """Handler that finds a request's method in `ROUTES` and sends its result as JSON, unless the method answered."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer_request(self):
        self.hub, self.body, url = self.server, self.read_body(), urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for methods, pattern, handle in ROUTES:
                if self.command in methods.split() and (found := re.fullmatch(pattern, path)):
                    with self.hub.lock:
                        answer = handle(self, **found.groupdict())
                    return None if answer is None else self.send(200, json.dumps(answer).encode())
            raise Refusal(404, f"this Hub does not know {self.command} {path}", "EntryNotFound")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), "X-Error-Code": refusal.code}
            body = json.dumps({"error": str(refusal), "errors": [{"message": str(refusal)}], **refusal.facts}).encode()
            return self.send(refusal.status, body, **{k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who sends the request, and for which repository.

    @property
    def user(self):
        """Return `(name, may write)` of the token; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repository(self, name, write=False):
        """Return a repository that the user may read, or write."""
        found, user = self.hub.repositories.get(name), self.user
        if found is None or (found.private and (user is None or user[0] != name.split("/")[0])):
            raise Refusal(404 if user else 401, NOT_FOUND, "RepoNotFound")
        if write:
            self.check_may_write(name.split("/")[0])
        return found

    def check_may_write(self, owner):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        name, may_write = self.user
        if name != owner or not may_write:
            raise Refusal(403, f"this token does not have the rights to write to {owner}'s repositories")

    def commit(self, repository, revision):
        oid = repository.branches.get(revision) or repository.tags.get(revision) or revision
        if oid not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.commits[oid]

    # The endpoints.

    def whoami(self):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        name, may_write = self.user
        token = {"displayName": "test", "role": "write" if may_write else "read"}
        return {"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}

    def create(self):
        request = json.loads(self.body)
        owner = request.get("organization") or (self.user or ("nobody",))[0]
        self.check_may_write(owner)
        name = f"{owner}/{request['name']}"
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        created = Repository(name, private=request.get("visibility") == "private")
        created.add("main", Commit("", "initial commit", {}))
        self.hub.repositories[name] = created
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": name}

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        try:
            metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        except yaml.YAMLError as error:
            raise Refusal(400, f"invalid YAML metadata: {error}") from error
        if not isinstance(metadata, dict):
            raise Refusal(400, "metadata must be a mapping")
        return {"errors": [], "warnings": []}

    def info(self, name, revision="main"):
        repository = self.repository(name)
        commit = self.commit(repository, revision)
        facts = {"id": name, "sha": commit.oid, "private": repository.private, "createdAt": DATE, "lastModified": DATE}
        measured = [
            {"filename": path, "data": entry}
            for path, file in commit.files.items()
            if fnmatch(path, ".eval_results/*.yaml")
            for entry in yaml.safe_load(file.content)
        ]
        return {**facts, "siblings": [{"rfilename": path} for path in commit.files], "evalResults": measured}

    def refs(self, name):
        repository = self.repository(name)
        listed = {
            kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": oid} for n, oid in its.items()]
            for kind, ref, its in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }
        return {**listed, "converts": []}

    def auth_check(self, name, write):
        self.repository(name, write=bool(write))
        return {}

    def branch(self, name, branch):
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, f"branch {branch} exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self.commit(repository, start).oid
        return {}

    def tag(self, name, revision):
        repository = self.repository(name, write=True)
        repository.tags[json.loads(self.body)["tag"]] = self.commit(repository, revision).oid
        return {}

    def preupload(self, name, revision):
        """Tell regular from large files, which are uploaded before the commit; the client skips unchanged ones."""
        time.sleep(self.hub.delay)
        there = self.commit(self.repository(name, write=True), revision).files
        answers = []
        for path in (request["path"] for request in json.loads(self.body)["files"]):
            mode = "lfs" if self.hub.is_lfs(name, path) else "regular"
            oid = there[path].oid if path in there else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def push(self, name, revision):
        repository = self.repository(name, write=True)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = self.commit(repository, revision)
        files, message = dict(parent.files), ""
        for key, value in ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines())):
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                files[value["path"]] = File(self.hub.large_files[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"this Hub does not know the operation {key}")
        oid = repository.add(revision, Commit(parent.oid, message, files))
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}

    def lfs_batch(self, name):
        self.repository(name, write=True)
        objects = []
        for request in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.storage}/large-files/{request['oid']}", "header": {}}}
            objects.append({**request, **({} if request["oid"] in self.hub.large_files else {"actions": upload})})
        return {"transfer": "basic", "objects": objects}

    def put_large_file(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what its oid says")
        self.hub.large_files[oid] = self.body
        return {}

    def tree(self, name, revision, folder):
        """Return the files below a folder, and the folders that contain them."""
        files = self.commit(self.repository(name), revision).files
        entries = {path: entry(path, file) for path, file in files.items()}
        for path in files:
            parts = path.split("/")[:-1]
            for above in ("/".join(parts[: depth + 1]) for depth in range(len(parts))):
                entries[above] = {"type": "directory", "path": above, "size": 0, "oid": "0" * 40}
        if folder and folder not in entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        below = (path for path in entries if path.startswith(prefix))
        return [entries[path] for path in below if recursive or "/" not in path.removeprefix(prefix)]

    def paths_info(self, name, revision):
        files = self.commit(self.repository(name), revision).files
        request = json.loads(self.body) if self.body[:1] == b"{" else parse_qs(self.body.decode())
        return [entry(path, files[path]) for path in request["paths"] if path in files]

    def resolve(self, name, revision, path):
        commit = self.commit(self.repository(name), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send(404, **headers, **missing)
        file = commit.files[path]
        if file.lfs:  # as on the Hub: a redirect to another host, at which the client reads the metadata
            linked = {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": len(file.content)}
            return self.send(302, Location=f"{self.hub.storage}/large-files/{file.oid}", **headers, **linked)
        return self.send(200, file.content, ETag=f'"{file.oid}"', **headers)

    def get_large_file(self, oid):
        return self.send(200, self.hub.large_files[oid], ETag=f'"{oid}"')


def entry(path, file):
    """Return the entry of a file in the listings of `tree` and `paths-info`."""
    facts = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
    return {**facts, "lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 0}} if file.lfs else facts


NAME, API = "(?P<name>[^/]+/[^/]+)", "/api/models/(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Request.whoami),
    ("POST", "/api/repos/create", Request.create),
    ("POST", "/api/validate-yaml", Request.validate_yaml),
    ("GET", API, Request.info),
    ("GET", f"{API}/revision/(?P<revision>.+)", Request.info),
    ("GET", f"{API}/refs", Request.refs),
    ("GET", f"{API}/auth-check(?P<write>/write)?", Request.auth_check),
    ("POST", f"{API}/branch/(?P<branch>.+)", Request.branch),
    ("POST", f"{API}/tag/(?P<revision>.+)", Request.tag),
    ("POST", f"{API}/preupload/(?P<revision>.+)", Request.preupload),
    ("POST", f"{API}/commit/(?P<revision>.+)", Request.push),
    ("GET", f"{API}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", Request.tree),
    ("POST", f"{API}/paths-info/(?P<revision>.+)", Request.paths_info),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Request.lfs_batch),
    ("PUT", "/large-files/(?P<oid>[0-9a-f]{64})", Request.put_large_file),
    ("GET HEAD", "/large-files/(?P<oid>[0-9a-f]{64})", Request.get_large_file),
    ("GET HEAD", f"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Request.resolve),
]


class Hub(ThreadingHTTPServer):
    """Server with its repositories in memory.

    Args:
        tokens: `(user, may write)` of each token.
        lfs: patterns of `owner/repository/path` of the files that are stored as large files.

    With `delay`, each commit waits for that many seconds before its files are read.
    """

    delay = 0.0

    def __init__(self, tokens, lfs=()):
        super().__init__(("127.0.0.1", 0), Request)
        self.tokens, self.lfs_patterns = tokens, lfs
        self.repositories, self.large_files, self.requests = {}, {}, []
        self.lock = threading.Lock()
        self.url, self.storage = (f"http://{host}:{self.server_address[1]}" for host in ("127.0.0.1", "localhost"))

    def publish(self, name, folder):
        """Add a public repository with the files of a folder."""
        files = {path.name: File(path.read_bytes(), lfs=False) for path in Path(folder).iterdir() if path.is_file()}
        self.repositories[name] = Repository(name, private=False)
        self.repositories[name].add("main", Commit("", "publish", files))

    def is_lfs(self, name, path):
        return any(fnmatch(f"{name}/{path}", pattern) for pattern in self.lfs_patterns)


@contextmanager
def serving(tokens, lfs=()):
    """Yield a [`Hub`] that answers until the block ends."""
    with Hub(tokens, lfs) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
