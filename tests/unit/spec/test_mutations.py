"""The tests that hold documents and code together notice a changed number: a sample; ``make spec-mutations`` tries all."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def test_a_changed_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[3] / "scripts" / "spec_mutations.py"
    spec = importlib.util.spec_from_file_location("spec_mutations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "spec_mutations", module)  # dataclasses look themselves up
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
    spec.loader.exec_module(module)
    assert len(list(module.mutations())) > 500
    tried, left = module.survivors(every=29)
    assert tried > 20
    assert left == []
