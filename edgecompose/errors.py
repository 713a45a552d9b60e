"""Every error that EdgeCompose raises on purpose.

    EdgeComposeError                    exit code 1
    ├── BundleError                     a bundle directory cannot be used
    │   ├── ManifestInvalid             manifest.json is absent, not JSON, or breaks its contract
    │   ├── UnsupportedSchema           written by another major version of the format
    │   └── FileDamaged                 a file is missing, of the wrong size or hash, or outside the bundle
    ├── AdapterError                    an adapter cannot be used
    │   ├── UnknownAdapter              no adapter of that name in the bundle
    │   ├── UnsupportedAdapter          DoRA, bias, modules_to_save and other things never dropped in silence
    │   └── SlotMismatch                made for another base
    ├── RetrievalError                  the query or the index cannot be searched
    ├── MergeError                      unknown method, bad parameter, adapters that cannot be merged so
    ├── CheckpointError                 a float base that a blend cannot be written into
    ├── DeviceError                     the requested device is not available
    ├── GenerationError                 the prompt or the settings cannot be generated from
    │   └── PromptTooLong               prompt and answer exceed the context of the base
    ├── Cancelled                       the caller ended the work
    ├── InUse                           another process is writing the same file or folder
    ├── ApiError                        a call to the server is malformed or not supported
    ├── EvaluationError                 examples, cached answers or a report of an evaluation cannot be used
    └── ExportError                     input that cannot be exported, or added to a bundle

A message says what failed, what was found, what was expected and what to do.
"""

from __future__ import annotations


class EdgeComposeError(Exception):
    """Base of all errors raised on purpose; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class BundleError(EdgeComposeError):
    """A bundle directory cannot be used."""


class ManifestInvalid(BundleError):
    """manifest.json is absent, is not JSON, or breaks its contract."""


class UnsupportedSchema(BundleError):
    """The bundle was written by another major version of the format."""


class FileDamaged(BundleError):
    """A file of the bundle is missing, of the wrong size or hash, or lies outside of it."""


class AdapterError(EdgeComposeError):
    """An adapter cannot be used."""


class UnknownAdapter(AdapterError):
    """The bundle holds no adapter (or task) of that name."""


class UnsupportedAdapter(AdapterError):
    """The adapter uses something that would have to be dropped in silence, so it is refused."""


class SlotMismatch(AdapterError):
    """The adapter was made for another base model."""


class RetrievalError(EdgeComposeError):
    """The query or the index cannot be searched."""


class MergeError(EdgeComposeError):
    """Unknown merge method, a bad parameter, or adapters that cannot be merged this way."""


class CheckpointError(EdgeComposeError):
    """A folder of float weights cannot be used, or is of another base than the bundle's."""


class DeviceError(EdgeComposeError):
    """The requested device is not available."""


class GenerationError(EdgeComposeError):
    """The prompt or the settings cannot be generated from."""


class PromptTooLong(GenerationError):
    """Prompt and answer together exceed the context of the base model."""


class Cancelled(EdgeComposeError):
    """The caller ended the work before it was done."""


class InUse(EdgeComposeError):
    """Another process is writing the same file or folder; the message names it."""


class ApiError(EdgeComposeError):
    """A call to the server is malformed, or asks for what is not supported.

    `param` is the field at fault, `code` a word for programs, `status` the HTTP status.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class EvaluationError(EdgeComposeError):
    """Examples, cached answers or a report of an evaluation cannot be used."""


class ExportError(EdgeComposeError):
    """Input that cannot be exported, or added to a bundle."""
