"""Adapters to the Hugging Face Hub: the adapter's files and a card, in one commit."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sta_adapter.adapter.base_model import is_hub_id, saved_base
from sta_adapter.adapter.format import CONFIG, Description
from sta_adapter.adapter.hub import explain, status_of
from sta_adapter.adapter.lora_weights import LORA_CONFIG, LORA_WEIGHTS
from sta_adapter.adapter.model_card import CardFacts, make_card, read_run
from sta_adapter.adapter.push_check import read_checked
from sta_adapter.adapter.run_file import RECORDS_FIELD
from sta_adapter.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
MAIN = "main"
NO_LICENSE = "the card names no licence: without one others may not use the adapter; give license (--license)."
NOT_LOOKED_UP = "a dry run asks nobody: a README that the repository has would be kept, and LoRA of an adapter before would be removed."
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

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON; without the card's text."""
        return {name: value for name, value in asdict(self).items() if name != "card_text"}


@dataclass(frozen=True)
class _Adapter:
    """An adapter ready to travel: contents by file name."""

    description: Description
    files: dict[str, bytes]
    parameters: int

    def published(self, base_model: str | None, run: Mapping[str, object]) -> _Adapter:
        """With the base model's public name in the place of a path on this machine, and how clips were sampled."""
        saved = saved_base(self.description)
        name = base_model or _last(saved["id"])
        base = {"id": name, "revision": saved["revision"] if name == saved["id"] else None}
        description: Description = {**self.description, "base_model": base}
        frames = run.get("frames")
        if isinstance(frames, Mapping) and (sampling := {k: v for k, v in frames.items() if k != "backend"}):
            description["frames"] = sampling  # what decodes is no matter
        if RECORDS_FIELD in run:
            description[RECORDS_FIELD] = run[RECORDS_FIELD]
        files = {**self.files, CONFIG: _as_json(description)}
        if LORA_CONFIG in files:
            lora = json.loads(files[LORA_CONFIG])
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
    description, count, contents = read_checked(path)
    return _push(_Adapter(description, contents, count), repo_id, **{"run_folder": path, **options})


def push_files(files: Mapping[str, bytes], parameters: int, repo_id: str, **options: Any) -> Publication:
    """Publish an adapter's files as they are in memory, `parameters` numbers of STA; as `STAHandle.push_to_hub`."""
    return _push(_Adapter(json.loads(files[CONFIG]), {**files}, parameters), repo_id, **options)


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
    from huggingface_hub.utils import validate_repo_id

    endpoint = _readable(endpoint)
    base = _checked_base(adapter, base_model)
    run = read_run(Path(run_folder or os.devnull), None if results is None else Path(results))
    adapter = adapter.published(base, run.get("settings", {}))
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    branch, message = revision or MAIN, commit_message or "Upload STA adapter"
    api = HfApi(endpoint=endpoint, token=token)
    try:
        validate_repo_id(repo_id)
        name = repo_id if dry_run else _prepare_branch(api, repo_id, branch, private)
        facts = CardFacts(name, base, license, datasets, adapter.parameters, LORA_CONFIG in adapter.files, run)
        return _commit(api, adapter, facts, branch, message, create_pr, dry_run)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the adapter can't be pushed to {repo_id!r} on {api.endpoint}: {explain(error, api.endpoint)}. A push is one "
            "commit: the repository holds the whole adapter or its old contents, never a part. Push again later."
        ) from error


def _readable(endpoint: str | None) -> str | None:
    """The Hub's address; refused where a commit would be made there, and reading its address then be an error."""
    from huggingface_hub import __version__, constants

    endpoint = endpoint and endpoint.rstrip("/")
    if endpoint not in (None, constants.ENDPOINT) and int(__version__.split(".")[0]) < 1:
        raise ConfigError(
            f"endpoint is {endpoint!r}, and huggingface_hub {__version__} reads a commit's address by HF_ENDPOINT "
            f"({constants.ENDPOINT}) alone: set HF_ENDPOINT before Python starts, or install huggingface_hub 1 or newer."
        )
    return endpoint


def _prepare_branch(api: HfApi, repo_id: str, revision: str, private: bool | None) -> str:
    """Make the repository and the branch where they are missing; a public one never passes for a private one.

    Returns:
        The repository's id with its owner.
    """
    visible = functools.partial(api.create_repo, repo_id, exist_ok=True)
    repo_id = (visible() if private is None else visible(private=private)).repo_id
    if private and api.model_info(repo_id, revision=MAIN).private is False:
        raise CheckpointError(
            f"{repo_id!r} exists and is public, but private=True was requested; nothing was uploaded. Make it "
            "private in its settings, or take another repository."
        )
    if revision != MAIN:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _branch_contents(api: HfApi, repo_id: str, revision: str) -> tuple[str | None, set[str]]:
    """The commit that the branch is at, and its files; none where there is no such thing yet."""
    try:
        info = api.model_info(repo_id, revision=revision)
    except Exception as error:
        if status_of(error) in (401, 404):  # a push that is not allowed fails later, and says why
            return None, set()
        raise
    if info.siblings is None:
        return info.sha, set(api.list_repo_files(repo_id, revision=revision))
    return info.sha, {file.rfilename for file in info.siblings}


def _commit(
    api: HfApi, adapter: _Adapter, facts: CardFacts, revision: str, message: str, create_pr: bool, dry_run: bool
) -> Publication:
    """Upload all files in one commit, or only say what would be."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head, there = (None, set()) if dry_run else _branch_contents(api, facts.repo_id, revision)
    card = make_card(adapter.description, facts)
    files = {**adapter.files, **({} if CARD in there else {CARD: card.encode()})}
    removed = [name for name in (LORA_CONFIG, LORA_WEIGHTS) if name in there and name not in files]
    # a README that comes up meanwhile is not written over
    parent = head if CARD in files and len(head or "") == 40 else None
    done = None
    if not dry_run:
        done = api.create_commit(
            facts.repo_id,
            [*itertools.starmap(CommitOperationAdd, files.items()), *map(CommitOperationDelete, removed)],
            commit_message=message,
            revision=revision,
            create_pr=create_pr or None,
            parent_commit=parent,
        )
    return Publication(
        repo_id=facts.repo_id,
        url=f"{api.endpoint}/{facts.repo_id}",
        commit_url=None if done is None else done.commit_url,
        oid=None if done is None else done.oid,
        changed=done is None or done.oid != head,
        pr_url=None if done is None else done.pr_url,
        files={name: len(content) for name, content in files.items()},
        card="new" if CARD in files else "kept",
        removed=removed,
        notes=[*(_notes(adapter, facts) if CARD in files else []), *([NOT_LOOKED_UP] if dry_run else [])],
        card_text=card,
    )


def _checked_base(adapter: _Adapter, base_model: str | None) -> str | None:
    """The base model's id on the Hub, as given or as saved."""
    if base_model is not None and not is_hub_id(base_model):
        raise ConfigError(f"base_model is {base_model!r}, expected the id of a model on the Hub (user/name).")
    saved = saved_base(adapter.description)["id"]
    return base_model or (saved if is_hub_id(saved) else None)


def _notes(adapter: _Adapter, facts: CardFacts) -> list[str]:
    saved = saved_base(adapter.description)["id"]
    found = f"the folder {saved!r}" if saved else "a model without a name"
    return [
        *([] if facts.base_model else [NO_BASE.format(found=found)]),
        *([] if facts.license else [NO_LICENSE]),
        *facts.run.get("left_out", []),
    ]


def _last(name: str | None) -> str | None:
    """The last part of a path: where things lie on this machine is nobody's business."""
    return None if name is None else os.path.basename(os.path.normpath(name.replace("\\", "/"))) or None


def _as_json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
