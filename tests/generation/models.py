"""Prompts of the tiny bundle."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")


PROMPTS = ["the cat sat on a mat", "two and two is four", "grass grows green", "a dog barks at night and sleeps by day"]
