"""EdgeCompose: answers a prompt with a base model and a blend of LoRA adapters chosen by retrieval, offline."""

from typing import TYPE_CHECKING

from edgecompose.chat import Chat
from edgecompose.composer import Composer, open_bundle
from edgecompose.errors import EdgeComposeError
from edgecompose.generation.messages import Message
from edgecompose.request import Answer, Composition, Request
from edgecompose.retrieval.retriever import Retrieval
from edgecompose.settings import MergeSettings, RetrievalSettings, Sampling
from edgecompose.streaming import Generation

if TYPE_CHECKING:  # asyncio takes a tenth of the time that importing this package takes
    from edgecompose.aio import AsyncComposer, AsyncGeneration
else:

    def __getattr__(name: str) -> object:
        """What is imported when it is asked for."""
        if name in ("AsyncComposer", "AsyncGeneration"):
            from edgecompose import aio

            return getattr(aio, name)
        raise AttributeError(f"module 'edgecompose' has no attribute '{name}'")


__all__ = [
    "Answer",
    "AsyncComposer",
    "AsyncGeneration",
    "Chat",
    "Composer",
    "Composition",
    "EdgeComposeError",
    "Generation",
    "MergeSettings",
    "Message",
    "Request",
    "Retrieval",
    "RetrievalSettings",
    "Sampling",
    "open_bundle",
]
__version__ = "0.1.0"
