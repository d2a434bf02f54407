"""The pictures of the documents show what the code shows: they are as old as their sources."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "site" / "screenshots.py"
spec = importlib.util.spec_from_file_location("screenshots", SCRIPT)
assert spec is not None and spec.loader is not None  # noqa: PT018
screenshots = importlib.util.module_from_spec(spec)
spec.loader.exec_module(screenshots)


@pytest.mark.parametrize("picture", screenshots.SOURCES)
def test_a_picture_is_of_the_present_sources(picture: str) -> None:
    taken = json.loads(screenshots.HASHES.read_text())

    assert taken[picture] == screenshots.digest(screenshots.SOURCES[picture]), (
        f"{picture} shows an older page: `make screenshots` (it needs Chromium) takes it anew"
    )


def test_the_pictures_are_small() -> None:
    assert sum(p.stat().st_size for p in screenshots.PICTURES.iterdir()) < 500_000
