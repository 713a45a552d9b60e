"""`manifest.json` as one frozen value."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from edgecompose.bundle.records import depth_exceeds, named, value_from_json
from edgecompose.bundle.specs import (
    MOST_TOKENS,
    AdapterSpec,
    BaseSpec,
    EmbedderSpec,
    FileEntry,
    IndexSpec,
    PromptForm,
    TaskSpec,
    check_floats,
    check_integers,
    check_words,
)
from edgecompose.errors import ManifestInvalid, UnsupportedSchema
from edgecompose.settings import MergeSettings, RetrievalSettings

SCHEMA_VERSION = 5
#: Older versions that `bundle.upgrade` converts.
UPGRADED = (4,)
MANIFEST_FILE = "manifest.json"
_LONGEST_PATH = 1000
_DEEPEST, _MOST_HOLDERS = 32, 500_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Defaults:
    """Settings for requests that name none; `prompt_form` is how a prompt is sent when adapters answer it."""

    retrieval: RetrievalSettings = RetrievalSettings()
    merge: MergeSettings = MergeSettings()
    prompt_form: PromptForm = "chat"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_integers("defaults", 1, MOST_TOKENS, max_tokens=self.max_tokens)


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
        check_words("the manifest", name=self.name, created_by=self.created_by)
        for name in (*self.tasks, *self.adapters):
            check_name(name)
        self._check_adapters()
        self._check_files()
        self._check_keys()
        self._check_index()

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
            *(kv.graph for kv in self.base.kv_graphs.values()),
            *(a.file for a in self.adapters.values()),
            *(path for path in optional if path is not None),
        ]

    def _check_adapters(self) -> None:
        for name, task in self.tasks.items():
            absent = next((adapter for adapter in task.adapters if adapter not in self.adapters), None)
            if absent is not None:
                raise ManifestInvalid(f"task '{name}' names adapter '{named(absent)}', which is not in the manifest")
        for name, spec in self.adapters.items():
            if spec.base != self.base.identity:
                raise ManifestInvalid(
                    f"adapter '{name}' is for base {spec.base:.12}…, the bundle's is {self.base.identity:.12}…; "
                    "export the bundle again"
                )
        for one, row in self.inner_products.items():
            for other, value in row.items():
                if one not in self.adapters or other not in self.adapters or one > other:
                    pair = f"'{named(one)}' and '{named(other)}'"
                    raise ManifestInvalid(f"an inner product is of {pair}; expected two adapters in order of names")
                check_floats("adapters", 0 if one == other else -sys.float_info.max, sys.float_info.max, product=value)

    def _check_files(self) -> None:
        for path in self.files:
            check_path(path)
        if MANIFEST_FILE in self.files:
            raise ManifestInvalid(f"the manifest names itself, {MANIFEST_FILE}, among the files")
        uses = Counter(self.named_files())
        missing = sorted(path for path in uses if path not in self.files)
        if missing:
            raise ManifestInvalid(f"manifest names files without a hash: {', '.join(map(named, missing))}")
        twice = sorted(path for path, count in uses.items() if count > 1)
        if twice:
            raise ManifestInvalid(f"one file has two meanings: {', '.join(twice)}; expected a file for each")

    def _check_keys(self) -> None:
        spans = sorted((t.first_key, t.first_key + t.examples, name) for name, t in self.tasks.items())
        for (_, end, one), (start, _, other) in zip(spans, spans[1:], strict=False):
            if start < end:
                raise ManifestInvalid(f"tasks '{one}' and '{other}' share example keys")
        total = sum(t.examples for t in self.tasks.values())
        if total != self.index.vectors:
            raise ManifestInvalid(f"tasks count {total} examples, the index {self.index.vectors}")

    def _check_index(self) -> None:
        """Vectors of another encoder, pooling or window would be compared without a word."""
        index, embedder = self.index, self.embedder
        if index.embedder != embedder.space:
            raise ManifestInvalid(
                f"the index was made by the embedder {index.embedder!r:.120}, the bundle's is {embedder.space!r:.120}; "
                "export the examples again"
            )
        if index.dimension > embedder.dimension or (index.whitening is None and index.dimension < embedder.dimension):
            raise ManifestInvalid(
                f"index is {index.dimension}-dimensional, the embedder {embedder.dimension}-dimensional"
            )


def check_name(name: str) -> str:
    """A task or adapter name, which is also a file name: letters, digits, '.', '_', '-', at most 100."""
    if not _NAME.fullmatch(name):
        raise ManifestInvalid(f"name {name!r:.120} is not allowed; use letters, digits, '.', '_' and '-', at most 100")
    return name


def check_path(path: str) -> str:
    """A path inside the bundle: relative, printable, in its shortest form, with forward slashes, without '..'."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ":" in path or ".." in parts or "\0" in path:
        raise ManifestInvalid(f"path {path!r:.200} leaves the bundle; expected a relative path inside of it")
    if len(path) > _LONGEST_PATH or not path.isprintable() or "/".join(parts) != path:
        raise ManifestInvalid(f"path {path!r:.200} is not plain; expected printable names with one slash between")
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
    if text.count("{") + text.count("[") > _MOST_HOLDERS:  # each takes many times its two bytes
        raise ManifestInvalid(f"manifest.json holds more than {_MOST_HOLDERS:,} objects and arrays; export it again")
    try:
        fields = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or an integer of thousands of digits
        raise ManifestInvalid(f"manifest.json is not JSON ({error!s:.200}); export the bundle again") from error
    if not isinstance(fields, dict):
        raise ManifestInvalid("manifest.json is not a JSON object; export the bundle again")
    if depth_exceeds(fields, _DEEPEST):
        raise ManifestInvalid(f"manifest.json is nested deeper than {_DEEPEST} levels; export the bundle again")
    if _SURROGATE.search(text) and not _is_unicode(json.dumps(fields, ensure_ascii=False)):
        raise ManifestInvalid(
            "manifest.json holds a half of a surrogate pair, which no text may; export the bundle again"
        )
    version = fields.get("schema_version")
    if version != SCHEMA_VERSION:
        upgrade = "convert it with: edgecompose bundle upgrade BUNDLE"
        remedy = upgrade if version in UPGRADED else "update edgecompose, or export the bundle again"
        raise UnsupportedSchema(f"the bundle has schema version {version!r:.40}, expected {SCHEMA_VERSION}; {remedy}")
    return value_from_json(Manifest, fields, "manifest")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a field that is there twice would mean one thing here and another elsewhere."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has twice the field '{named(name)}'")
    return fields
