"""fastpref doctor: every line is there, missing things say why, and it never fails."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from fastpref import doctor
from fastpref.cli import app

NAMES = ("torch", "GPU", "triton", "xformers", "flash-attn", "bitsandbytes", "deepspeed", "memory", "disk")


def test_all_lines_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("xformers", "flash_attn"):
        monkeypatch.setitem(sys.modules, package, None)
    answer = CliRunner().invoke(app, ["doctor"])
    assert answer.exit_code == 0
    assert all(name in answer.output for name in NAMES) and "not installed" in answer.output


def test_a_broken_package_says_why() -> None:
    def broken(_: str) -> Any:
        raise RuntimeError("libfoo.so.1: cannot open\nshared object file")

    found = doctor._package("numpy", "arrays", broken)
    assert not found.usable and "libfoo.so.1: cannot open shared object file" in found.note
    assert doctor._package("no-such-package", "nothing").note == "not installed (nothing)"
