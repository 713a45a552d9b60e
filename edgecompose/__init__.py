"""EdgeCompose: answers a prompt with a base model and a blend of LoRA adapters chosen by retrieval, offline."""

import importlib

TYPE_CHECKING = False  # type checkers take it for true; the module `typing` takes 5 ms to import

if TYPE_CHECKING:
    from edgecompose.aio import AsyncComposer, AsyncGeneration
    from edgecompose.chat import Chat
    from edgecompose.composer import Composer, open_bundle
    from edgecompose.errors import EdgeComposeError
    from edgecompose.generation.messages import Message
    from edgecompose.request import Answer, Composition, Request
    from edgecompose.retrieval.retriever import Retrieval
    from edgecompose.settings import MergeSettings, RetrievalSettings, Sampling
    from edgecompose.streaming import Generation

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

#: Public name -> the module that has it. They are imported when first used: ONNX Runtime alone takes 0.2 s.
_MODULES = {
    "Answer": "request",
    "AsyncComposer": "aio",
    "AsyncGeneration": "aio",
    "Chat": "chat",
    "Composer": "composer",
    "Composition": "request",
    "EdgeComposeError": "errors",
    "Generation": "streaming",
    "MergeSettings": "settings",
    "Message": "generation.messages",
    "Request": "request",
    "Retrieval": "retrieval.retriever",
    "RetrievalSettings": "settings",
    "Sampling": "settings",
    "open_bundle": "composer",
}


if not TYPE_CHECKING:  # type checkers see the imports above

    def __getattr__(name: str) -> object:
        """A public name, imported now."""
        if name not in _MODULES:
            raise AttributeError(f"module 'edgecompose' has no attribute '{name}'")
        value = getattr(importlib.import_module(f"edgecompose.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
