"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("VINOOPT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and data for development; the test skips where it is absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"no development models beside the checkout ({SHARED.name}/models); set VINOOPT_SHARED")
    return SHARED
