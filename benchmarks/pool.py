"""Makes what `models/` ships: trains and quantises an adapter for each task of the pool, and indexes their prompts.

    python benchmarks/pool.py DATA_DIR [--steps train adapters examples plain table] [--work build/lora]

DATA_DIR holds `<task>.train.jsonl`. Each step goes on where it was stopped. The index holds the first `INDEXED`
training prompts of each task twice: as the dataset words them, and in one of the wordings of `rewordings.AUGMENT`,
drawn at random, so that a prompt is known by more than its dataset's template. `plain` makes `build/plain`, a bundle of
the same adapters that retrieves as arXiv 2602.21222 does: the cosine of whole prompts, every training prompt once.
`table` writes the rows of `models/SOURCES.md` once `models/validation.json` is there; what an adapter was trained on
stays as it stands where its training was not done here. Training takes two hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rewordings import AUGMENT, reword
from edgecompose.adapters import convert_adapter
from edgecompose.retrieval.examples import Example, read_examples
from edgecompose_export.base.source import open_base
from edgecompose_export.base.spec import read_base_spec
from edgecompose_export.bundles import build_bundle
from edgecompose_export.embedder import export_embedder, open_embedder
from edgecompose_export.examples import write_examples
from edgecompose_export.training.batches import TrainSettings
from edgecompose_export.training.train import REPORT_FILE, train_adapter
from edgecompose_export.validation_gate import read_validation

STEPS = ("train", "adapters", "examples", "plain", "table")
#: Training prompts of a task that the index holds, in each of two wordings.
INDEXED = 300


@dataclass(frozen=True, slots=True)
class Plan:
    """What a task is trained on: its first `examples`, `epochs` times, `batch` a step, at a peak learning rate."""

    examples: int
    epochs: int
    batch: int
    rate: float = 1e-3

    def settings(self) -> TrainSettings:
        """Rank 8 and alpha 16 for all; on the prompt as it is, which is how it will be sent."""
        return TrainSettings(epochs=self.epochs, batch=self.batch, learning_rate=self.rate, prompt_form="raw")


#: Long prompts get fewer examples and smaller batches: a step reads some 700 tokens, and a task trains in minutes.
POOL: dict[str, Plan] = {
    "imdb": Plan(300, 1, 4),
    "yelp": Plan(300, 1, 4),
    "mnli_matched": Plan(600, 2, 8),
    "squad": Plan(300, 1, 4),
    "openbookqa": Plan(600, 2, 8),
    "boolq": Plan(400, 1, 4),
    "commonsense_qa": Plan(573, 2, 8),
    "rte": Plan(450, 2, 8),
    "copa": Plan(399, 2, 8),
    "arc_easy": Plan(600, 1, 4),
    "qnli": Plan(600, 1, 4),
    "cb": Plan(148, 3, 8),
    "mrpc": Plan(600, 1, 4),
    "wic": Plan(600, 2, 8),
    "story_cloze": Plan(450, 1, 4),
    "wnli": Plan(338, 2, 8),
    "anli_r3": Plan(400, 1, 4),
    "piqa": Plan(450, 1, 4),
    "cosmos_qa": Plan(300, 1, 4),
    "multirc": Plan(200, 1, 4),
    "hellaswag": Plan(200, 1, 4),
    "snli": Plan(600, 2, 8),
}


def main() -> None:
    """Parse, do the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=STEPS)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--work", type=Path, default=Path("build/lora"))
    parser.add_argument("--build", type=Path, default=Path("build"), help="where the exported base and embedder are")
    options = parser.parse_args()
    if "train" in options.steps:
        train(options.data, options.work, options.build / "models" / "smollm2-135m-instruct")
    if "adapters" in options.steps:
        quantise(options.work, options.models / "adapters", options.build / "base")
    if "examples" in options.steps:
        index(options.data, options.models / "examples", options.build / "embedder")
    if "plain" in options.steps:
        build_plain(options.data, options.models, options.build)
    if "table" in options.steps:
        write_table(options.models, options.work)


def train(data: Path, work: Path, source: Path) -> None:
    """A PEFT folder for each task."""
    base = open_base(source)
    for task, plan in POOL.items():
        if (work / task / REPORT_FILE).is_file():
            continue
        start = time.monotonic()
        examples = read_examples(data / f"{task}.train.jsonl", limit=plan.examples)
        report = train_adapter(base, examples, work / task, plan.settings())
        say(f"{task}: {report['steps']} steps, loss {report['final_loss']:.3f}, {time.monotonic() - start:.0f} s")


def quantise(work: Path, output: Path, base: Path) -> None:
    """The 4-bit file of each adapter."""
    spec = read_base_spec(base)
    for task in POOL:
        target = output / f"{task}.safetensors"
        if (work / task / REPORT_FILE).is_file() and not target.exists():
            made = convert_adapter(work / task, spec, target, 4)
            say(f"{target}: {target.stat().st_size / 1e6:.1f} MB, error {made.spec.error:.3f}")


def index(data: Path, output: Path, folder: Path) -> None:
    """The index of the prompts of all tasks."""
    embedder, spec = open_embedder(folder)
    named = {task: prompts(task, read_examples(data / f"{task}.train.jsonl", limit=INDEXED)) for task in POOL}
    table = write_examples(named, embedder, spec, output)
    say(f"{output}: {table.index.vectors} vectors of {table.index.dimension} dimensions")


def prompts(task: str, examples: list[Example]) -> list[Example]:
    """Examples of a task, and each of them once more in other words."""
    rng = random.Random(task)
    return [*examples, *(Example(reword(task, e.prompt, rng.choice(AUGMENT)), e.answer) for e in examples)]


def build_plain(data: Path, models: Path, build: Path) -> None:
    """A bundle whose index is that of the paper, of the adapters that are shipped."""
    folder, output = build / "plain-embedder", build / "plain-examples"
    export_embedder(build / "models" / "all-MiniLM-L6-v2", folder, ends=0)
    embedder, spec = open_embedder(folder)
    named = {task: read_examples(data / f"{task}.train.jsonl") for task in POOL}
    table = write_examples(named, embedder, spec, output, whiten=False)
    adapters = (models / "adapters").resolve()
    tasks = [f"{task} = {{ adapter = {json.dumps(str(adapters / f'{task}.safetensors'))} }}" for task in POOL]
    recipe = build / "plain.toml"
    head = ['name = "plain"', 'base = "base"', f'embedder = "{folder.name}"', f'examples = "{output.name}"']
    recipe.write_text("\n".join([*head, "[defaults]", 'prompt_form = "raw"', "[tasks]", *tasks]) + "\n", "utf-8")
    build_bundle(recipe, build / "plain", force=True)
    say(f"{build / 'plain'}: {table.index.vectors} vectors of {table.index.dimension} dimensions")


def write_table(models: Path, work: Path) -> None:
    """Put what each adapter was trained on and what it is worth into the table of `SOURCES.md`."""
    page, validation = models / "SOURCES.md", models / "validation.json"
    lines = page.read_text(encoding="utf-8").splitlines()
    known = {cells[1].strip(" `"): cells[2:9] for cells in (line.split("|") for line in lines) if len(cells) > 9}
    other_lines = [line for line in lines if not line.startswith("| `")]
    at = next(number for number, line in enumerate(other_lines) if line.startswith("| adapter")) + 2
    rows = []
    for task, gain in sorted(read_validation(validation).items()):
        low, high = (f"{100 * bound:+.1f}" for bound in gain.ci95)
        worth = f"{100 * (gain.accuracy - gain.base):+.1f} ({low} to {high}, n = {gain.examples})"
        trained = _training(known[task], work / task / REPORT_FILE)
        rows.append(
            f"| `{task}` |{trained}| {100 * gain.base:.1f} | {100 * gain.accuracy:.1f} | {worth} | {gain.verdict} |"
        )
    page.write_text("\n".join([*other_lines[:at], *rows, *other_lines[at:]]) + "\n", encoding="utf-8")


def _training(cells: Sequence[str], report: Path) -> str:
    """The cells of a row that tell its family and its training, anew where its training was done here."""
    if not report.is_file():
        return "|".join(cells)
    training = json.loads(report.read_text(encoding="utf-8"))
    values = (f"{training[name]}" for name in ("examples", "epochs", "batch", "learning_rate", "steps"))
    return f"{cells[0]}| {' | '.join(values)} | {training['final_loss']:.3f} "


def say(line: str) -> None:
    """One line of talk."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
