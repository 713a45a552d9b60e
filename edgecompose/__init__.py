"""EdgeCompose: answers a prompt with a base model and a blend of LoRA adapters chosen by retrieval, offline."""

from edgecompose.composer import Composer, open_bundle
from edgecompose.errors import EdgeComposeError
from edgecompose.generation import Sampling
from edgecompose.methods import MergeSettings
from edgecompose.request import Answer, Composition, Request, Retrieval

__all__ = [
    "Answer",
    "Composer",
    "Composition",
    "EdgeComposeError",
    "MergeSettings",
    "Request",
    "Retrieval",
    "Sampling",
    "open_bundle",
]
__version__ = "0.1.0"
