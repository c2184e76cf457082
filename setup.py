"""What pyproject.toml can't say: where the project lives, which is known to those who publish it, by STA_REPOSITORY_URL.

With it, README's links and pictures lead there from the package index, and the package names its pages; without it, README stays as
it is.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def description(url: str) -> str:
    """README.md with links from the repository at `url`; unchanged for an empty one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not url:
        return text

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({url}/{kind}/main/{match[3]})"

    return LINK.sub(absolute, text)


def project_urls(url: str) -> dict[str, str]:
    """The project's pages by name; none for an empty `url`."""
    pages = {
        "Source": "",
        "Documentation": "/tree/main/docs",
        "Changelog": "/blob/main/CHANGELOG.md",
        "Issues": "/issues",
    }
    return {name: url + page for name, page in pages.items()} if url else {}


if __name__ == "__main__":
    # Here, so that what only reads this file needs no setuptools, which replaces Python's distutils.
    from setuptools import setup

    repository = os.environ.get("STA_REPOSITORY_URL", "").rstrip("/")
    setup(
        long_description=description(repository),
        long_description_content_type="text/markdown",
        project_urls=project_urls(repository),
    )
