"""A private directory for slabs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def where(tmp_path: Path) -> Path:
    path = tmp_path / "nvme"
    path.mkdir(mode=0o700)
    return path
