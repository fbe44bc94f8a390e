"""docs/compatibility.md is what the code decides."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "docs" / "generate_compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "compatibility.md").read_text() == module.page(), "run docs/generate_compatibility.py"
