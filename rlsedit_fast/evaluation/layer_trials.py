"""Trials: applies the same edits under different settings, evaluates them, and restores the model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.editor import Editor
from rlsedit_fast.evaluation.outcome import CollectedAnswers, collect_answers
from rlsedit_fast.evaluation.stability import TextProbe
from rlsedit_fast.logs import warnings_silenced
from rlsedit_fast.models.facts import fact_key
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import Decoder, find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.statistics import KeyStatistics, collect
from rlsedit_fast.statistics.key_statistics import Moment
from rlsedit_fast.statistics.sources import GivenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        self._statistics: dict[int, Moment] = {}
        self._probe = TextProbe(model, tokenizer, probed)
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
                held_out=0.0,
                longest=max_tokens(self._model.config),
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
        with restored(editor.context.projections):
            with warnings_silenced("rlsedit_fast.editing"):  # about failed edits, which the trials count
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
            perplexity=drift.perplexity / self._probe.unedited.perplexity,
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
        edited = answers.scores[fact_key(edit)]
        other = [answers.scores[prompt, edit.target] for prompt in edit.filled_paraphrases]
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
def restored(projections: Sequence[Projection]) -> Iterator[None]:
    """Restores the weights after the context, bit for bit."""
    originals = [projection.copies() for projection in projections]
    try:
        yield
    finally:
        for projection, original in zip(projections, originals, strict=True):
            projection.restore(original)
