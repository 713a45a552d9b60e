"""A bundle of a real base with random adapters, for benchmarks of bases that nobody trained adapters for.

    edgecompose-export fetch qwen2.5-coder-0.5b-instruct -o build/models
    python benchmarks/bundles.py qwen2.5-coder-0.5b-instruct --rank 16
    python benchmarks/bundles.py qwen2.5-coder-1.5b-instruct --rank 16 [--precision auto]
    python benchmarks/bundles.py smollm2-135m-instruct --rank 16

A base is a GGUF file, a Hugging Face folder, or the name of a folder below build/models. The bundle goes to
build/bundles/NAME-PRECISION-RANK, which is replaced. It has one adapter, of all linear modules, for each of eight
tasks. Their values are small, so that answers stay texts. A task has two examples, and is mapped to three adapters. The
sentence encoder is that of build/embedder (`make bundle`). A base in build/bases is used again, unless `--again`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

from benchmarks.export.bases import find_source, measure_export
from benchmarks.export.random_bundle import write_bundle
from benchmarks.measuring.arguments import command_parser

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Parse, export the base if need be, build."""
    parser = command_parser(__doc__)
    parser.add_argument("base", help="GGUF file, Hugging Face folder, or name")
    parser.add_argument("--precision", default="source", help="one of edgecompose-export base")
    parser.add_argument("--rank", type=int, default=16, help="of each adapter")
    parser.add_argument("--embedder", type=Path, default=ROOT / "build" / "embedder")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bases", help="folder for exported bases")
    parser.add_argument("--bundles", type=Path, default=ROOT / "build" / "bundles", help="folder for bundles")
    parser.add_argument("--again", action="store_true", help="export the base although there is one")
    options = parser.parse_args()
    source = find_source(options.base)
    base = options.work / f"{source.name}-{options.precision}"
    if options.again or not (base / "base.json").is_file():
        exported = measure_export(source, options.precision, base)
        print(f"{base}: {exported['seconds']:.0f} s, {exported['mb']:.0f} MB, KL {exported['kl']}", file=sys.stderr)
    target = options.bundles / f"{source.name}-{options.precision}-{options.rank}"
    print(write_bundle(base, options.embedder, target, rank=options.rank))


if __name__ == "__main__":
    main()
