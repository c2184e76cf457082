"""What is installed of what matters, or whether the newest that pip would take here is what is installed."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys

PACKAGES = ("transformers", "peft", "torch")


def installed() -> dict[str, str]:
    """Versions in this environment."""
    return {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES}


def newest() -> dict[str, str]:
    """Versions that pip takes today for this Python without a lock."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*command, *PACKAGES], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report)["install"]}
    return {name: found[name].split("+")[0] for name in PACKAGES}


def main() -> int:
    """Print what was asked for; 1 when the newest differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--newest-is-installed", action="store_true", help="exit with 0 if so, else with 1")
    here = installed()
    print("installed:", *(f"{name} {version}" for name, version in here.items()))
    if not parser.parse_args().newest_is_installed:
        return 0
    there = newest()
    print("newest:   ", *(f"{name} {version}" for name, version in there.items()))
    return int(here != there)


if __name__ == "__main__":
    sys.exit(main())
