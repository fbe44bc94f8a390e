"""What is generated is what is stored."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_is_current(generate: ModuleType) -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == generate.reference(), "run docs/generate.py"


def test_the_example_is_current(generate: ModuleType) -> None:
    assert (ROOT / "config" / "example.yaml").read_text() == generate.example(), "run docs/generate.py"


def test_every_key_has_its_meaning(generate: ModuleType) -> None:
    for line in generate.reference().splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), f"no description: {line}"
