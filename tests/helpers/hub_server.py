"""A small Hugging Face Hub on the loopback, for the real client: accounts, model repositories, git LFS ("basic"
transfer, the client's way where its Xet transfer is switched off), commits and downloads. It can be told to fail.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A model repository: its files [path: bytes], which of them are large, and the name of its last commit."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1("".join(self.commits).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves in a thread within `with HubServer(token) as hub:`.

    Args:
        token: the one it accepts. user: whose it is. role: what the token may do.

    Attributes:
        repositories: by id. blobs: large files received, by SHA-256. requests: "METHOD path" in order. received: the
            bodies and headers of all requests but the Authorization header, as one text.
        cut_upload: in the middle of this upload of a large file (1 is the first) the connection is cut, and from then
            on uploads are refused, as an upload address that has expired is, until it is None again. echo_token: name
            the token in the refusal of it, as no server should.
    """

    daemon_threads = True

    def __init__(self, token: str, user: str = "someone", role: str = "write"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.user, self.role = token, user, role
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.received = b""
        self.uploads = 0
        self.cut_upload: int | None = None
        self.echo_token = False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):  # a client that went away is none of the test's business
        pass

    def count(self, pattern: str) -> int:
        """How many requests match."""
        return sum(bool(re.search(pattern, line)) for line in self.requests)


ID = r"(?P<id>[\w.-]+/[\w.-]+)"
ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_card"),
    (rf"POST /api/models/{ID}/preupload/main", "preupload"),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /storage/(?P<oid>\w+)", "lfs_upload"),
    (r"POST /storage/verify", "lfs_verify"),
    (rf"POST /api/models/{ID}/commit/main", "commit"),
    (rf"GET /api/models/{ID}/tree/[^/]+", "tree"),
    (rf"GET /api/models/{ID}(/revision/[^/]+)?", "info"),
    (rf"(GET|HEAD) /{ID}/resolve/[^/]+/(?P<path>.+)", "resolve"),
)
OPEN_TO_ALL = ("tree", "info", "resolve", "lfs_upload")  # a signed address stands for the token at the storage


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        headers = [line for line in self.headers.items() if line[0].lower() != "authorization"]
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
            self.server.received += f"{self.path} {headers}".encode()
        routes = ((action, re.fullmatch(pattern, f"{self.command} {path}")) for pattern, action in ROUTES)
        action, found = next((route for route in routes if route[1]), (None, None))
        if not found:
            self.read_body()
            return self.refuse(404, "EntryNotFound", "no such address")
        self.authorized = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if not self.authorized and action not in OPEN_TO_ALL:
            self.read_body()
            shown = f" {self.headers.get('Authorization')}" if self.server.echo_token else ""
            return self.refuse(401, None, "Invalid credentials in Authorization header" + shown)
        return getattr(self, action)(**found.groupdict())

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_):
        pass

    def read_body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.received += body
        return body

    def answer(self, value, status: int = 200, **headers) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer({"error": message}, status, **headers)

    def repository(self, name: str) -> Repository | None:
        """The repository, if it is there and may be seen; otherwise the refusal has been sent."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.authorized):
            return self.refuse(404 if self.authorized else 401, "RepoNotFound", "Repository not found")
        return found

    def whoami(self):
        token = {"displayName": "test", "role": self.server.role}
        self.answer({
            "type": "user", "name": self.server.user, "orgs": [{"name": "a-lab"}],
            "auth": {"type": "access_token", "accessToken": token},
        })  # fmt: skip

    def create(self):
        wanted = json.loads(self.read_body())
        name = f"{wanted.get('organization') or self.server.user}/{wanted['name']}"
        known = name in self.server.repositories
        if not known:
            self.server.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        self.answer(
            answer | ({"error": "You already created this model repo"} if known else {}), 409 if known else 200
        )

    def validate_card(self):
        content = json.loads(self.read_body())["content"]
        good = content.startswith("---\n") and "license:" in content.split("---")[1]
        self.answer({"errors": [] if good else [{"message": "no license"}], "warnings": []}, 200 if good else 400)

    def preupload(self, id):
        files = json.loads(self.read_body())["files"]
        if self.repository(id):
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def lfs_batch(self, id):
        wanted = json.loads(self.read_body())
        assert "basic" in wanted["transfers"] and wanted["operation"] == "upload"
        objects = []
        for item in wanted["objects"]:
            if item["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.url}/storage/{item['oid']}?signature=sesame"}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/storage/verify"}}
            objects.append(item)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        with self.server.lock:
            self.server.uploads += 1
            cut_at, number = self.server.cut_upload, self.server.uploads
        if cut_at is not None and number == cut_at:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        body = self.read_body()
        if cut_at is not None and number > cut_at:
            return self.refuse(403, None, "Request has expired")
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.answer({})

    def lfs_verify(self):
        item = json.loads(self.read_body())
        whole = len(self.server.blobs.get(item["oid"], b"")) == item["size"]
        self.answer({}, 200 if whole else 404)

    def commit(self, id):
        lines = [json.loads(line) for line in self.read_body().splitlines()]
        repository = self.repository(id)
        if not repository:
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
                self.server.received += repository.files[value["path"]]
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.blobs[value["oid"]]
                repository.large.add(value["path"])
        repository.commits.append(lines[0]["value"]["summary"])
        commit_url = f"{self.server.url}/{id}/commit/{repository.sha}"
        self.answer({"commitUrl": commit_url, "commitOid": repository.sha, "success": True})

    def info(self, id):
        if repository := self.repository(id):
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            about = {"id": id, "sha": repository.sha, "private": repository.private, "tags": [], "siblings": siblings}
            self.answer(about)

    def tree(self, id):
        if repository := self.repository(id):
            self.answer(
                [_entry(path, content, path in repository.large) for path, content in repository.files.items()]
            )

    def resolve(self, id, path):
        repository = self.repository(id)
        if not repository:
            return None
        if path not in repository.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = repository.files[path]
        entry = _entry(path, content, path in repository.large)
        headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "X_Repo_Commit": repository.sha}
        first = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not first:
            return self.answer(content, Accept_Ranges="bytes", **headers)
        start, end = int(first[1]), int(first[2] or len(content) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.answer(content[start : end + 1], 206, **headers)


def _entry(path: str, content: bytes, large: bool) -> dict:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
    sha256 = hashlib.sha256(content).hexdigest()
    return entry | ({"lfs": {"oid": sha256, "size": len(content), "pointerSize": 134}} if large else {})
