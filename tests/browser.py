"""A headless Chromium for tests of pages: found on the machine, never downloaded."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-device-scale-factor=1"),
)


def find_chromium() -> tuple[str, str]:
    """Paths of Chromium and its driver.

    The test is skipped where one of them, or selenium, is missing; with STA_BROWSER_REQUIRED set, as in CI, it fails.
    """
    pytest.importorskip("selenium", reason="selenium is not installed: pip install 'sta-adapter[dev]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = os.environ.get("STA_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    driver = os.environ.get("STA_CHROMEDRIVER") or shutil.which("chromedriver")
    if not browser or not driver:
        missing = pytest.fail if os.environ.get("STA_BROWSER_REQUIRED") else pytest.skip
        missing(
            "no Chromium with its driver: apt-get install chromium chromium-driver, or name them with STA_CHROMIUM and "
            "STA_CHROMEDRIVER"
        )
    return browser, driver


@contextlib.contextmanager
def chromium(profile: Path, *, dark: bool = False, width: int = 1100, height: int = 900) -> Iterator[Any]:
    """A selenium driver; `dark` is what pages learn through prefers-color-scheme.

    Args:
        profile: a new folder for the browser's own files.
    """
    browser, binary = find_chromium()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(binary))
    try:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.set_page_load_timeout(60)
        yield driver
    finally:
        driver.quit()


def requested(driver: Any) -> list[str]:
    """Addresses that the pages asked for since the last call."""
    import json

    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def screenshot(driver: Any, path: Path) -> Path:
    """The whole page, also what lies below the window."""
    import base64

    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))
    return path
