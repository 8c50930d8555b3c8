"""Search for the layers to edit: applies the same edits in different layers, evaluates them, and restores the model.

Single layers at equal distances are tried first, then groups of consecutive layers around the best one and the default
layers. The edits, the anchors and all other settings are the same in every trial, so that trials can be compared edit
by edit. Edits that fail are not refined (`refine=0`), because refinement would hide the layers in which edits fail.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.editor import Editor
from rlsedit_fast.errors import InputError, RLSEditError
from rlsedit_fast.evaluation.outcome import CollectedAnswers, collect_answers
from rlsedit_fast.evaluation.stability import TextProbe
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import Decoder, Projection, find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.models.tokens import fill
from rlsedit_fast.statistics import KeyStatistics, collect
from rlsedit_fast.statistics.sources import GivenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROUNDING = 1e-9

LEAST_EDITS = 4
"""Minimum number of edits of a search."""
SINGLES = 8
"""Approximate number of single layers that are tried."""
WIDTHS = (3, 5)
"""Numbers of consecutive layers that are tried around the best single layer."""
DEEPEST = 0.6
"""Fraction of the depth above which no single layer is tried. All published choices are below 0.4."""
PROBED = 2000
"""Maximum number of tokens on which the drift is measured."""


@dataclass(frozen=True)
class Trial:
    """Result of edits in certain layers.

    Attributes:
        layers: the edited layers.
        efficacy: fraction of the edited prompts after which every token of the target is ranked first.
        generalization: the same for paraphrases; None if there are none.
        specificity: fraction of the neighborhood prompts whose most likely next token is unchanged; None if there are
            none.
        nll: mean NLL per token of the targets after the edited prompts, in nats.
        paraphrase_nll: the same after the paraphrases; None if there are none.
        kl: mean `KL(before || after)` of the next-token distributions on running text, in nats.
        perplexity: perplexity on that text after the edits, divided by that before.
        change: largest `||W - W0||_F / ||W0||_F` of the layers.
        converged: fraction of the edits whose value search converged.
        seconds: duration of the trial.
        score: mean of `scores`.
        scores: per edit the mean of up to three values: the probability of its target per token after the edited
            prompt, the same after its paraphrases, and the fraction of unchanged neighborhood prompts. For few edits,
            probabilities separate settings better than fractions of successes.

    Example:
        >>> from rlsedit_fast.evaluation import Trial
        >>> trial = Trial(
        ...     layers=(4,), efficacy=1.0, generalization=0.5, specificity=None, nll=0.1, paraphrase_nll=0.9, kl=0.01,
        ...     perplexity=1.02, change=0.05, converged=1.0, seconds=3.0, score=0.7, scores=(0.8, 0.6),
        ... )
        >>> trial.score
        0.7
    """

    layers: tuple[int, ...]
    efficacy: float
    generalization: float | None
    specificity: float | None
    nll: float
    paraphrase_nll: float | None
    kl: float
    perplexity: float
    change: float
    converged: float
    seconds: float
    score: float
    scores: tuple[float, ...]


@dataclass(frozen=True)
class LayerSearch:
    """Result of a search for layers.

    Attributes:
        default: layers that are edited without a search.
        best: layers with the highest score.
        chosen: recommended layers, see `choose`.
        edits: number of edits in each trial.
        anchor_tokens: number of anchor tokens.
        trials: trials in the order of execution.
        failed: error message by layers, for trials that failed.

    Example:
        >>> from rlsedit_fast.evaluation import LayerSearch
        >>> search = LayerSearch(
        ...     default=(4, 5), best=(3,), chosen=(3,), edits=24, anchor_tokens=2000, trials=[], failed={}
        ... )
        >>> search.chosen
        (3,)
    """

    default: tuple[int, ...]
    best: tuple[int, ...]
    chosen: tuple[int, ...]
    edits: int
    anchor_tokens: int
    trials: list[Trial]
    failed: dict[tuple[int, ...], str]

    def trial(self, layers: Sequence[int]) -> Trial:
        """Returns the trial of certain layers.

        Args:
            layers: the layers.

        Raises:
            InputError: there is no such trial.
        """
        for trial in self.trials:
            if trial.layers == tuple(layers):
                return trial
        tried = ", ".join(str(trial.layers) for trial in self.trials) or "none"
        raise InputError(f"layers {tuple(layers)} have no trial; expected one of {tried}")

    def to_json(self) -> dict[str, Any]:
        """Returns the result, JSON-serializable, with the difference of each trial from the best one."""
        best = self.trial(self.best)
        trials = []
        for trial in self.trials:
            difference, error = compare(trial, best)
            trials.append({**asdict(trial), "behind_best": -difference, "behind_best_error": error})
        failed = [{"layers": list(layers), "reason": reason} for layers, reason in self.failed.items()]
        about = {name: getattr(self, name) for name in ("default", "best", "chosen", "edits", "anchor_tokens")}
        return {**about, "trials": trials, "failed": failed}


def compare(trial: Trial, other: Trial) -> tuple[float, float]:
    """Compares two trials of the same edits.

    Args:
        trial: the trial.
        other: trial to compare with.

    Returns:
        The mean difference of the scores (`trial` minus `other`), and its standard error.

    Example:
        >>> from dataclasses import replace
        >>> from rlsedit_fast.evaluation import Trial, compare
        >>> trial = Trial((4,), 1.0, None, None, 0.1, None, 0.01, 1.0, 0.05, 1.0, 3.0, 0.75, (0.5, 1.0))
        >>> compare(replace(trial, scores=(0.5, 0.5)), trial)
        (-0.25, 0.25)
    """
    differences = torch.tensor(trial.scores, dtype=torch.float64) - torch.tensor(other.scores, dtype=torch.float64)
    error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return float(differences.mean()), error


def choose(trials: Sequence[Trial]) -> tuple[Trial, Trial]:
    """Selects the trial with the highest score and the recommended trial.

    Few edits do not separate layers that differ little. Of the trials whose score is within one standard error of the
    highest one, the trial with the smallest KL on running text is recommended.

    Args:
        trials: at least one trial, all of the same edits.

    Returns:
        The best trial and the recommended trial.

    Example:
        >>> from dataclasses import replace
        >>> from rlsedit_fast.evaluation import Trial, choose
        >>> one = Trial((4,), 1.0, None, None, 0.1, None, 0.05, 1.0, 0.05, 1.0, 3.0, 0.75, (0.5, 1.0))
        >>> other = replace(one, layers=(3,), kl=0.01, score=0.7, scores=(0.6, 0.8))
        >>> [trial.layers for trial in choose([one, other])]
        [(4,), (3,)]
    """
    best = max(trials, key=lambda trial: trial.score)
    close = []
    for trial in trials:
        difference, error = compare(trial, best)
        if -difference <= error + _ROUNDING:
            close.append(trial)
    return best, min(close, key=lambda trial: trial.kl)


def single_layers(depth: int, stride: int | None = None) -> list[int]:
    """Returns the single layers that are tried.

    Args:
        depth: number of blocks of the model.
        stride: distance between layers; by default a distance that gives about `SINGLES` layers.

    Example:
        >>> from rlsedit_fast.evaluation import single_layers
        >>> single_layers(30)
        [1, 3, 5, 7, 9, 11, 13, 15, 17]
    """
    end = max(1, min(depth - 1, math.ceil(DEEPEST * depth)))  # no later token reads the output of the last block
    step = stride or max(1, round(end / SINGLES))
    return list(range(step // 2, end, step))


def windows(layer: int, depth: int, widths: Sequence[int] = WIDTHS) -> list[tuple[int, ...]]:
    """Returns groups of consecutive layers: for each width one that ends at a layer and one that is centered there.

    Args:
        layer: the best single layer.
        depth: number of blocks of the model.
        widths: numbers of layers per group.

    Returns:
        The groups within the model, without the last block.

    Example:
        >>> from rlsedit_fast.evaluation import windows
        >>> windows(5, 30, widths=(3,))
        [(3, 4, 5), (4, 5, 6)]
    """
    found = []
    for width in widths:
        for last in (layer, layer + width // 2):
            group = tuple(range(last - width + 1, last + 1))
            if width > 1 and group[0] >= 0 and group[-1] < depth - 1 and group not in found:
                found.append(group)
    return found


def search_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    texts: Sequence[str],
    *,
    config: EditConfig | None = None,
    stride: int | None = None,
    widths: Sequence[int] = WIDTHS,
    tokens: int | None = None,
    on_trial: Callable[[Trial | None, int, int], None] | None = None,
) -> LayerSearch:
    """Searches for the layers to edit. The weights of the model are restored bit for bit.

    Args:
        model: the unedited model.
        tokenizer: tokenizer of the model.
        edits: edits of different subjects, at least `LEAST_EDITS`, applied in one batch. Paraphrases and neighborhood
            prompts are included in the score.
        texts: running text; the last quarter is used to measure drift, the rest for anchors.
        config: settings, without layers.
        stride: see `single_layers`.
        widths: see `windows`.
        tokens: maximum number of anchor tokens; None for all.
        on_trial: called after each trial with the trial (None if it failed), the number of executed trials, and the
            expected number of trials.

    Returns:
        The trials and the recommended layers.

    Raises:
        InputError: there are too few edits or texts, or the config specifies layers.
        RequestError: an edit is invalid.
        ModelError: the layers are not found or cannot be edited.

    Example:
        >>> from rlsedit_fast.errors import InputError
        >>> from rlsedit_fast.evaluation import generic_edits, search_layers
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> try:  # a search of a small model takes about a minute
        ...     search_layers(model, tokenizer, generic_edits(3), texts=["some text"] * 8)
        ... except InputError as error:
        ...     print(error)
        3 edits: expected at least 4, preferably 24 or more
    """
    config = config or EditConfig()
    if config.layers is not None:
        raise InputError(f"layers={config.layers}: the search selects the layers; omit them")
    if len(edits) < LEAST_EDITS:
        raise InputError(f"{len(edits)} edits: expected at least {LEAST_EDITS}, preferably 24 or more")
    cut = len(texts) * 3 // 4
    if cut < 1 or cut == len(texts):
        raise InputError(f"{len(texts)} texts: expected at least 2; pass more running text")
    editor = Editor(model, tokenizer, config=config)
    editor.context.prepare(edits)  # raises an error for invalid edits
    base = editor.config.replace(refine=0)
    trials = Trials(model, tokenizer, edits, texts[:cut], texts[cut:], config=base, tokens=tokens)
    depth = len(trials.decoder.blocks)
    default = editor.layers
    singles = single_layers(depth, stride)
    several = trials.divisible(singles[len(singles) // 2])
    expected = len(singles) + (1 + 2 * len(widths) if several else 3)
    finished, failed = list[Trial](), dict[tuple[int, ...], str]()

    def run_trials(layers: Iterable[tuple[int, ...]]) -> None:
        tried = {trial.layers for trial in finished} | set(failed)
        groups = [group for group in dict.fromkeys(layers) if group not in tried]
        trials.collect_for({layer for group in groups for layer in group})
        for group in groups:
            trial = None
            try:
                trial = trials.run(base.replace(layers=group))
            except (RLSEditError, ArithmeticError) as error:
                failed[group] = str(error)
            else:
                finished.append(trial)
            done = len(finished) + len(failed)
            if on_trial is not None:
                on_trial(trial, done, max(expected, done))

    run_trials((layer,) for layer in singles)
    if not finished:
        raise InputError(f"no layer could be edited: {'; '.join(dict.fromkeys(failed.values()))}")
    near = choose(finished)[0].layers[-1]
    if several:
        run_trials([default, *windows(near, depth, widths)])
    else:
        distance = max(1, (singles[1] - singles[0]) // 2) if len(singles) > 1 else 1
        run_trials([default, *((layer,) for layer in (near - distance, near + distance) if 0 <= layer < depth - 1)])
    best, chosen = choose(finished)
    return LayerSearch(default, best.layers, chosen.layers, len(edits), trials.anchor_tokens, finished, failed)


class Trials:
    """Executes trials on one model: the same edits with different settings.

    Args:
        model: the unedited model.
        tokenizer: tokenizer of the model.
        edits: edits of each trial.
        anchors: texts of the anchors.
        probed: texts on which the drift is measured.
        config: settings; only `layer_module` and `projection_module` are used.
        tokens: maximum number of anchor tokens; None for all.

    Attributes:
        decoder: blocks of the model.
        anchor_tokens: number of anchor tokens; 0 before they are collected.

    Example:
        >>> from rlsedit_fast import Edit
        >>> from rlsedit_fast.evaluation import CONFIG, Trials, anchor_texts
        >>> from rlsedit_fast.world import World, load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> texts = anchor_texts(World.generate(), seed=0)
        >>> edits = [Edit("{} plays the", "Toze Lado Rekuno", "harp")]
        >>> trials = Trials(model, tokenizer, edits, texts[:100], texts[100:110], config=CONFIG)
        >>> trials.collect_for({0})
        >>> trials.anchor_tokens > 500, trials.divisible(0)
        (True, True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        anchors: Sequence[str],
        probed: Sequence[str],
        *,
        config: EditConfig,
        tokens: int | None = None,
    ) -> None:
        self._model, self._tokenizer, self._edits = model, tokenizer, list(edits)
        self._anchors, self._tokens = list(anchors), tokens
        self._identity = fingerprint(model)
        self._statistics: dict[int, torch.Tensor] = {}
        self._probe = TextProbe(model, tokenizer, probed, tokens=PROBED)
        self._perplexity = self._probe(model).perplexity
        self._before = collect_answers(model, tokenizer, edits)
        self.decoder: Decoder = find_decoder(
            model, layer_module=config.layer_module, projection_module=config.projection_module
        )
        self.anchor_tokens = 0

    def divisible(self, layer: int) -> bool:
        """Returns whether edits can be distributed over several layers, tested with the projection of `layer`."""
        with quiet(self._model):
            return find_site(self.decoder, self.decoder.select([layer])).direct

    def collect_for(self, layers: set[int]) -> None:
        """Collects the anchors of some layers in one pass over the text and removes those of other layers.

        Args:
            layers: indices of the layers.
        """
        self._statistics = {layer: moment for layer, moment in self._statistics.items() if layer in layers}
        if missing := sorted(layers - set(self._statistics)):
            found = collect(
                self.decoder,
                self._tokenizer,
                self.decoder.select(missing),
                GivenTexts(self._anchors),
                tokens=self._tokens,
                longest=getattr(self._model.config.get_text_config(), "max_position_embeddings", None),
                identity=self._identity,
            )
            self._statistics |= {layer: moment.cpu() for layer, moment in found.moments.items()}
            self.anchor_tokens = found.tokens

    def run(self, config: EditConfig) -> Trial:
        """Applies the edits in one batch, evaluates them, and restores the weights.

        Args:
            config: settings; missing anchors of its layers are collected.

        Returns:
            The result.

        Raises:
            RLSEditError: the edits cannot be applied; the model is unchanged.
        """
        began = time.perf_counter()
        config = config.replace(batch_size=max(config.batch_size, len(self._edits)))
        editor = Editor(self._model, self._tokenizer, config=config)
        if missing := set(editor.layers) - set(self._statistics):
            self.collect_for(missing | set(editor.layers))
        moments = {layer: self._statistics[layer] for layer in editor.layers}
        editor.anchor(KeyStatistics(moments, self.anchor_tokens, self._identity, "texts of a trial"))
        with _restored(editor.context.projections):
            with _no_warnings():
                records = editor.edit(self._edits)
            answers = collect_answers(self._model, self._tokenizer, self._edits)
            drift = self._probe(self._model)
            change = max(
                float((one.current.float() - one.original.float()).norm() / one.original.float().norm())
                for one in editor.changes()
            )
        return Trial(
            layers=editor.layers,
            kl=drift.kl,
            perplexity=drift.perplexity / self._perplexity,
            change=change,
            converged=sum(record.search_converged for record in records) / len(records),
            seconds=time.perf_counter() - began,
            **_figures(self._edits, answers, self._before),
        )


def _figures(edits: Sequence[Edit], answers: CollectedAnswers, before: CollectedAnswers) -> dict[str, Any]:
    """Computes the fields of a `Trial` that depend on its prompts."""
    efficacy, generalization, specificity = list[float](), list[float](), list[float]()
    nll, paraphrase_nll, scores = list[float](), list[float](), list[float]()
    for edit in edits:
        edited = answers.scores[fill(edit.prompt, edit.subject)[0], edit.target]
        other = [answers.scores[prompt, edit.target] for prompt in edit.paraphrases]
        kept = [float(answers.next_tokens[prompt] == before.next_tokens[prompt]) for prompt in edit.neighborhood]
        parts = [
            [math.exp(-edited.nll)],
            [math.exp(-one.nll) for one in other],
            kept,
        ]
        known = [sum(part) / len(part) for part in parts if part]
        scores.append(sum(known) / len(known))
        efficacy.append(float(edited.exact))
        nll.append(edited.nll)
        generalization += [float(one.exact) for one in other]
        paraphrase_nll += [one.nll for one in other]
        specificity += kept

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "efficacy": mean(efficacy),
        "generalization": mean(generalization),
        "specificity": mean(specificity),
        "nll": mean(nll),
        "paraphrase_nll": mean(paraphrase_nll),
        "score": mean(scores),
        "scores": tuple(scores),
    }


@contextmanager
def _restored(projections: Sequence[Projection]) -> Iterator[None]:
    """Restores the weights after the context, bit for bit."""
    originals = [projection.weight.clone() for projection in projections]
    try:
        yield
    finally:
        for projection, original in zip(projections, originals, strict=True):
            projection.write(original)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Disables the editor's warnings about failed edits, which the trials count."""
    editing = logging.getLogger("rlsedit_fast.editing")
    level = editing.level
    editing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        editing.setLevel(level)
