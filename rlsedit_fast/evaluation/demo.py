"""Demonstration: applies a stream of edits to the demo model and evaluates it.

`run` edits and evaluates and returns the results; `table` formats them; `plot` plots the retention.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rlsedit_fast.activity import activity_shown
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
"""Settings for the demo model. The KL prompts have one phrasing per relation; evaluation uses the others.

The adherence is above the default, because a thousand edits of 1,536 features reduce the effect of earlier ones.

Example:
    >>> from rlsedit_fast.evaluation import CONFIG
    >>> CONFIG.layers
    (0,)
"""

_ANCHOR_SENTENCES = 4000


@dataclass(frozen=True)
class Age:
    """Efficacy of a group of consecutive edits.

    Attributes:
        first: number of the first edit, from 1.
        last: number of the last edit.
        when_made: strict efficacy directly after the last batch of the group.
        at_end: strict efficacy after the whole stream.
    """

    first: int
    last: int
    when_made: float
    at_end: float

    @property
    def retained(self) -> float | None:
        """`at_end / when_made`; None if `when_made` is 0."""
        return self.at_end / self.when_made if self.when_made else None


@dataclass(frozen=True)
class Answer:
    """Generated answers to one prompt.

    Attributes:
        kind: role of the prompt, such as "paraphrase".
        prompt: the prompt.
        before: answer before the edits.
        after: answer after the edits.
        reloaded: answer of the saved checkpoint, loaded with transformers.
    """

    kind: str
    prompt: str
    before: str
    after: str
    reloaded: str


@dataclass(frozen=True)
class StreamResult:
    """Result of a stream of edits of the demo model.

    Attributes:
        editor: the editor with the edited model.
        records: records of the edits.
        ages: efficacy by group of edits.
        report: metrics after the stream.
        seconds: seconds of editing.
    """

    editor: Editor
    records: list[EditRecord]
    ages: list[Age]
    report: Report
    seconds: float


def run(*, edits: int, batch_size: int, seed: int, out: Path, show: bool = True) -> dict[str, Any]:
    """Edits the demo model, evaluates, saves and reloads it; then edits another copy without the KL term.

    Args:
        edits: number of edited facts, one per person.
        batch_size: edits per batch.
        seed: random seed of the choice of people, facts and anchor sentences.
        out: output folder; the checkpoint is written to its subfolder `model`.
        show: whether to show progress bars on stderr.

    Returns:
        The results, JSON-serializable.

    Raises:
        InputError: there are more edits than people, or the batch size is below 1.
    """
    config = CONFIG.replace(batch_size=batch_size)
    world = World.generate()
    cases = world_cases(world, edits, seed)
    model, tokenizer = load_demo_model()
    before = score_before(model, tokenizer, cases)
    questions = _samples(cases)
    answers_before = _complete(model, tokenizer, [question.prompt for _, question in questions])
    anchors = anchor_texts(world, seed)

    stream = _stream(model, tokenizer, cases, before, config, anchors, "editing", show=show)
    answers_after = _complete(model, tokenizer, [question.prompt for _, question in questions])
    stream.editor.save_pretrained(out / "model", overwrite=True)
    answers_reloaded = _complete(*_reload(out / "model"), [question.prompt for _, question in questions])

    bare_model, _ = load_demo_model()
    bare = _stream(
        bare_model,
        tokenizer,
        cases,
        before,
        config.replace(search={"kl_prompts": ()}),
        anchors,
        "again without KL",
        show=show,
    )

    answers = [
        Answer(kind, question.prompt, *texts)
        for (kind, question), *texts in zip(questions, answers_before, answers_after, answers_reloaded, strict=True)
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
    *,
    show: bool,
) -> StreamResult:
    editor = Editor(model, tokenizer, config=config)
    editor.anchor(anchors)
    groups = age_groups(len(cases), config.batch_size)
    when_made: list[float] = []
    records: list[EditRecord] = []
    seconds = 0.0
    with tqdm(total=len(cases), desc=title, unit="edit", disable=not show) as bar, activity_shown(bar):
        for start, stop in groups:
            began = time.perf_counter()
            records += editor.edit([case.edit for case in cases[start:stop]], on_batch=lambda made: _advance(bar, made))
            seconds += time.perf_counter() - began
            when_made.append(efficacy_strict(model, tokenizer, cases[start:stop]))
    ages = [
        Age(start + 1, stop, made, efficacy_strict(model, tokenizer, cases[start:stop]))
        for (start, stop), made in zip(groups, when_made, strict=True)
    ]
    return StreamResult(editor, records, ages, evaluate(model, tokenizer, cases, before), seconds)


def _advance(bar: tqdm[None], made: Sequence[EditRecord]) -> None:
    bar.update(len(made))


def anchor_texts(world: World, seed: int) -> list[str]:
    """Returns anchor sentences about random people, including edited ones, since later edits are not known in advance.

    Args:
        world: the world.
        seed: random seed of the choice.

    Returns:
        4,000 sentences, or all of a smaller world.

    Example:
        >>> from rlsedit_fast.evaluation import anchor_texts
        >>> from rlsedit_fast.world import World
        >>> len(anchor_texts(World.generate(), seed=0))
        4000
    """
    sentences = shuffled(list(world.sentences()), random.Random(seed))[:_ANCHOR_SENTENCES]
    return [f"{prompt.format(name)} {answer} ." for prompt, name, answer in sentences]


def _samples(cases: Sequence[Case]) -> list[tuple[str, Question]]:
    """Returns prompts of each kind for the first case that has neighbors, as (kind, question)."""
    case = next((c for c in cases if c.neighbors), cases[0])
    kinds = [
        ("edited", (case.question,)),
        ("paraphrase", case.paraphrases),
        ("other fact", case.same_subject),
        ("neighbor", case.neighbors),
    ]
    return [(kind, questions[0]) for kind, questions in kinds if questions]


def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Returns greedy continuations up to the period."""
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    generated = greedy(model, rows, [4] * len(rows), ends=[tokenizer.get_vocab()["."]])
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in generated]


def _reload(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a checkpoint with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


def _results(
    stream: StreamResult,
    bare: StreamResult,
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
        "metrics": report.to_json(),
        "metrics_without_kl": bare.report.to_json(),
        "ages": [asdict(age) | {"retained": age.retained} for age in stream.ages],
        "layers": [asdict(layer) for layer in deviation],
        "answers": [asdict(answer) for answer in answers],
        "seconds": stream.seconds,
        "config": config.to_dict(),
    }


def table(results: dict[str, Any]) -> str:
    """Formats the results of `run` as a table for the terminal."""

    def share(value: float | None) -> str:
        return "    -" if value is None else f"{value:5.3f}"

    names = {
        "efficacy": "efficacy (the edited phrasing)",
        "generalization": "generalization (unseen phrasings)",
        "neighbors": "neighbors unchanged",
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
    lines += ["", "change of the weights, and its bound"]
    for layer in results["layers"]:
        lines.append(f"layer {layer['layer']}: ||W - W0|| = {layer['weight']:.3f}, bound {layer['weight_bound']:.3f}")
    lines += ["", f"{results['edits_per_second']:.1f} edits per second ({results['seconds']:.0f} s of editing)"]
    if results["not_converged"]:
        lines.append(f"{results['not_converged']} edits were applied although their value search did not converge")
    lines += ["", f"{'':11}{'prompt':46}{'before':16}{'after':16}saved and reloaded"]
    for answer in results["answers"]:
        lines.append(
            f"{answer['kind']:11}{answer['prompt']:46}{answer['before']:16}{answer['after']:16}{answer['reloaded']}"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plots the retention by age of the edits as a PNG file.

    Args:
        results: results of `run`.
        path: output file.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plot requires matplotlib; pip install matplotlib") from error
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
