"""The larger set of pictures, from Debian's packages: `python debian.py FOLDER` on Debian or Ubuntu, without being root.

8,121 objects of Open Clip Art (public domain), 30 wallpapers of Plasma, of which half are drawn, 12 of MATE's photographs of
nature, and scikit-image's. What the licences ask is in each package's `usr/share/doc/*/copyright`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

from clips import list_photographs

PACKAGES = ("openclipart-png", "mate-backgrounds", "plasma-workspace-wallpapers")


def unpack(folder: Path) -> Path:
    """Download the packages and unpack them, without installing anything; the root of their files."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
        package.unlink()
    return folder / "unpacked" / "usr" / "share"


def collect(share: Path, target: Path) -> Path:
    """Copy each photograph once to `target`: of a wallpaper that comes in many sizes the largest that is wider than high."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted((share / "backgrounds" / "mate" / "nature").glob("*.jpg")):
        shutil.copy(path, target)
    for wallpaper in sorted((share / "wallpapers").iterdir()):
        found = {}
        for path in wallpaper.glob("contents/images/*"):
            size = re.match(r"(\d+)x(\d+)\.(png|jpg)$", path.name)
            if size and int(size[1]) > int(size[2]) and not path.is_symlink():
                found[path.stat().st_size] = path
        if found:
            largest = found[max(found)]
            shutil.copy(largest, target / f"{wallpaper.name}{largest.suffix}")
    for paths in list_photographs(None).values():
        for path in paths:
            shutil.copy(path, target)
    return target


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    share = unpack(folder)
    photographs = collect(share, folder / "photographs")
    objects = share / "openclipart" / "png"
    print(f"python train.py --work {folder / 'work'} prepare --objects {objects} --photographs {photographs}")


if __name__ == "__main__":
    main()
