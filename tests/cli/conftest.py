"""What the tests of all commands need."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def restored_warnings(monkeypatch):
    """The printer of warnings, which a command replaces, as it was before the test."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
