"""Opens a `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from edgecompose.errors import BundleError


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file, which neither cuts nor pads.

    Raises:
        BundleError: the file cannot be read.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception on any malformed file
        raise BundleError(f"tokenizer '{path}' cannot be read: {error}; export the bundle again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
