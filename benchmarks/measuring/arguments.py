"""The command line of a benchmark."""

from __future__ import annotations

import argparse


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, laid out as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
