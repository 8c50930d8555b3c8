"""Which layers of a model to edit: the same few edits are made in different layers, measured, and taken out again.

Single layers are tried first, at equal distances over the model's depth. Then groups of consecutive layers around the
best one are tried, and the default layers. The edits, the anchors and all other settings are the same in every trial,
so that the trials can be compared edit by edit. Edits that fail are not searched again (`refine=0`), since the layers
in which edits fail are to be seen.
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
from rlsedit_fast.evaluation.outcome import Said, ask
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
"""Fewer edits say nothing about a layer."""
SINGLES = 8
"""Single layers that are tried first, about."""
WIDTHS = (3, 5)
"""Numbers of consecutive layers that are tried around the best single layer."""
DEEPEST = 0.6
"""Share of the depth beyond which no single layer is tried. The published choices are all below 0.4."""
PROBED = 2000
"""Tokens of text on which the drift is measured."""


@dataclass(frozen=True)
class Trial:
    """What the edits did when they were made in certain layers.

    Attributes:
        layers: that were edited.
        efficacy: share of the edited prompts whose target is ranked first at every token.
        generalization: the same of the paraphrases; None without any.
        specificity: share of the neighborhood prompts whose next token is the one before the edits; None without any.
        nll: mean NLL of the targets per token after the edited prompts, nats.
        paraphrase_nll: the same after the paraphrases; None without any.
        kl: `KL(before || after)` of the next token on running text, mean, nats.
        perplexity: on that text, after the edits divided by before.
        change: `||W - W0||_F / ||W0||_F`, the largest of the layers.
        converged: share of the edits whose value search reached its target.
        seconds: that the trial took.
        score: mean of `scores`.
        scores: of each edit the mean of up to three figures: the probability of its target per token after the edited
            prompt, the same after its paraphrases, and the share of its neighborhood prompts that are unchanged. With
            a few edits, probabilities separate settings better than shares do.
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
    """The result of a search.

    Attributes:
        default: the layers that are edited without a search.
        best: the layers with the highest score.
        chosen: the recommended layers; see `choose`.
        edits: how many edits were made in each trial.
        anchor_tokens: tokens of the anchors.
        trials: in the order in which they were made.
        failed: by layers, why a trial could not be made.
    """

    default: tuple[int, ...]
    best: tuple[int, ...]
    chosen: tuple[int, ...]
    edits: int
    anchor_tokens: int
    trials: list[Trial]
    failed: dict[tuple[int, ...], str]

    def trial(self, layers: Sequence[int]) -> Trial:
        """The trial of certain layers.

        Raises:
            InputError: they were not tried.
        """
        for trial in self.trials:
            if trial.layers == tuple(layers):
                return trial
        raise InputError(f"layers {tuple(layers)} were not tried")

    def to_json(self) -> dict[str, Any]:
        """As plain lists and numbers, with the difference of each trial from the best one."""
        best = self.trial(self.best)
        trials = []
        for trial in self.trials:
            difference, error = compare(trial, best)
            trials.append({**asdict(trial), "behind_best": -difference, "behind_best_error": error})
        failed = [{"layers": list(layers), "reason": reason} for layers, reason in self.failed.items()]
        about = {name: getattr(self, name) for name in ("default", "best", "chosen", "edits", "anchor_tokens")}
        return {**about, "trials": trials, "failed": failed}


def compare(trial: Trial, other: Trial) -> tuple[float, float]:
    """The mean difference of the scores of two trials, and its standard error. Both made the same edits."""
    differences = torch.tensor(trial.scores, dtype=torch.float64) - torch.tensor(other.scores, dtype=torch.float64)
    error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return float(differences.mean()), error


def choose(trials: Sequence[Trial]) -> tuple[Trial, Trial]:
    """The trial with the highest score, and the recommended one.

    A few edits cannot separate layers that differ little. Of the trials whose score is within one standard error of
    the highest one, the trial with the least drift on running text is recommended.

    Args:
        trials: at least one, all of the same edits.
    """
    best = max(trials, key=lambda trial: trial.score)
    close = []
    for trial in trials:
        difference, error = compare(trial, best)
        if -difference <= error + _ROUNDING:
            close.append(trial)
    return best, min(close, key=lambda trial: trial.kl)


def single_layers(depth: int, stride: int | None = None) -> list[int]:
    """The single layers that are tried first.

    Args:
        depth: number of blocks of the model.
        stride: distance between them; by default one that gives about `SINGLES` layers.
    """
    end = max(1, min(depth - 1, math.ceil(DEEPEST * depth)))  # no later token reads the output of the last block
    step = stride or max(1, round(end / SINGLES))
    return list(range(step // 2, end, step))


def windows(layer: int, depth: int, widths: Sequence[int] = WIDTHS) -> list[tuple[int, ...]]:
    """Groups of consecutive layers that contain `layer`: for each width one that ends there and one around it.

    Args:
        layer: the best single layer.
        depth: number of blocks of the model.
        widths: numbers of layers.
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
    """Tries layers of a model. The model's weights are the same afterwards, bit for bit.

    Args:
        model: a causal language model, unedited.
        tokenizer: its tokenizer.
        edits: of different subjects, at least `LEAST_EDITS`. Paraphrases and neighborhood prompts count if there are
            any. All are written in one batch.
        texts: running text. The last quarter is used to measure the drift and the rest for anchors.
        config: the settings, without layers.
        stride: see `single_layers`.
        widths: see `windows`.
        tokens: most tokens of the anchors; None takes all of the text.
        on_trial: called after each trial with the trial (None if it failed), how many were made, and how many there
            will be, as far as is known.

    Raises:
        InputError: too few edits or texts, or a config that names layers.
        RequestError: an edit that cannot be made as written.
        ModelError: the layers are not found or cannot be edited.
    """
    config = config or EditConfig()
    if config.layers is not None:
        raise InputError(f"layers={config.layers}: the layers are what is searched; leave them out")
    if len(edits) < LEAST_EDITS:
        raise InputError(f"{len(edits)} edits: expected at least {LEAST_EDITS}; 24 or more give usable figures")
    cut = len(texts) * 3 // 4
    if cut < 1 or cut == len(texts):
        raise InputError(f"{len(texts)} texts: expected at least 2; give more running text")
    editor = Editor(model, tokenizer, config=config)
    editor.context.prepare(edits)  # raises for edits that cannot be made
    base = editor.config.replace(refine=0)
    trials = Trials(model, tokenizer, edits, texts[:cut], texts[cut:], config=base, tokens=tokens)
    depth = len(trials.decoder.blocks)
    default = editor.layers
    singles = single_layers(depth, stride)
    several = trials.divisible(singles[len(singles) // 2])
    expected = len(singles) + (1 + 2 * len(widths) if several else 3)
    made, failed = list[Trial](), dict[tuple[int, ...], str]()

    def go(layers: Iterable[tuple[int, ...]]) -> None:
        tried = {trial.layers for trial in made} | set(failed)
        groups = [group for group in dict.fromkeys(layers) if group not in tried]
        trials.collect_for({layer for group in groups for layer in group})
        for group in groups:
            trial = None
            try:
                trial = trials.run(base.replace(layers=group))
            except (RLSEditError, ArithmeticError) as error:
                failed[group] = str(error)
            else:
                made.append(trial)
            done = len(made) + len(failed)
            if on_trial is not None:
                on_trial(trial, done, max(expected, done))

    go((layer,) for layer in singles)
    if not made:
        raise InputError(f"no layer could be edited: {'; '.join(dict.fromkeys(failed.values()))}")
    near = choose(made)[0].layers[-1]
    if several:
        go([default, *windows(near, depth, widths)])
    else:
        distance = max(1, (singles[1] - singles[0]) // 2) if len(singles) > 1 else 1
        go([default, *((layer,) for layer in (near - distance, near + distance) if 0 <= layer < depth - 1)])
    best, chosen = choose(made)
    return LayerSearch(default, best.layers, chosen.layers, len(edits), trials.anchor_tokens, made, failed)


class Trials:
    """Trials on one model: the same edits under different settings.

    Args:
        model: unedited.
        tokenizer: its tokenizer.
        edits: made in each trial.
        anchors: texts of the anchors.
        probed: texts on which the drift is measured.
        config: says where the blocks and the projections are.
        tokens: most tokens of the anchors.

    Attributes:
        decoder: the model's blocks.
        anchor_tokens: tokens of the anchors; 0 before they are collected.
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
        self._before = ask(model, tokenizer, edits)
        self.decoder: Decoder = find_decoder(
            model, layer_module=config.layer_module, projection_module=config.projection_module
        )
        self.anchor_tokens = 0

    def divisible(self, layer: int) -> bool:
        """Whether a change can be divided among several layers."""
        with quiet(self._model):
            return find_site(self.decoder, self.decoder.select([layer])).direct

    def collect_for(self, layers: set[int]) -> None:
        """Collects the anchors of these layers, in one pass over the text; those of others are forgotten."""
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
        """Makes the edits in one batch, measures, and puts the weights back.

        Args:
            config: the settings. The anchors of its layers are collected if they are missing.

        Raises:
            RLSEditError: the edits cannot be made; the model is as it was.
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
            said = ask(self._model, self._tokenizer, self._edits)
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
            **_figures(self._edits, said, self._before),
        )


def _figures(edits: Sequence[Edit], said: Said, before: Said) -> dict[str, Any]:
    """The figures of a trial that come from its prompts."""
    efficacy, generalization, specificity = list[float](), list[float](), list[float]()
    nll, paraphrase_nll, scores = list[float](), list[float](), list[float]()
    for edit in edits:
        asked = said.scores[fill(edit.prompt, edit.subject)[0], edit.target]
        other = [said.scores[prompt, edit.target] for prompt in edit.paraphrases]
        kept = [float(said.following[prompt] == before.following[prompt]) for prompt in edit.neighborhood]
        parts = [
            [math.exp(-asked.nll)],
            [math.exp(-one.nll) for one in other],
            kept,
        ]
        known = [sum(part) / len(part) for part in parts if part]
        scores.append(sum(known) / len(known))
        efficacy.append(float(asked.exact))
        nll.append(asked.nll)
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
    """Puts the weights back afterwards, bit for bit."""
    originals = [projection.weight.clone() for projection in projections]
    try:
        yield
    finally:
        for projection, original in zip(projections, originals, strict=True):
            projection.write(original)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Edits that fail are what is measured; the editor does not warn of them."""
    editing = logging.getLogger("rlsedit_fast.editing")
    level = editing.level
    editing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        editing.setLevel(level)
