"""The main job from one command: a stream of edits into the shipped model, and what became of the model.

`run` does the work and returns plain numbers; `table` words them; `plot` draws them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rlsedit_fast.editing import ContextConfig, EditConfig, Editor, EditRecord, PriorConfig, ValueSearchConfig
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.ages import age_groups
from rlsedit_fast.evaluation.cases import Case, Question, world_cases
from rlsedit_fast.evaluation.metrics import Before, Report, efficacy_strict, evaluate, score_before
from rlsedit_fast.models.generation import greedy
from rlsedit_fast.world import RELATIONS, World, load_demo_model
from rlsedit_fast.world.facts import shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = EditConfig(
    layers=(0,),
    contexts=ContextConfig(prefixes=("",)),
    search=ValueSearchConfig(
        kl_prompts=tuple(relation.phrasings[0] for relation in RELATIONS), steps=40, stop_nll=0.025, ahead=100
    ),
    prior=PriorConfig(adherence=0.975),
)
"""The demo's settings. The KL term looks at one phrasing of each relation; other facts are then asked in others.

The adherence is above the default since a thousand edits crowd 1,536 features: each later one takes a little back."""

_ANCHOR_SENTENCES = 4000


@dataclass(frozen=True)
class Age:
    """Edits of like age: a group of consecutive edits, and how many of them were answered right.

    Attributes:
        first: number of the group's first edit, from 1.
        last: number of its last.
        when_made: strict efficacy just after the group's last batch.
        at_end: strict efficacy after the whole stream.
    """

    first: int
    last: int
    when_made: float
    at_end: float

    @property
    def retained(self) -> float | None:
        """`at_end / when_made`; None where nothing took when made."""
        return self.at_end / self.when_made if self.when_made else None


@dataclass(frozen=True)
class Answer:
    """What the model says to a prompt before, after, and when plain transformers has loaded its checkpoint."""

    kind: str
    prompt: str
    before: str
    after: str
    reloaded: str


@dataclass(frozen=True)
class Stream:
    """One stream of edits into a fresh copy of the demo model, and what it measured."""

    editor: Editor
    records: list[EditRecord]
    ages: list[Age]
    report: Report
    seconds: float


def run(*, edits: int, batch_size: int, seed: int, out: Path) -> dict[str, Any]:
    """Edits the shipped model, measures, saves it, loads it again; and edits once more without the KL term.

    Args:
        edits: how many facts are changed, of as many people.
        batch_size: edits written at once.
        seed: of the choice of people, facts and anchor sentences.
        out: folder for the edited checkpoint.

    Returns:
        Plain numbers and texts, ready for JSON.

    Raises:
        InputError: more edits than people, or a batch size below 1.
    """
    config = CONFIG.replace(batch_size=batch_size)
    world = World.generate()
    cases = world_cases(world, edits, seed)
    model, tokenizer = load_demo_model()
    before = score_before(model, tokenizer, cases)
    questions = _samples(cases)
    answers_before = _say(model, tokenizer, [question.prompt for _, question in questions])
    anchors = anchor_texts(world, seed)

    stream = _stream(model, tokenizer, cases, before, config, anchors, "editing")
    answers_after = _say(model, tokenizer, [question.prompt for _, question in questions])
    stream.editor.save_pretrained(out / "model")
    answers_reloaded = _say(*_reload(out / "model"), [question.prompt for _, question in questions])

    bare_model, _ = load_demo_model()
    bare = _stream(
        bare_model,
        tokenizer,
        cases,
        before,
        config.replace(search={"kl_prompts": ()}),
        anchors,
        "again without KL",
    )

    answers = [
        Answer(kind, question.prompt, *said)
        for (kind, question), *said in zip(questions, answers_before, answers_after, answers_reloaded, strict=True)
    ]
    return _results(stream, bare, answers, edits=edits, batch_size=batch_size, seed=seed, config=config)


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    before: Before,
    config: EditConfig,
    anchors: Sequence[str],
    title: str,
) -> Stream:
    editor = Editor(model, tokenizer, config=config)
    editor.anchor(anchors)
    groups = age_groups(len(cases), config.batch_size)
    when_made: list[float] = []
    records: list[EditRecord] = []
    seconds = 0.0
    with tqdm(total=len(cases), desc=title, unit="edit") as bar:
        for start, stop in groups:
            began = time.perf_counter()
            records += editor.edit([case.edit for case in cases[start:stop]], on_batch=lambda made: _advance(bar, made))
            seconds += time.perf_counter() - began
            when_made.append(efficacy_strict(model, tokenizer, cases[start:stop]))
    ages = [
        Age(start + 1, stop, made, efficacy_strict(model, tokenizer, cases[start:stop]))
        for (start, stop), made in zip(groups, when_made, strict=True)
    ]
    return Stream(editor, records, ages, evaluate(model, tokenizer, cases, before), seconds)


def _advance(bar: tqdm[None], made: Sequence[EditRecord]) -> None:
    bar.update(len(made))


def anchor_texts(world: World, seed: int) -> list[str]:
    """Sentences about anyone, edited or not: who edits cannot know who will be edited."""
    sentences = shuffled(list(world.sentences()), random.Random(seed))[:_ANCHOR_SENTENCES]
    return [f"{prompt.format(name)} {answer} ." for prompt, name, answer in sentences]


def _samples(cases: Sequence[Case]) -> list[tuple[str, Question]]:
    """A few prompts to show: the first case that has all kinds, one prompt of each."""
    case = next((c for c in cases if c.neighbors), cases[0])
    kinds = [
        ("edited", (case.asked,)),
        ("paraphrase", case.paraphrases),
        ("other fact", case.same_subject),
        ("neighbour", case.neighbors),
    ]
    return [(kind, questions[0]) for kind, questions in kinds if questions]


def _say(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy continuations up to the full stop."""
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    said = greedy(model, rows, [4] * len(rows), ends=[tokenizer.get_vocab()["."]])
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in said]


def _reload(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What anybody with transformers alone would do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


def _results(
    stream: Stream,
    bare: Stream,
    answers: Sequence[Answer],
    *,
    edits: int,
    batch_size: int,
    seed: int,
    config: EditConfig,
) -> dict[str, Any]:
    deviation = stream.editor.deviation()
    report, first = stream.report, stream.ages[0]
    return {
        "edits": edits,
        "batch_size": batch_size,
        "seed": seed,
        "efficacy_strict": report.efficacy.strict,
        "generalization_strict": report.generalization.strict,
        "neighbors_unchanged": report.neighbors.strict,
        "namesakes_unchanged": report.namesakes.strict,
        "same_subject_unchanged": report.same_subject.strict,
        "same_subject_unchanged_without_kl": bare.report.same_subject.strict,
        "retention_oldest": first.retained,
        "edits_per_second": edits / stream.seconds,
        "deviation": max(layer.weight for layer in deviation),
        "deviation_bound": max(layer.weight_bound for layer in deviation),
        "not_converged": sum(not record.search_converged for record in stream.records),
        "metrics": asdict(report),
        "metrics_without_kl": asdict(bare.report),
        "ages": [asdict(age) | {"retained": age.retained} for age in stream.ages],
        "layers": [asdict(layer) for layer in deviation],
        "answers": [asdict(answer) for answer in answers],
        "seconds": stream.seconds,
        "config": config.to_dict(),
    }


def table(results: dict[str, Any]) -> str:
    """The results as lines for a terminal."""

    def share(value: float | None) -> str:
        return "    -" if value is None else f"{value:5.3f}"

    names = {
        "efficacy": "efficacy (the edited phrasing)",
        "generalization": "generalization (unseen phrasings)",
        "neighbors": "neighbours unchanged",
        "namesakes": "namesakes unchanged",
        "same_subject": "other facts of the subject unchanged",
    }
    lines = [f"{'':38}  {'with the KL term':^22}  {'without':^15}"]
    lines.append(f"{'':38}  {'forced':>6} {'strict':>6} {'prompts':>8}  {'forced':>7} {'strict':>7}")
    for key, name in names.items():
        ours, bare = results["metrics"][key], results["metrics_without_kl"][key]
        lines.append(
            f"{name:38}  {share(ours['forced']):>6} {share(ours['strict']):>6} {ours['prompts']:>8}"
            f"  {share(bare['forced']):>7} {share(bare['strict']):>7}"
        )
    ages = results["ages"]
    lines += ["", "retention, strict efficacy            when made  at the end  retained"]
    for label, age in (("first", ages[0]), ("middle", ages[len(ages) // 2]), ("last", ages[-1])):
        name = f"{label} (edits {age['first']} to {age['last']})"
        lines.append(f"{name:38}{share(age['when_made']):>9}{share(age['at_end']):>12}{share(age['retained']):>10}")
    lines += ["", "drift of the weights from the pre-trained ones, and what it cannot exceed"]
    for layer in results["layers"]:
        lines.append(f"layer {layer['layer']}: ||W - W0|| = {layer['weight']:.3f}, bound {layer['weight_bound']:.3f}")
    lines += ["", f"{results['edits_per_second']:.1f} edits per second ({results['seconds']:.0f} s of editing)"]
    if results["not_converged"]:
        lines.append(f"{results['not_converged']} edits were written though their value search had not converged")
    lines += ["", f"{'':11}{'prompt':46}{'before':16}{'after':16}saved and reloaded"]
    for answer in results["answers"]:
        lines.append(
            f"{answer['kind']:11}{answer['prompt']:46}{answer['before']:16}{answer['after']:16}{answer['reloaded']}"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Retention by age of edit as a PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plot needs matplotlib; pip install matplotlib") from error
    ages = results["ages"]
    middle = [(age["first"] + age["last"]) / 2 for age in ages]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(middle, [age["when_made"] for age in ages], "o--", color="0.6", label="when made")
    axes.plot(middle, [age["at_end"] for age in ages], "o-", color="tab:blue", label="at the end of the stream")
    axes.set(xlabel="number of the edit", ylabel="strict efficacy", ylim=(0, 1.03), title="Retention by age of edit")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)
