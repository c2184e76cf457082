"""A repository of the small Hub of `hub_server`: files at commits, commits on branches."""

import hashlib
import json
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".h5")
FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class Repo:
    """A repository: its files at each commit, and the commits of its branches."""

    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # id -> {path: bytes}
    history: dict = field(default_factory=dict)  # branch -> [(id, message), ...]

    def commit(self, branch, files, message):
        """A new commit on a branch."""
        done = sum(map(len, self.history.values()))
        listing = json.dumps([done, branch, message, {name: git_id(data) for name, data in files.items()}])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.history.setdefault(branch, []).append((oid, message))
        return oid

    def resolve(self, revision):
        """The commit of a branch, or of an id; None if there is neither."""
        if revision in self.history:
            return self.history[revision][-1][0]
        return revision if revision in self.commits else None


def sha256(data):
    """As LFS names contents."""
    return hashlib.sha256(data).hexdigest()


def git_id(data):
    """As git names contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_facts(path, data):
    """What a listing says about a file that lies in LFS."""
    return {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if path.endswith(LFS_SUFFIXES) else {}
