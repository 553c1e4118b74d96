"""`module:attribute` of the user, imported only where the caller has said so."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vinoopt.errors import InputError

_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_code(source: str) -> bool:
    """Whether the text has the form `module:attribute`."""
    return _CODE.fullmatch(source) is not None


def import_attribute(source: str, *, allow_code: bool, error: type[InputError]) -> Any:
    """The object at `module:attribute`; the working folder is searched too.

    Raises `error` where `allow_code` is not given, or where there is no such object.
    """
    if not allow_code:
        raise error(
            f"{source}: no such file or name; as module:attribute it would run code: give --allow-code"
        )
    module, _, attribute = source.partition(":")
    try:
        with _working_folder_on_path():
            found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as exc:
        raise error(f"{source}: cannot be imported: {exc}") from exc
    return found


@contextmanager
def _working_folder_on_path() -> Iterator[None]:
    """`python -m` finds modules in the working folder, a console script does not; here both do."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
