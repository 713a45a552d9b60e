"""The `edgecompose-export` command: parses, calls, prints. Results go to stdout, progress to stderr.

Commands import what they need when they run, so that help and usage errors are quick.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

from edgecompose_export.cli.app import main

__all__ = ["main"]
