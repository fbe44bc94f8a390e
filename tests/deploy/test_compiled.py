"""The compiled build is a step of its own in .ci/run; here, only what it says where it cannot be made."""

from __future__ import annotations

import pytest

from deploy import compiled


def test_without_a_compiler_it_says_so_and_fails_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiled.main([]) == 0
    assert "SKIPPED, there is no C compiler (no-such-compiler)" in capsys.readouterr().out


def test_a_compiler_that_is_there_is_found_whatever_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "sh -c")
    assert compiled.compiler() == ("sh", True)
