"""A small Hub on loopback for the real huggingface_hub client: repositories, branches, LFS, tokens, and faults on demand.

In a test:

    with HubServer(tokens={"hf_ann": "ann"}) as hub:
        hub.environment(home)  # for a subprocess: HF_ENDPOINT, HF_HOME, HF_TOKEN, ...
        hub.use(monkeypatch, cache)  # or for this very process, until the test ends
        hub.upload("ann/base", {"config.json": b"..."})  # a repository at once, without a client
        hub.fail("PUT", "/lfs/", cut=True)  # every upload of weights breaks off half-way
        hub.log  # what was asked: [("GET", "/api/models/ann/base/revision/main"), ...]

By hand: `python tests/hub_server.py --port 8765`, then the environment that it prints.
"""

import argparse
import contextlib
import os
import re
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer

from hub_pages import Handler
from hub_repo import FIRST_FILES, Repo


@dataclass
class Fault:
    """What goes wrong with requests of a method whose path matches."""

    method: str
    pattern: str
    times: int | None  # None: always
    status: int | None
    cut: bool
    wait: float


class HubServer:
    """The server; a context manager.

    Args:
        tokens: name of the user that each token may write for; a user called "reader" may write nothing.
        port: 0 takes a free one.
    """

    def __init__(self, tokens=None, port=0):
        self.tokens = {"hf_user": "user"} if tokens is None else dict(tokens)
        self.repos, self.objects = {}, {}  # objects: LFS contents by sha256
        self.log, self.faults, self.lock = [], [], threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def serve_forever(self):
        """Serve until interrupted."""
        self._server.serve_forever()

    def environment(self, home, token="hf_user"):
        """Variables for a process that is to use this Hub, with a cache and no login of its own."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return {**plain, **own, "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}

    def use(self, monkeypatch, cache, token="hf_user"):
        """Let huggingface_hub, imported already, use this Hub for the rest of a test, and never wait."""
        from huggingface_hub import constants, file_download, hf_api, utils

        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # since 0.30
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # of huggingface_hub.create_repo and the like
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # before 1.0
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", token)
        getattr(utils, "reset_sessions", lambda: None)()  # before 1.0 a session stays offline for good

    def upload(self, repo_id, files, *, private=False, gated=False, branch="main"):
        """Make a commit without a client; gives its id."""
        repo = self.repos.setdefault(repo_id, Repo(private, gated))
        return repo.commit(branch, {**FIRST_FILES, **self.files(repo_id, branch), **files}, "uploaded")

    def files(self, repo_id, revision="main"):
        """The files at a revision, by path; none where there is no such repository or revision."""
        repo = self.repos.get(repo_id)
        return dict(repo.commits.get(repo.resolve(revision), {})) if repo else {}

    def commits(self, repo_id, branch="main"):
        """Messages of a branch's commits, the first being the repository's making."""
        return [message for _, message in self.repos[repo_id].history[branch]]

    def fail(self, method, pattern, *, times=None, status=None, cut=False, wait=0.0):
        """Let requests fail: with a status, by a connection that is cut half-way, or after `wait` seconds."""
        self.faults.append(Fault(method, pattern, times, status, cut, wait))

    def recover(self):
        """Let nothing fail any more."""
        self.faults.clear()

    def fault(self, method, path):
        """The fault that hits this request, if any."""
        with self.lock:
            for found in self.faults:
                if found.method == method and re.search(found.pattern, path) and found.times != 0:
                    found.times = None if found.times is None else found.times - 1
                    return found
        return None


def main():
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A small Hub on loopback; the token hf_user may write as user.")
    parser.add_argument("--port", type=int, default=8765)
    hub = HubServer(port=parser.parse_args().port)
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN=hf_user HF_HUB_DISABLE_XET=1 HF_HOME=$(mktemp -d)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        hub.serve_forever()


if __name__ == "__main__":
    main()
