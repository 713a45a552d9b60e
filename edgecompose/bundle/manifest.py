"""`manifest.json` as one frozen value."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from edgecompose.bundle.records import value_from_json
from edgecompose.bundle.specs import AdapterSpec, BaseSpec, EmbedderSpec, FileEntry, IndexSpec, PromptForm, TaskSpec
from edgecompose.errors import ManifestInvalid, UnsupportedSchema
from edgecompose.settings import MergeSettings, RetrievalSettings

SCHEMA_VERSION = 5
#: Older versions that `bundle.upgrade` converts.
UPGRADED = (4,)
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Defaults:
    """Settings for requests that name none; `prompt_form` is how a prompt is sent when adapters answer it."""

    retrieval: RetrievalSettings = RetrievalSettings()
    merge: MergeSettings = MergeSettings()
    prompt_form: PromptForm = "chat"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ManifestInvalid(f"max_tokens is {self.max_tokens}; expected 1 or more")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`.

    `inner_products[a][b]`, a <= b, is the inner product of two adapters' updates over all modules and layers; what is
    missing is computed when it is needed.
    """

    name: str
    base: BaseSpec
    embedder: EmbedderSpec
    index: IndexSpec
    tasks: dict[str, TaskSpec]
    adapters: dict[str, AdapterSpec]
    defaults: Defaults
    files: dict[str, FileEntry]
    inner_products: dict[str, dict[str, float]] = field(default_factory=dict)
    created_by: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in (*self.tasks, *self.adapters):
            check_name(name)
        for name, task in self.tasks.items():
            for adapter in sorted(set(task.adapters) - set(self.adapters)):
                raise ManifestInvalid(f"task '{name}' names adapter '{adapter}', which is not in the manifest")
        for path in self.files:
            check_path(path)
        missing = sorted(set(self.named_files()) - set(self.files))
        if missing:
            raise ManifestInvalid(f"manifest names files without a hash: {', '.join(missing)}")
        if not all(math.isfinite(value) for row in self.inner_products.values() for value in row.values()):
            raise ManifestInvalid("an inner product of adapters is not finite; export the bundle again")
        self._check_keys()

    def named_files(self) -> list[str]:
        """Every file that some part of the manifest refers to."""
        optional = [self.base.chat_template, self.base.cuda_graph, self.index.texts, self.index.whitening]
        fusing = self.base.fusing
        if fusing is not None:
            optional += [fusing.fuse_graph, fusing.decoder_graph, fusing.cuda_decoder_graph]
        return [
            self.base.graph,
            self.base.tokenizer,
            self.embedder.graph,
            self.embedder.tokenizer,
            self.index.file,
            *(a.file for a in self.adapters.values()),
            *(path for path in optional if path is not None),
        ]

    def _check_keys(self) -> None:
        spans = sorted((t.first_key, t.first_key + t.examples, name) for name, t in self.tasks.items())
        for (_, end, one), (start, _, other) in zip(spans, spans[1:], strict=False):
            if start < end:
                raise ManifestInvalid(f"tasks '{one}' and '{other}' share example keys")
        total = sum(t.examples for t in self.tasks.values())
        if total != self.index.vectors:
            raise ManifestInvalid(f"tasks count {total} examples, the index {self.index.vectors}")
        if self.index.whitening is None and self.index.dimension != self.embedder.dimension:
            raise ManifestInvalid(
                f"index is {self.index.dimension}-dimensional, the embedder {self.embedder.dimension}-dimensional"
            )


def check_name(name: str) -> str:
    """A task or adapter name, which is also a file name: letters, digits, '.', '_', '-', at most 100."""
    if not _NAME.fullmatch(name):
        raise ManifestInvalid(f"name {name!r} is not allowed; use letters, digits, '.', '_' and '-', at most 100")
    return name


def check_path(path: str) -> str:
    """A path inside the bundle: relative, with forward slashes, without '..'."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ":" in path or ".." in parts or "\0" in path:
        raise ManifestInvalid(f"path {path!r} leaves the bundle; expected a relative path inside of it")
    return path


def manifest_to_json(manifest: Manifest) -> str:
    """The manifest as the text of `manifest.json`: sorted keys, one field a line, final newline."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def manifest_from_json(text: str) -> Manifest:
    """The manifest that `text` describes.

    Raises:
        UnsupportedSchema: written by another major version.
        ManifestInvalid: not JSON, or a field missing, unknown, of the wrong type or out of range.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or an integer of thousands of digits
        raise ManifestInvalid(f"manifest.json is not JSON ({error}); export the bundle again") from error
    if not isinstance(fields, dict):
        raise ManifestInvalid("manifest.json is not a JSON object; export the bundle again")
    version = fields.get("schema_version")
    if version != SCHEMA_VERSION:
        upgrade = "convert it with: edgecompose bundle upgrade BUNDLE"
        remedy = upgrade if version in UPGRADED else "update edgecompose, or export the bundle again"
        raise UnsupportedSchema(f"the bundle has schema version {version!r:.40}, expected {SCHEMA_VERSION}; {remedy}")
    return value_from_json(Manifest, fields, "manifest")
