"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("VINOOPT_SHARED", ROOT.parent / "shared"))

REQUIRE_OFFLINE = "VINOOPT_REQUIRE_OFFLINE"
NO_PACKAGE_HELPS = (
    "CPU_ISA_NOT_ON_HOST",
    "the first known to serve it",  # this distribution's driver is older
    "no development models",
    "this system lists no CPU flags",
    "knows adlp",
)
"""Words of skips that hang on the machine or the checkout, not on packages."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Where offline toolchains are required, a test that skips for want of one fails."""
    report = yield
    is_required = os.environ.get(REQUIRE_OFFLINE, "0") not in ("", "0")
    if (
        is_required
        and report.skipped
        and not hasattr(report, "wasxfail")
        and item.get_closest_marker("offline")
    ):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not any(words in reason for words in NO_PACKAGE_HELPS):
            report.outcome = "failed"
            report.longrepr = f"{REQUIRE_OFFLINE} is set, and this test was skipped. {reason}"
    return report


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and data for development; the test skips where it is absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"no development models beside the checkout ({SHARED.name}/models); set VINOOPT_SHARED")
    return SHARED
