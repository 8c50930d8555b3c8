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
from torch import Tensor

from rlsedit_fast import doctor
from rlsedit_fast.editing import EditConfig, Editor, EditRecord
from rlsedit_fast.errors import PriorError, UpdateError
from rlsedit_fast.evaluation.ages import AGE, age_groups
from rlsedit_fast.evaluation.cases import Case
from rlsedit_fast.evaluation.consistency import Likeness, consistency
from rlsedit_fast.evaluation.generation import fluency, free_accuracy, free_multihop
from rlsedit_fast.evaluation.metrics import Before, Judged, Known, Metric, Report, judge, score_before, summarize
from rlsedit_fast.evaluation.phases import Phases
from rlsedit_fast.evaluation.stability import TOKENS, Stability, TextProbe
from rlsedit_fast.evaluation.tasks import Item, TaskResult, answer
from rlsedit_fast.files import written_whole
from rlsedit_fast.statistics import KeyStatistics
from rlsedit_fast.statistics.sources import GivenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 2
"""Of a result file; another one is not taken for a finished run."""

ALONG = 150
"""Most cases that are asked at a checkpoint, evenly spaced, of those edited by then."""

TOKENS_PER_DIMENSION, MOST_TOKENS = 20, 100_000
"""Default number of anchor tokens: this many per dimension of the widest key, and at most `MOST_TOKENS`."""

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
        tokens: of anchors that are texts, at most; None is `TOKENS_PER_DIMENSION` for each dimension of the widest key,
            at most `MOST_TOKENS`.
        made_of: names of its files and what else distinguishes it from another one of its name; in results.
    """

    name: str
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    anchors: Callable[[int], Any]
    texts: Callable[[int, Collection[str]], Sequence[str]]
    tasks: Mapping[str, Sequence[Item]] = field(default_factory=dict)
    likeness: Likeness | None = None
    tokens: int | None = None
    made_of: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Unedited:
    """What runs of one ground need to know of its unedited model, each filled in by the first run that needs it.

    Attributes:
        scores: of questions.
        tasks: results by task.
        statistics: the anchors that were given as texts, and their key statistics.
        probe: the texts and the number of their tokens that are probed, and the probe.
    """

    scores: Before = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    statistics: tuple[Any, KeyStatistics] | None = None
    probe: tuple[Sequence[str], int, TextProbe] | None = None


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
        free: most cases whose prompts are answered freely at the end, evenly spaced. The standard error of a share is
            `0.5 / sqrt(free)` at most.
        probed: tokens of text, at most, on which perplexity and KL are measured; their standard errors are among the
            figures.
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
    free: int = 300
    probed: int = TOKENS

    def as_json(self) -> dict[str, Any]:
        """As a result file has it."""
        plain = replace(self, config=None)  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(json.dumps(asdict(plain) | {"config": self.config.to_dict()}))
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
        then, now = dict(found["plan"]), plan.as_json()
        usual = Plan(label="", stream="", edits=0, seed=0, config=EditConfig()).as_json()
        same = _agree(then.pop("config"), now.pop("config"), usual["config"]) and _agree(then, now, usual)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if same else None


def _agree(then: Mapping[str, Any], now: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Whether settings are the same, those that were not known then having their defaults."""
    for name, value in now.items():
        known = then.get(name, usual[name])
        if isinstance(value, dict) and isinstance(usual[name], dict) and isinstance(known, dict) and usual[name]:
            if not _agree(known, value, usual[name]):
                return False
        elif known != value:
            return False
    return set(then) <= set(now)


def run(
    ground: Ground,
    plan: Plan,
    cases: Sequence[Case],
    path: Path,
    *,
    superseded: Sequence[Case] = (),
    unedited: Unedited | None = None,
    say: Callable[[str], None] = lambda line: None,
    show: bool = False,
) -> dict[str, Any]:
    """Makes a run and writes its file, or reads the file of one that was made already.

    The file is a JSON object with the settings, the machine and the versions, the seconds of each phase, and `rows`,
    each a figure: `edits` made by then, `of` (which edits it is about: `all` up to then, or `first-last`), `metric`,
    `form`, `value`, `n`. A rule that fails along the way (a singular solve, a weight beyond its range) ends its stream
    there: `failed` says after how many edits and why, and what there is by then is measured. Any other error is raised,
    and leaves no file.

    Args:
        ground: what it runs on.
        plan: its settings; `edits` is the number of cases.
        cases: in the order in which they are edited.
        path: of the result file.
        superseded: cases whose targets later ones replace: they should no longer be said.
        unedited: what other runs of this ground have found out about its model; what is lacking is added.
        say: called with a line of progress.
        show: whether each phase has a bar on stderr.
    """
    known = finished(path, ground.name, plan, ground.made_of)
    if known is not None:
        return known
    began = time.perf_counter()
    phases = Phases(shown=show, label=f"{plan.label}, seed {plan.seed}: ")
    unedited = Unedited() if unedited is None else unedited
    with phases("loading", "model") as progress:
        model, tokenizer = ground.load()
        progress(1, 1)
    cuda = next(model.parameters()).is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    replaced = {id(case) for case in superseded}
    with phases("scores before", "prompt") as progress:
        before = score_before(model, tokenizer, cases, known=unedited.scores, progress=progress)
    probe = _probe(
        model, tokenizer, ground.texts(plan.seed, {case.edit.subject for case in cases}), plan, unedited, phases
    )
    look = _Look(model, tokenizer, probe, ground.tasks, before, phases)
    _enter_text(look.enter, 0, probe.unedited)
    for task in ground.tasks:
        if task not in unedited.tasks:
            unedited.tasks[task] = look.task(task)
        _enter_task(look.enter, 0, task, unedited.tasks[task])
    editor = Editor(model, tokenizer, config=plan.config)
    anchors = _anchor(editor, ground, plan.seed, unedited, phases)
    if plan.protected:
        editor.protect(_never_asked(cases), weight=plan.protected)
    weights = _weights(plan, len(cases))
    groups = age_groups(len(cases), plan.config.batch_size)
    marks = _marks(groups, plan.checkpoints)
    batches: list[float] = []
    converged = made_count = 0
    failed: dict[str, Any] | None = None
    with phases("edits", "edit") as progress:
        for start, stop in groups:
            edits = [
                replace(case.edit, weight=w) for case, w in zip(cases[start:stop], weights[start:stop], strict=True)
            ]
            clock = _Clock(cuda, partial(progress, total=len(cases)), start)
            look.anew()
            try:
                records = editor.edit(edits, on_batch=clock.lap)
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
                found = summarize(look.judge([_briefly(case) for case in here]))
                _enter_report(look.enter, stop, f"{start + 1}-{stop}", found, "made")
            if stop in marks and stop < len(cases):
                so_far = _spread([case for case in cases[:stop] if id(case) not in replaced], ALONG)
                if so_far:
                    _enter_report(look.enter, stop, "all", summarize(look.judge(so_far)))
                look.whole(stop)
                _enter_weights(look.enter, stop, editor)
    lasting = _spread([case for case in cases[:made_count] if id(case) not in replaced], plan.judged)
    judged = look.judge(lasting)
    if plan.checkpoints:
        _enter_ages(look, made_count, groups, cases, replaced)
    _enter_report(look.enter, made_count, "all", summarize(judged))
    _enter_free(look, made_count, _spread(lasting, plan.free))
    if superseded:
        old = [verdict for one in look.judge(superseded) for verdict in one["efficacy"]]
        look.enter(made_count, "all", "superseded", "strict", sum(v.strict for v in old) / len(old), len(old))
    look.whole(made_count)
    prompts = [case.asked.prompt for case in _spread(lasting, _FLUENT)]
    if prompts:
        with phases("fluency", "text") as progress:
            entropy = fluency(model, tokenizer, prompts, tokens=50, progress=progress)
        look.enter(made_count, "all", "fluency", "entropy", entropy, len(prompts))
    referred = _spread([case for case in lasting if case.references], _FLUENT)
    if ground.likeness is not None and referred:
        with phases("consistency", "text") as progress:
            like = consistency(model, tokenizer, referred, ground.likeness, progress=progress)
        look.enter(made_count, "all", "consistency", "cosine", like, len(referred))
    _enter_weights(look.enter, made_count, editor)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "format": FORMAT,
        "ground": ground.name,
        "made_of": dict(ground.made_of),
        "plan": plan.as_json(),
        **doctor.context(),
        "anchors": None if anchors is None else {"tokens": anchors.tokens, "source": anchors.source},
        "priors": [{"lam": prior.lam, "mu": prior.mu} for prior in editor.priors],
        "made": made_count,
        "failed": failed,
        "not_converged": made_count - converged if failed is None else None,
        "seconds_editing": sum(batches),
        "seconds_run": time.perf_counter() - began,
        "seconds_by_phase": {name: round(seconds, 3) for name, seconds in phases.seconds.items()},
        "seconds_per_batch": [round(lap, 6) for lap in batches],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else usage,
        "rows": look.rows,
    }
    with written_whole(path) as (fresh,):
        Path(fresh).write_text(json.dumps(result, default=str) + "\n", encoding="utf-8")
    del editor, model, look
    gc.collect()
    return result


Enter = Callable[[int, str, str, str, "float | None", int], None]


@dataclass
class _Look:
    """Looks at a model whose edits go on, and the figures that come of them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    probe: TextProbe
    tasks: Mapping[str, Sequence[Item]]
    before: Before
    phases: Phases
    rows: list[dict[str, Any]] = field(default_factory=list)
    known: Known = field(default_factory=dict)
    """Of the model as it is now: looks at one state ask much the same."""

    def enter(self, edits: int, of: str, metric: str, form: str, value: float | None, n: int) -> None:
        """A figure, if there is one."""
        if value is not None:
            self.rows.append({"edits": edits, "of": of, "metric": metric, "form": form, "value": value, "n": n})

    def anew(self) -> None:
        """The model is about to change."""
        self.known.clear()

    def judge(self, cases: Sequence[Case]) -> list[Judged]:
        """Every prompt of the cases."""
        with self.phases("judging", "prompt") as progress:
            return judge(self.model, self.tokenizer, cases, self.before, known=self.known, progress=progress)

    def task(self, name: str) -> TaskResult:
        """A task's items."""
        with self.phases(f"task {name}", "answer") as progress:
            return answer(self.model, self.tokenizer, self.tasks[name], progress=progress)

    def whole(self, edits: int) -> None:
        """The model beside its edits: text and tasks."""
        with self.phases("text", "token") as progress:
            _enter_text(self.enter, edits, self.probe(self.model, progress=progress))
        for name in self.tasks:
            _enter_task(self.enter, edits, name, self.task(name))


def _probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    plan: Plan,
    unedited: Unedited,
    phases: Phases,
) -> TextProbe:
    """The unedited model's predictions on texts; they are made once for all runs with these texts."""
    if unedited.probe is None or unedited.probe[:2] != (texts, plan.probed):
        with phases("text", "token") as progress:
            made = TextProbe(model, tokenizer, texts, tokens=plan.probed, progress=progress)
        unedited.probe = texts, plan.probed, made
    return unedited.probe[2]


def _anchor(editor: Editor, ground: Ground, seed: int, unedited: Unedited, phases: Phases) -> KeyStatistics | None:
    """Gives the editor the ground's anchors; of texts, the statistics are collected once for all runs."""
    anchors = ground.anchors(seed)
    if anchors is None:
        return None
    if not isinstance(anchors, KeyStatistics):
        texts, found = unedited.statistics or (None, None)
        if found is None or texts is not anchors or not set(editor.layers) <= set(found.moments):
            tokens = ground.tokens
            if tokens is None:
                width = max(projection.weight.shape[1] for projection in editor.context.projections)
                tokens = min(TOKENS_PER_DIMENSION * width, MOST_TOKENS)
            with phases("key statistics", "token") as progress:
                found = editor.statistics(GivenTexts(anchors), tokens=tokens, progress=progress)
            unedited.statistics = anchors, found
        anchors = found
    editor.anchor(anchors)
    return anchors


class _Clock:
    """Seconds of each batch of a call; what the call does before its first batch counts to that one."""

    def __init__(self, cuda: bool, progress: Callable[[int], None], start: int) -> None:
        self._cuda = cuda
        self._progress = progress
        self._start = start
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
        self._progress(self._start + self.edits)


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
    """What is asked of a case right after its edit, and at the end again: enough for what is forgotten later."""
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
    look: _Look, edits: int, groups: Sequence[tuple[int, int]], cases: Sequence[Case], replaced: Collection[int]
) -> None:
    """At the end, by the age of the edit, what was asked when it was made: of all cases, the same prompts."""
    for start, stop in groups:
        here = [_briefly(case) for case in cases[start:stop] if id(case) not in replaced]
        if here and stop <= edits:
            _enter_report(look.enter, edits, f"{start + 1}-{stop}", summarize(look.judge(here)), "end")


def _enter_free(look: _Look, edits: int, cases: Sequence[Case]) -> None:
    """What the model says by itself to the edited prompts, to a paraphrase of each, and to multi-hop questions."""
    pairs = {
        "efficacy": [(case.asked.prompt, case.edit.target) for case in cases],
        "generalization": [(case.paraphrases[0].prompt, case.edit.target) for case in cases if case.paraphrases],
    }
    with look.phases("free answers", "prompt") as progress:
        asked = [pair for some in pairs.values() for pair in some]
        said = iter(free_accuracy(look.model, look.tokenizer, asked, known=look.known, progress=progress))
    for metric, some in pairs.items():
        if some:
            look.enter(edits, "all", metric, "free", sum(next(said) for _ in some) / len(some), len(some))
    chains = [chain for case in cases for chain in case.multihop]
    if chains:
        with look.phases("free answers", "prompt") as progress:
            followed = free_multihop(look.model, look.tokenizer, chains, known=look.known, progress=progress)
        look.enter(edits, "all", "multihop", "free", sum(followed) / len(followed), len(followed))


def _enter_text(enter: Enter, edits: int, found: Stability) -> None:
    for name in ("perplexity", "kl", "top"):
        enter(edits, "text", name, "text", getattr(found, name), found.tokens)
    for name, error in (("perplexity", found.perplexity_error), ("kl", found.kl_error)):
        enter(edits, "text", name, "error", None if math.isnan(error) else error, found.tokens)


def _enter_task(enter: Enter, edits: int, task: str, found: TaskResult) -> None:
    enter(edits, "task", task, "accuracy", found.accuracy, found.items)
    enter(edits, "task", task, "error", found.error, found.items)
    enter(edits, "task", task, "cut", found.cut, found.items)
    enter(edits, "task", task, "left out", found.left_out, found.items)


def _enter_weights(enter: Enter, edits: int, editor: Editor) -> None:
    """Norms of the edited weights, how far they moved, and what is promised of that."""
    for deviation, change, prior in zip(editor.deviation(), editor.changes(), editor.priors, strict=True):
        moved = change.current.double() - change.original.double()
        of = f"layer {deviation.layer}"
        enter(edits, of, "weight", "norm", float(change.current.double().norm()), moved.numel())
        enter(edits, of, "weight", "spectral", _spectral(change.current.double()), 1)
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


def _spectral(matrix: Tensor) -> float:
    """The largest singular value, by the smaller of the two Gram matrices: far cheaper than all singular values."""
    smaller = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return float(torch.linalg.eigvalsh(smaller @ smaller.T)[-1].clamp_min(0).sqrt())
