"""What the small Hub of `hub_server` answers: the pages that the client asks for."""

import base64
import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repo import FIRST_FILES, LFS_SUFFIXES, Repo, git_id, lfs_facts, sha256

LFS_PAGES = {"upload": "lfs", "verify": "lfs-verify"}
MESSAGES = {
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
}


class Reply(Exception):
    """Ends a request with a status."""

    def __init__(self, status, code=None, message=None):
        self.status, self.code, self.message = status, code, message or MESSAGES.get(code, "refused")


class Handler(BaseHTTPRequestHandler):
    """One request: finds the route, knows who asks, and answers."""

    hub = None  # the HubServer
    protocol_version = "HTTP/1.1"
    cut = False

    def log_message(self, *_):
        """Say nothing."""

    def _serve(self):
        parts = urlsplit(self.path)
        self.path, self.route, self.query = parts.path, unquote(parts.path), parse_qs(parts.query)
        self.hub.log.append((self.command, self.route))
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault(self.command, self.route)
        self.cut = fault is not None and fault.cut
        if fault is not None and fault.wait:
            threading.Event().wait(fault.wait)
        if self.cut and length:
            self.rfile.read(length // 2)
            return self._hang_up()
        self.body = self.rfile.read(length)
        try:
            if fault is not None and fault.status:
                raise Reply(fault.status, message="made to fail")
            with self.hub.lock:
                answer = self._answer()
        except Reply as reply:
            return self._refuse(reply)
        return self._json(answer) if answer is not None else None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self):
        name = r"(?P<id>[\w.-]+/[\w.-]+)"
        routes = (
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("GET", rf"/api/models/{name}/tree/(?P<rev>[^/]+)(?P<folder>/.+)?", self._tree),
            ("GET", rf"/api/models/{name}(/revision/(?P<rev>[^/]+))?", self._info),
            ("POST", rf"/api/models/{name}/branch/(?P<rev>[^/]+)", self._branch),
            ("POST", rf"/api/models/{name}/preupload/(?P<rev>[^/]+)", self._preupload),
            ("POST", rf"/api/models/{name}/commit/(?P<rev>[^/]+)", self._commit),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", self._store),
            ("POST", r"/lfs-verify/(?P<oid>[0-9a-f]{64})", self._verify),
            ("GET|HEAD", rf"/{name}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", self._file),
        )
        for methods, pattern, action in routes:
            match = re.fullmatch(pattern, self.path)
            if match and self.command in methods.split("|"):
                return action(**{key: value and unquote(value) for key, value in match.groupdict().items()})
        raise Reply(404, message=f"no such page: {self.command} {self.route}")

    # who asks, and for what

    def _user(self):
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Reply(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _readable(self, id, rev=None):
        """The repository and the commit; a private one looks like none to others."""
        user, repo = self._user(), self.hub.repos.get(id)
        if repo is None or (repo.private and user not in (id.split("/")[0], "reader")):
            raise Reply(401, message="Invalid username or password.") if user is None else Reply(404, "RepoNotFound")
        if repo.gated and user is None:
            raise Reply(401, "GatedRepo", f"Access to model {id} is restricted.")
        commit = repo.resolve(rev or "main")
        if commit is None:
            raise Reply(404, "RevisionNotFound")
        return repo, commit

    def _writable(self, id, rev=None):
        found = self._readable(id, rev)
        if self._user() is None:
            raise Reply(401, message="Invalid username or password.")
        if self._user() != id.split("/")[0]:
            raise Reply(403, message=f"you don't have the rights to write to {id}")
        return found

    # pages

    def _whoami(self):
        if self._user() is None:
            raise Reply(401, message="Invalid username or password.")
        return {"type": "user", "name": self._user(), "orgs": []}

    def _validate(self):
        import yaml

        content = json.loads(self.body)["content"]
        try:
            data = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        except yaml.YAMLError as error:
            return {"errors": [{"message": str(error)}], "warnings": []}
        return {"errors": [] if isinstance(data, dict) else [{"message": "no mapping"}], "warnings": []}

    def _create(self):
        asked, user = json.loads(self.body), self._user()
        if user is None:
            raise Reply(401, message="Invalid username or password.")
        id = f"{asked.get('organization') or user}/{asked['name']}"
        if id in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{id}"}, 409)
        if id.split("/")[0] != user:
            raise Reply(403, message=f"you don't have the rights to create a model under {id.split('/')[0]}")
        repo = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", FIRST_FILES, "initial commit")
        self.hub.repos[id] = repo
        return {"url": f"{self.hub.url}/{id}", "name": id, "id": id}

    def _info(self, id, rev):
        repo, commit = self._readable(id, rev)
        files = [{"rfilename": path} for path in repo.commits[commit]]
        facts = {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return {"_id": "1", "id": id, "modelId": id, "sha": commit, "siblings": files, **facts}

    def _tree(self, id, rev, folder):
        repo, commit = self._readable(id, rev)
        inside = f"{folder.strip('/')}/" if folder else ""
        if not any(path.startswith(inside) for path in repo.commits[commit]):
            raise Reply(404, "EntryNotFound")
        return [
            {"type": "file", "path": path, "size": len(data), "oid": git_id(data), **lfs_facts(path, data)}
            for path, data in repo.commits[commit].items()
            if path.startswith(inside)
        ]

    def _branch(self, id, rev):
        repo, commit = self._writable(id, json.loads(self.body or "{}").get("startingPoint"))
        if rev in repo.history:
            raise Reply(409, message=f"Reference already exists: {rev}")
        repo.history[rev] = [(commit, "branched")]
        return {}

    def _preupload(self, id, rev):
        repo, commit = self._writable(id, rev)
        there = repo.commits[commit]
        answer = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES)
            old = there.get(file["path"])
            oid = None if old is None else sha256(old) if lfs else git_id(old)
            mode = "lfs" if lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def _batch(self, id):
        self._writable(id)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, actions = asked["oid"], {}
            if oid not in self.hub.objects:
                actions = {name: {"href": f"{self.hub.url}/{page}/{oid}"} for name, page in LFS_PAGES.items()}
            objects.append({**asked, **({"actions": actions} if actions else {})})
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid):
        if sha256(self.body) != oid:
            raise Reply(400, message="not the announced contents")
        self.hub.objects[oid] = self.body
        return {}

    def _verify(self, oid):
        if oid not in self.hub.objects:
            raise Reply(404, message="not uploaded")
        return {}

    def _commit(self, id, rev):
        repo, parent = self._writable(id, rev)
        files, message, request = dict(repo.commits[parent]), "", bool(self.query.get("create_pr"))
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Reply(412, message="A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Reply(400, message=f"{value['path']} points to contents that were not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile" and files.pop(value["path"], None) is None:
                raise Reply(404, "EntryNotFound", "A file with this name doesn't exist")
        branch = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.history)}" if request else rev
        oid = repo.commit(branch, files, message)
        discussion = f"{self.hub.url}/{id}/discussions/{branch.rsplit('/', 1)[-1]}"
        link = {"pullRequestUrl": discussion} if request else {}
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{id}/commit/{oid}", **link}

    def _file(self, id, rev, path):
        repo, commit = self._readable(id, rev)
        data = repo.commits[commit].get(path)
        if data is None:
            raise Reply(404, "EntryNotFound")
        tag = sha256(data) if path.endswith(LFS_SUFFIXES) else git_id(data)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if begin is None:
            return self._send(200, data, headers)
        headers["Content-Range"] = f"bytes {begin[1]}-{len(data) - 1}/{len(data)}"
        return self._send(206, data[int(begin[1]) :], headers)

    # answers

    def _json(self, value, status=200):
        return self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, reply):
        headers = {"Content-Type": "application/json", "X-Error-Message": reply.message}
        headers |= {"X-Error-Code": reply.code} if reply.code else {}
        self._send(reply.status, json.dumps({"error": reply.message}).encode(), headers)

    def _send(self, status, data, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
        if self.cut:
            self._hang_up()

    def _hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)
