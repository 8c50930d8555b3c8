"""Search for the layers to edit: applies the same edits in different layers, evaluates them, and restores the model.

Single layers at equal distances are tried first, then groups of consecutive layers around the best one and the default
layers. The edits, the anchors and all other settings are the same in every trial, so that trials can be compared edit
by edit. Edits that fail are not refined (`refine=0`), because refinement would hide the layers in which edits fail.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.editor import Editor
from rlsedit_fast.errors import InputError, RLSEditError
from rlsedit_fast.evaluation.layer_trials import Trial, Trials

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
    editable = trials.decoder.editable  # layers of a hybrid model without an MLP are not tried
    depth = len(editable)
    default = editor.layers
    singles = [editable[at] for at in single_layers(depth, stride)]
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
    near = editable.index(choose(finished)[0].layers[-1])
    if several:
        run_trials([default, *(tuple(editable[at] for at in group) for group in windows(near, depth, widths))])
    else:
        step = editable.index(singles[1]) - editable.index(singles[0]) if len(singles) > 1 else 1
        beside = (near - max(1, step // 2), near + max(1, step // 2))
        run_trials([default, *((editable[at],) for at in beside if 0 <= at < depth - 1)])
    best, chosen = choose(finished)
    return LayerSearch(default, best.layers, chosen.layers, len(edits), trials.anchor_tokens, finished, failed)
