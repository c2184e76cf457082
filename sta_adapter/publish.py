"""Adapters to the Hugging Face Hub: the adapter's files and a card, in one commit.

Public: `push_folder`, `push_adapter` (behind `handle.push_to_hub`), `Publication`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sta_adapter.adapter_format import CONFIG, WEIGHTS, adapter_files, read_description, read_weights
from sta_adapter.base_model import is_hub_id
from sta_adapter.errors import CheckpointError, ConfigError
from sta_adapter.hub import explain
from sta_adapter.lora_files import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.model_card import CardFacts, make_card, read_run

if TYPE_CHECKING:
    from sta_adapter.handle import STAHandle

CARD = "README.md"
NO_LICENSE = "the card names no licence: without one others may not use the adapter; give license (--license)."
NO_BASE = (
    "the card names no base model, as {found} is no Hub id: the adapter will not be listed below its base, and the "
    "card's code has a gap; give base_model (--base-model), such as Qwen/Qwen2-VL-2B-Instruct."
)


@dataclass(frozen=True)
class Publication:
    """What a push did.

    Attributes:
        repo_id: with its user or organisation.
        url: of the repository.
        commit_url: of the commit, or of the pull request.
        oid: the commit's id; None after a dry run.
        changed: False where the repository held just this already, so that no commit was made.
        pr_url: of the pull request, if one was asked for.
        files: bytes of each file that the commit holds.
        card: "new", or "kept" where the repository had a README.
        removed: files of the adapter before that this one has not.
        notes: what the user should know.
        card_text: the card that was, or would have been, written.
    """

    repo_id: str
    url: str
    commit_url: str | None
    oid: str | None
    changed: bool
    pr_url: str | None
    files: Mapping[str, int]
    card: str
    removed: Sequence[str]
    notes: Sequence[str]
    card_text: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without the card's text."""
        return {name: value for name, value in asdict(self).items() if name != "card_text"}


@dataclass(frozen=True)
class _Adapter:
    """An adapter ready to travel: contents or paths by file name."""

    description: dict[str, Any]
    files: dict[str, bytes | Path]
    parameters: int

    def published(self, base_model: str | None, frames: Mapping[str, Any]) -> _Adapter:
        """With the base model's public name in the place of a path on this machine, and how clips were sampled."""
        name = base_model or _last(self.description.get("base_model", {}).get("id"))
        revision = self.description.get("base_model", {}).get("revision") if name == base_model else None
        description = {**self.description, "base_model": {"id": name, "revision": revision}}
        sampling = {key: value for key, value in frames.items() if key != "backend"}  # what decodes is no matter
        description |= {"frames": sampling} if sampling else {}
        files = {**self.files, CONFIG: _as_json(description)}
        if LORA_CONFIG in files:
            content = files[LORA_CONFIG]
            lora = json.loads(content if isinstance(content, bytes) else content.read_bytes())
            files[LORA_CONFIG] = _as_json({**lora, "base_model_name_or_path": name})
        return _Adapter(description, files, self.parameters)


def push_folder(folder: str | os.PathLike[str], repo_id: str, **options: Any) -> Publication:
    """Publish a saved adapter; nothing but the adapter's files and a card leaves the folder.

    Args:
        folder: an adapter's, such as the output of `sta-adapter train`, whose recipe then stands in the card.
        repo_id: as for `STAHandle.push_to_hub`.
        options: the further arguments of `STAHandle.push_to_hub`.

    Raises:
        CheckpointError: the folder holds no whole adapter, or the Hub refused.
        ConfigError: an argument has another form.
    """
    path = Path(folder)
    description = read_description(path)
    weights = read_weights(path, description)
    names = [WEIGHTS, CONFIG]
    if (path / LORA_CONFIG).exists():
        if not (path / LORA_WEIGHTS).exists():
            raise CheckpointError(f"{path} holds {LORA_CONFIG} but no {LORA_WEIGHTS}; pickled weights are not pushed.")
        names += [LORA_CONFIG, LORA_WEIGHTS]
    elif description.get("lora") is True:
        raise CheckpointError(f"the adapter in {path} was saved with LoRA weights, but {LORA_CONFIG} is missing.")
    count = sum(tensor.numel() for tensor in weights.values())
    adapter = _Adapter(description, {name: path / name for name in names}, count)
    return _push(adapter, repo_id, **{"run_folder": path, **options})


def push_adapter(handle: STAHandle, repo_id: str, **options: Any) -> Publication | None:
    """Publish a model's adapter as it is in memory; arguments and errors as `STAHandle.push_to_hub`."""
    from sta_adapter.checkpoint import adapter_contents
    from sta_adapter.sharding import is_sharded, whole_shape, write_once

    files = adapter_files(*adapter_contents(handle))
    count = sum(math.prod(whole_shape(parameter)) for parameter in handle.parameters())
    adapter = _Adapter(json.loads(files[CONFIG]), {**files}, count)
    if not is_sharded(handle.model.parameters()):
        return _push(adapter, repo_id, **options)
    done: list[Publication] = []
    write_once(lambda: done.append(_push(adapter, repo_id, **options)))
    return done[0] if done else None


def _push(
    adapter: _Adapter,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] = (),
    run_folder: str | os.PathLike[str] | None = None,
    results: str | os.PathLike[str] | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """See `STAHandle.push_to_hub`."""
    from huggingface_hub import HfApi

    base = _checked_base(adapter, base_model)
    run = read_run(Path(run_folder or os.devnull), None if results is None else Path(results))
    adapter = adapter.published(base, run.get("settings", {}).get("frames", {}))
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    facts = CardFacts(repo_id, base, license, datasets, adapter.parameters, LORA_CONFIG in adapter.files, run)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        target = _Target(api, repo_id, revision, create_pr)
        if not dry_run:
            target.prepare(private)
        return target.commit(adapter, facts, commit_message or "Upload STA adapter", dry_run)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the adapter can't be pushed to {repo_id!r} on {api.endpoint}: {explain(error, api.endpoint)}. A push is one "
            "commit: the repository holds this adapter or what it held before, never a part. Push again when it works."
        ) from error


class _Target:
    """A branch of a repository on the Hub."""

    def __init__(self, api: Any, repo_id: str, revision: str | None, create_pr: bool) -> None:
        self.api, self.repo_id, self.revision, self.create_pr = api, repo_id, revision, create_pr

    def prepare(self, private: bool | None) -> None:
        """Make the repository and the branch where they are missing; a public one never passes for a private one."""
        visibility = {} if private is None else {"private": private}
        self.repo_id = self.api.create_repo(self.repo_id, exist_ok=True, **visibility).repo_id
        is_private = self.api.model_info(self.repo_id).private
        if private and is_private is False:
            raise CheckpointError(
                f"{self.repo_id!r} exists and is public, and private=True was asked for; nothing was uploaded. Make it "
                "private in its settings, or take another repository."
            )
        if self.revision is not None:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def there(self) -> tuple[str | None, set[str]]:
        """The commit that the branch is at, and its files; none where there is no repository yet."""
        from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = self.api.model_info(self.repo_id, revision=self.revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None, set()
        return info.sha, {file.rfilename for file in info.siblings or ()}

    def commit(self, adapter: _Adapter, facts: CardFacts, message: str, dry_run: bool) -> Publication:
        """Upload all files in one commit, or only say what would be."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head, there = self.there()
        facts = CardFacts(**{**vars(facts), "repo_id": self.repo_id})
        card = make_card(adapter.description, facts)
        files = {**adapter.files, **({} if CARD in there else {CARD: card.encode()})}
        removed = [name for name in (LORA_CONFIG, LORA_WEIGHTS) if name in there and name not in files]
        operations: list[Any] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in removed]
        done = None
        if not dry_run:
            done = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr or None,
                parent_commit=head if CARD in files else None,  # a README that comes up meanwhile is not written over
            )
        return Publication(
            repo_id=self.repo_id,
            url=f"{self.api.endpoint}/{self.repo_id}",
            commit_url=None if done is None else done.commit_url,
            oid=None if done is None else done.oid,
            changed=done is None or done.oid != head,
            pr_url=None if done is None else done.pr_url,
            files={name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in files.items()},
            card="new" if CARD in files else "kept",
            removed=removed,
            notes=_notes(adapter, facts) if CARD in files else [],
            card_text=card,
        )


def _checked_base(adapter: _Adapter, base_model: str | None) -> str | None:
    """The base model's id on the Hub, as given or as saved."""
    if base_model is not None and not is_hub_id(base_model):
        raise ConfigError(f"base_model is {base_model!r}, expected the id of a model on the Hub (user/name).")
    saved = adapter.description.get("base_model", {}).get("id")
    return base_model or (saved if is_hub_id(saved) else None)


def _notes(adapter: _Adapter, facts: CardFacts) -> list[str]:
    saved = adapter.description["base_model"]["id"]
    found = f"the folder {saved!r}" if saved else "a model without a name"
    return [
        *([] if facts.base_model else [NO_BASE.format(found=found)]),
        *([] if facts.license else [NO_LICENSE]),
    ]


def _last(name: str | None) -> str | None:
    """The last part of a path: where things lie on this machine is nobody's business."""
    return None if name is None else os.path.basename(os.path.normpath(name.replace("\\", "/"))) or None


def _as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
