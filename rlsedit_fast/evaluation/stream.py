"""A stream of edits under one setting, looked at along the way: one run, one file of results.

A run is named by all that it depends on. Its file is written when it has ended, so a set of runs that was interrupted
goes on with the first one that has no file.
"""

from __future__ import annotations

import gc
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_fast import doctor
from rlsedit_fast.editing import EditConfig, Editor, EditRecord
from rlsedit_fast.errors import PriorError, UpdateError
from rlsedit_fast.evaluation.ages import AGE, age_groups
from rlsedit_fast.evaluation.cases import Case
from rlsedit_fast.evaluation.consistency import Likeness, consistency
from rlsedit_fast.evaluation.generation import fluency, free_accuracy, free_multihop
from rlsedit_fast.evaluation.metrics import Before, Judged, Metric, Report, judge, score_before, summarize
from rlsedit_fast.evaluation.stability import TextProbe
from rlsedit_fast.evaluation.tasks import Item, answer
from rlsedit_fast.files import written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 2
"""Of a result file; another one is not taken for a finished run."""

ALONG = 150
"""Most cases that are asked at a checkpoint, evenly spaced, of those told by then."""

_FREE = 300  # prompts that are answered freely, at most: each takes several passes
_FLUENT = 24  # texts whose fluency is measured, and cases whose consistency is


@dataclass(frozen=True)
class Ground:
    """What a stream runs on: a model, and what to look at beside the edits.

    Attributes:
        name: of it, in results.
        load: the unedited model, anew each time, and its tokenizer.
        anchors: texts, or key statistics, that the model is to go on doing, as `Editor.anchor` takes them; of a seed.
        texts: running text on which perplexity and KL are measured; of a seed, and of the subjects that are edited.
        tasks: items by task; may be empty.
        likeness: of texts, where there are reference texts; consistency is measured with it.
        made_of: names of its files and what else tells it from another one of its name; in results.
    """

    name: str
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    anchors: Callable[[int], Any]
    texts: Callable[[int, Collection[str]], Sequence[str]]
    tasks: Mapping[str, Sequence[Item]] = field(default_factory=dict)
    likeness: Likeness | None = None
    made_of: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run, by all that it depends on beside the ground and the cases.

    Attributes:
        label: the contender, as reports name it.
        stream: the kind of stream: `plain`, `conflicting`, `related`, or another name of the caller's.
        edits: how many.
        seed: of cases and anchors.
        order: which order of the same cases, 0 the first.
        config: of the editor.
        protected: with what weight every token of the cases' spare prompts is protected before the first edit, beside
            the anchors, against an edit of weight 1; 0 protects none. No prompt that is asked is among them.
        forgetting: weight of an edit against one that is made `AGE` edits later; 1 holds all alike. Below 1 later edits
            weigh more, which is a forgetting factor of recursive least squares by the weights of edits.
        checkpoints: shares of the stream at which everything is measured, the end being one of them anyway; where
            there are none, edits are not looked at when they are made either.
        judged: most cases that are asked at the end, evenly spaced; None asks all. Along the way it is `ALONG` of them.
    """

    label: str
    stream: str
    edits: int
    seed: int
    order: int = 0
    config: EditConfig
    protected: float = 0.0
    forgetting: float = 1.0
    checkpoints: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    judged: int | None = None

    def told(self) -> dict[str, Any]:
        """As a result file has it."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return found


def finished(path: Path, ground: str, plan: Plan, made_of: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The results of a run that has ended under these very settings; None where there are none.

    A setting that the file does not know yet, since it was written by an earlier version, must have its default.

    Args:
        path: of the file.
        ground: its name.
        plan: the settings.
        made_of: what the ground is made of, `Ground.made_of`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["format"], found["ground"], found.get("made_of", {})) != (FORMAT, ground, made_of or {}):
            return None
        then, now = dict(found["plan"]), plan.told()
        usual = Plan(label="", stream="", edits=0, seed=0, config=EditConfig()).told()
        same = _agree(then.pop("config"), now.pop("config"), usual["config"]) and _agree(then, now, usual)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if same else None


def _agree(then: Mapping[str, Any], now: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Whether settings are the same, those that were not known then having their defaults."""
    return set(then) <= set(now) and all(then.get(name, usual[name]) == value for name, value in now.items())


def run(
    ground: Ground,
    plan: Plan,
    cases: Sequence[Case],
    path: Path,
    *,
    superseded: Sequence[Case] = (),
    before: Before | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Makes a run and writes its file, or reads the file of one that was made already.

    The file is a JSON object with the settings, the machine and the versions, and `rows`, each a figure: `edits` made
    by then, `of` (which edits it is about: `all` up to then, or `first-last`), `metric`, `form`, `value`, `n`.
    A rule that fails along the way (a singular solve, a weight beyond its range) ends its stream there: `failed` says
    after how many edits and why, and what there is by then is measured. Any other error is raised, and leaves no file.

    Args:
        ground: what it runs on.
        plan: its settings; `edits` is the number of cases.
        cases: in the order in which they are told.
        path: of the result file.
        superseded: cases whose targets later ones replace: they should no longer be said.
        before: `score_before` of these cases, where it is known already.
        say: told what is going on.
    """
    known = finished(path, ground.name, plan, ground.made_of)
    if known is not None:
        return known
    began = time.perf_counter()
    model, tokenizer = ground.load()
    cuda = next(model.parameters()).is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    replaced = {id(case) for case in superseded}
    before = score_before(model, tokenizer, cases) if before is None else before
    probe = TextProbe(model, tokenizer, ground.texts(plan.seed, {case.edit.subject for case in cases}))
    rows: list[dict[str, Any]] = []

    def enter(edits: int, of: str, metric: str, form: str, value: float | None, n: int) -> None:
        if value is not None:
            rows.append({"edits": edits, "of": of, "metric": metric, "form": form, "value": value, "n": n})

    _look_whole(enter, 0, model, tokenizer, probe, ground)
    editor = Editor(model, tokenizer, config=plan.config)
    if (anchors := ground.anchors(plan.seed)) is not None:
        editor.anchor(anchors)
    if plan.protected:
        editor.protect(_never_asked(cases), weight=plan.protected)
    weights = _weights(plan, len(cases))
    groups = age_groups(len(cases), plan.config.batch_size)
    marks = _marks(groups, plan.checkpoints)
    batches: list[float] = []
    converged = made_count = 0
    failed: dict[str, Any] | None = None
    for start, stop in groups:
        told = [replace(case.edit, weight=w) for case, w in zip(cases[start:stop], weights[start:stop], strict=True)]
        clock = _Clock(cuda)
        try:
            records = editor.edit(told, on_batch=clock.lap)
        except (UpdateError, PriorError) as error:
            failed = {"after": made_count + clock.edits, "reason": str(error)}
            say(f"{plan.label}: stopped after {failed['after']} edits: {error}")
            made_count = failed["after"]
            batches += clock.laps
            break
        batches += clock.laps
        made_count = stop
        converged += sum(record.search_converged for record in records)
        here = [case for case in cases[start:stop] if id(case) not in replaced]
        if here and plan.checkpoints:
            found = summarize(judge(model, tokenizer, [_briefly(case) for case in here], before))
            _enter_report(enter, stop, f"{start + 1}-{stop}", found, "made")
        if stop in marks and stop < len(cases):
            so_far = _spread([case for case in cases[:stop] if id(case) not in replaced], ALONG)
            if so_far:
                _enter_report(enter, stop, "all", summarize(judge(model, tokenizer, so_far, before)))
            _look_whole(enter, stop, model, tokenizer, probe, ground)
            _enter_weights(enter, stop, editor)
    lasting = _spread([case for case in cases[:made_count] if id(case) not in replaced], plan.judged)
    judged = judge(model, tokenizer, lasting, before)
    if plan.checkpoints:
        asked = partial(judge, model, tokenizer, before=before)
        _enter_ages(enter, made_count, groups, cases, replaced, asked)
    _enter_report(enter, made_count, "all", summarize(judged))
    some = _spread(lasting, _FREE)
    free = (
        ("efficacy", [(case.asked.prompt, case.edit.target) for case in some]),
        ("generalization", [(case.paraphrases[0].prompt, case.edit.target) for case in some if case.paraphrases]),
    )
    for metric, pairs in free:
        if pairs:
            said = free_accuracy(model, tokenizer, pairs)
            enter(made_count, "all", metric, "free", sum(said) / len(said), len(said))
    chains = [chain for case in some for chain in case.multihop]
    if chains:
        followed = free_multihop(model, tokenizer, chains)
        enter(made_count, "all", "multihop", "free", sum(followed) / len(followed), len(followed))
    if superseded:
        old = [verdict for one in judge(model, tokenizer, superseded, before) for verdict in one["efficacy"]]
        enter(made_count, "all", "superseded", "strict", sum(v.strict for v in old) / len(old), len(old))
    _look_whole(enter, made_count, model, tokenizer, probe, ground)
    prompts = [case.asked.prompt for case in _spread(lasting, _FLUENT)]
    if prompts:
        enter(made_count, "all", "fluency", "entropy", fluency(model, tokenizer, prompts, tokens=50), len(prompts))
    referred = _spread([case for case in lasting if case.references], _FLUENT)
    if ground.likeness is not None and referred:
        like = consistency(model, tokenizer, referred, ground.likeness)
        enter(made_count, "all", "consistency", "cosine", like, len(referred))
    _enter_weights(enter, made_count, editor)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "format": FORMAT,
        "ground": ground.name,
        "made_of": dict(ground.made_of),
        "plan": plan.told(),
        **doctor.context(),
        "priors": [{"lam": prior.lam, "mu": prior.mu} for prior in editor.priors],
        "made": made_count,
        "failed": failed,
        "not_converged": made_count - converged if failed is None else None,
        "seconds_editing": sum(batches),
        "seconds_run": time.perf_counter() - began,
        "seconds_per_batch": [round(lap, 6) for lap in batches],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else usage,
        "rows": rows,
    }
    with written_whole(path) as (fresh,):
        Path(fresh).write_text(json.dumps(result, default=str) + "\n", encoding="utf-8")
    del editor, model
    gc.collect()
    return result


class _Clock:
    """Seconds of each batch of a call; what the call does before its first batch counts to that one."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._since = time.perf_counter()
        self.laps: list[float] = []
        self.edits = 0

    def lap(self, made: Sequence[EditRecord]) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps.append(now - self._since)
        self._since = now
        self.edits += len(made)


Enter = Callable[[int, str, str, str, "float | None", int], None]


def _marks(groups: Sequence[tuple[int, int]], shares: Sequence[float]) -> set[int]:
    """The ends of the groups that are nearest to some shares of the stream."""
    ends = [stop for _, stop in groups]
    return {min(ends, key=lambda end: abs(end - share * ends[-1])) for share in shares}


def _spread(cases: Sequence[Case], most: int | None) -> list[Case]:
    """At most so many of them, evenly spaced."""
    if most is None or len(cases) <= most:
        return list(cases)
    return [cases[at * len(cases) // most] for at in range(most)]


def _briefly(case: Case) -> Case:
    """What is asked of a case when it has just been told, and at the end again: enough for what it later forgets."""
    return replace(
        case,
        paraphrases=case.paraphrases[:1],
        neighbors=case.neighbors[:1],
        namesakes=(),
        same_subject=(),
        rebuilt=(),
        multihop=(),
    )


def _never_asked(cases: Sequence[Case]) -> list[str]:
    """The prompts that cases have to spare, but for those that another case asks."""
    asked = {question.prompt for case in cases for question in (*case.neighbors, *case.rebuilt, *case.namesakes)}
    spare = dict.fromkeys(question.prompt for case in cases for question in case.spare)
    return [prompt for prompt in spare if prompt not in asked]


def _weights(plan: Plan, count: int) -> list[float]:
    return [plan.forgetting ** (-at / AGE) for at in range(count)]


def _enter_report(enter: Enter, edits: int, of: str, report: Report, when: str = "") -> None:
    prefix = f"{when}:" if when else ""
    for part in fields(report):
        metric: Metric = getattr(report, part.name)
        for form in ("forced", "strict", "said", "tokens"):
            enter(edits, of, part.name, prefix + form, getattr(metric, form), metric.prompts)
    enter(edits, of, "score", prefix + "forced", report.score, report.efficacy.prompts)
    enter(edits, of, "score", prefix + "strict", report.strict_score, report.efficacy.prompts)


def _enter_ages(
    enter: Enter,
    edits: int,
    groups: Sequence[tuple[int, int]],
    cases: Sequence[Case],
    replaced: Collection[int],
    judged: Callable[[Sequence[Case]], list[Judged]],
) -> None:
    """At the end, by the age of the edit, what was asked when it was made: of all cases, the same prompts."""
    for start, stop in groups:
        here = [_briefly(case) for case in cases[start:stop] if id(case) not in replaced]
        if here and stop <= edits:
            _enter_report(enter, edits, f"{start + 1}-{stop}", summarize(judged(here)), "end")


def _look_whole(
    enter: Enter, edits: int, model: PreTrainedModel, tokenizer: Any, probe: TextProbe, ground: Ground
) -> None:
    found = probe(model)
    for name in ("perplexity", "kl", "top"):
        enter(edits, "text", name, "text", getattr(found, name), found.tokens)
    for task, items in ground.tasks.items():
        told = answer(model, tokenizer, items)
        enter(edits, "task", task, "accuracy", told.accuracy, told.items)
        enter(edits, "task", task, "error", told.error, told.items)
        enter(edits, "task", task, "cut", told.cut, told.items)
        enter(edits, "task", task, "left out", told.left_out, told.items)


def _enter_weights(enter: Enter, edits: int, editor: Editor) -> None:
    """Norms of the edited weights, how far they moved, and what is promised of that."""
    for deviation, change, prior in zip(editor.deviation(), editor.changes(), editor.priors, strict=True):
        moved = change.current.double() - change.original.double()
        of = f"layer {deviation.layer}"
        enter(edits, of, "weight", "norm", float(change.current.double().norm()), moved.numel())
        enter(edits, of, "weight", "spectral", float(torch.linalg.matrix_norm(change.current.double(), 2)), 1)
        enter(edits, of, "weight", "before", float(change.original.double().norm()), moved.numel())
        enter(edits, of, "deviation", "measured", deviation.weight, moved.numel())
        if math.isfinite(deviation.weight_bound):
            enter(edits, of, "deviation", "bound", deviation.weight_bound, moved.numel())
        if prior.anchor_moment is not None:
            moment = prior.anchor_moment.double()
            drift = float((moved @ moment * moved).sum().clamp_min(0).sqrt())
            enter(edits, of, "anchors", "measured", drift, len(moment))
            if math.isfinite(deviation.anchor_bound):
                enter(edits, of, "anchors", "bound", deviation.anchor_bound, len(moment))
