"""`sta-adapter push`: an adapter on the Hugging Face Hub, with its card."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

import click

from sta_adapter.cli.options import Grouped, option

if TYPE_CHECKING:
    from sta_adapter.adapter.push import Publication

LINE = 80

HELP = """\b
Example: sta-adapter push my-adapter user/my-adapter --license apache-2.0

Uploads the adapter's files and a model card in one commit, and nothing else
from the folder; a README that the repository has is kept. Needs a token with
write access: HF_TOKEN, or a login.
"""


@click.command(cls=Grouped, help=HELP)
@click.argument("folder")
@click.argument("repo_id")
@option("Repository", "--private", is_flag=True, help="Make the repository private, if it is new.")
@option("Repository", "--revision", metavar="NAME", help="Branch, made if it is missing. [default: main]")
@option("Repository", "--message", "commit_message", metavar="TEXT", help="Commit message.")
@option("Repository", "--create-pr", is_flag=True, help="Open a pull request instead.")
@option("Card", "--license", metavar="ID", help="Licence, such as apache-2.0.")
@option("Card", "--base-model", metavar="ID", help="Base model on the Hub. [default: as trained]")
@option("Card", "--dataset", "datasets", metavar="ID", multiple=True, help="Training data on the Hub; may be repeated.")
@option("Card", "--results", metavar="FILE", help="evaluate's results.json. [default: FOLDER's]")
@option("Result", "--dry-run", is_flag=True, help="Show the files and the card; upload nothing.")
@option("Result", "--json", "as_json", is_flag=True, help="Print JSON.")
def command(folder: str, repo_id: str, private: bool, dry_run: bool, as_json: bool, **options: object) -> None:
    """Push and say what was uploaded."""
    from sta_adapter.adapter.push import push_folder

    done = push_folder(folder, repo_id, private=private or None, dry_run=dry_run, **options)
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=1))
        return
    click.echo("\n".join(describe(done, dry_run)))


def describe(done: Publication, dry_run: bool) -> list[str]:
    """The outcome as lines of at most 80 columns, but for long names and the card."""
    if not done.changed:
        return [f"{done.repo_id} holds this adapter already; nothing was uploaded."]
    lines = [f"{'would upload' if dry_run else 'uploaded'} to {done.repo_id} in one commit:"]
    lines += [f"{size:>14,} bytes  {name}" for name, size in done.files.items()]
    lines += [f"{'removed':>20}  {name}" for name in done.removed]
    if done.card == "kept":
        lines.append("README.md of the repository was kept.")
    for note in done.notes:
        lines += textwrap.wrap(f"note: {note}", LINE, subsequent_indent="      ", break_long_words=False)
    if dry_run:
        return [*lines, "", done.card_text.rstrip()] if done.card == "new" else lines
    return [*lines, str(done.pr_url or done.commit_url), f'load it: load_sta(model, "{done.repo_id}")']
