"""How a model is edited: every switch of the editor, its meaning and its published default."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from rlsedit_fast import baselines
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.tokens import FactToken
from rlsedit_fast.rls.state import DEFAULT_DELAY

KeyRows = Literal["contexts", "mean"]
Values = Literal["search", "gradient"]
Descent = Literal["constrained", "normalized", "adam"]
Stop = Literal["nll", "rank", "loss"]
SameSubject = Literal["joint", "separate"]
Unconverged = Literal["keep", "skip", "raise"]
Keys = Literal["full", "fp16"]

DEFAULT_RATE: dict[Descent, float] = {"constrained": 0.11, "normalized": 0.09, "adam": 0.1}
GRADIENT_RATE = 0.6


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and fits(value)


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(map(fits, value))


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _one_of(name: str, choices: Any) -> tuple[str, Callable[[Any], bool], str]:
    known = get_args(choices)
    return name, lambda value: value in known, f"one of {', '.join(known)}"


_LEAST_LAYERS = 7  # by default; fewer fill up with fewer edits (docs/benchmarks.md)
_MOST = sys.float_info.max  # what is beyond it is an infinity, or a whole number of hundreds of digits
_COUNT, _FROM_0, _ABOVE_0 = _whole(1), _number(lambda x: 0 <= x <= _MOST), _number(lambda x: 0 < x <= _MOST)

# Names of fields, what their values must pass, and how that is put in words.
_EXPECTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "layers",
        _or_none(lambda value: _all(_whole(0))(value) and 0 < len(value) == len(set(value))),
        "at least one block index, counted from 0, and none twice; or None",
    ),
    ("layer_module projection_module", _or_none(_text), "a dotted name, or None"),
    _one_of("fact_token", FactToken),
    ("key_rows", _or_none(lambda value: value in get_args(KeyRows)), f"one of {', '.join(get_args(KeyRows))}, or None"),
    _one_of("values", Values),
    _one_of("search_descent", Descent),
    _one_of("search_stop", Stop),
    _one_of("same_subject", SameSubject),
    _one_of("unconverged", Unconverged),
    ("keys", _or_none(lambda value: value in get_args(Keys)), f"one of {', '.join(get_args(Keys))}, or None"),
    ("norm_anchor", lambda value: isinstance(value, bool), "True or False"),
    ("adherence bare_weight", _number(lambda x: 0 < x < 1), "a share strictly between 0 and 1, such as 0.8"),
    ("batch_size search_steps search_stop_steps context_tokens", _COUNT, "a whole number of at least 1"),
    ("search_ahead search_at_once search_memory", _or_none(_COUNT), "a whole number of at least 1, or None"),
    ("context_samples delay", _whole(0), "a whole number of at least 0"),
    ("refine", _or_none(_whole(0)), "a whole number of at least 0, or None"),
    ("context_seed", lambda value: _whole(0)(value) and value < 2**64, "a whole number of at least 0, below 2^64"),
    ("ridge kl_factor weight_decay search_stop_nll search_stop_loss", _FROM_0, "a finite number of at least 0"),
    ("clamp", _ABOVE_0, "a finite number above 0"),
    ("search_rate", _or_none(_ABOVE_0), "a finite number above 0, or None"),
    ("lam mu", _or_none(_FROM_0), "a finite number of at least 0, or None to calibrate it"),
    (
        "context_prefixes",
        lambda value: _all(_text)(value) and value[:1] == ("",),
        "texts, at least one; the first must be '', the bare prompt",
    ),
    (
        "kl_prompts",
        _all(lambda value: _text(value) and value.count("{}") == 1),
        "texts with one '{}' in each, where the subject stands",
    ),
)


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Settings of an `Editor`. Of several values a list is taken as a tuple.

    Attributes:
        layers: blocks whose MLP output projection is edited; None takes the published ones for a
            model whose shape is recognized (`presets`), for any other model the layers from an eighth to a quarter of
            the depth, or the last seven up to a quarter if these are more (2 to 8 of 32).
        layer_module: dotted name of the model's list of blocks, where it is not recognised.
        projection_module: dotted name of the projection within a block, where it is not recognised.
        batch_size: edits written at once.
        fact_token: the token at which the model is edited.
        rule: how a batch becomes a change of the weights: `rls`, or one of the rules that it is compared with, see
            `rlsedit_fast.baselines`. They are given the same keys, values and priors (of which `mu^2` is the field's
            moment weight); they take no edit back.
        rule_options: settings of the rule by name, where it has any.
        norm_anchor: whether each value is scaled to a reference norm of the unedited model, here the mean norm of the
            values of the first search: norm-anchor scaling (Liu et al. 2026, arXiv 2602.02543), under any rule.
        key_rows: rows that an edit has in a layer's least-squares problem: `contexts` gives each of its contexts a row
            with its own key and a part of its weight, so that the edit holds in each of them; `mean` gives it one row
            with the mean key, as published. None is `contexts` for `rls` and `mean` for other rules.
        bare_weight: share of an edit's weight that the row of its bare prompt has; the other contexts have equal parts
            of the rest.
        refine: rounds of refinement. An edit whose target is not ranked first at every token of the bare prompt is
            searched again in the edited model, and its value is moved by the difference. Checked are the edits of a
            batch once it is written, all edits of a call of several batches at its end, and then as many earlier edits
            as the call made, drawn at random. Requires `rls` and stored keys. None is 2 where these are given, else 0.
        values: how the wanted hidden states are found: `search` is gradient descent until the target is said;
            `gradient` a single step from one forward and backward pass, far faster and far less often enough.
        adherence: share of each wanted change that is to arrive at the edited state, measured in the model. Finds mu
            and lam from the first edits; later batches ask for more where a crowded layer would realize less. The
            search leaves a margin, so that most edits are stated with part of their change; those that are not are
            refined. On SmolLM2, 0.95 moves text twice as far as 0.8 (bench/results/real/writes-smollm2.json).
        lam: how firmly the weight itself is held; a number wins over `adherence`.
        mu: how firmly the anchors are held; a number wins over `adherence`.
        ridge: lam^2 as a share of mu^2 times the mean diagonal of the anchor moment, where lam is calibrated.
        delay: pending rows of each layer's state before they are folded into it.
        context_prefixes: texts put before a prompt while its value is searched and written; see `key_rows`.
        context_samples: how many more prefixes the model itself writes when the editor is made, which then stand among
            `Editor.config.context_prefixes`. The published settings sample twenty.
        context_tokens: most tokens of such a prefix.
        context_seed: of these.
        search_ahead: edits of one call whose values are searched together, where that is more than a batch; None
            searches batch by batch. Batches are then written one after the other towards the states that were found,
            as the edits of one batch of that size are. A batch about a subject that another one or an active edit is
            about has its values searched when it comes.
        search_at_once: most edits that go through the search together; None takes as many as a device has memory for,
            found by halving when it runs out. It changes what the search takes, not what it finds.
        search_memory: bytes that a search may take beyond the model, about; where given, at most as many edits go
            through it together as were measured to fit.
        search_descent: how the search goes downhill: `constrained` (to where the target is likely enough, as low in
            the KL term as can be), `normalized` (steps of equal length along the gradient of the published loss) or
            `adam`, as published.
        search_rate: longest step relative to the hidden state for `constrained`, length of the first one for
            `normalized`, the learning rate for `adam`; None takes 0.11, 0.09 and 0.1.
            With `values="gradient"` it is the length of the change relative to the hidden state, 0.6.
        search_steps: most steps of the value search.
        search_stop: when a request leaves the search: `nll`, when in every context its target's tokens are ranked
            first and their mean NLL is at most `search_stop_nll`; `rank`, when they have been ranked first at
            `search_stop_steps` looks in a row; `loss`, as published, when the sum of all terms is below
            `search_stop_loss`, which the clamp may well keep from ever happening.
        search_stop_nll: nats.
        search_stop_steps: looks in a row.
        search_stop_loss: nats.
        unconverged: what becomes of an edit that has not reached the stopping rule after `search_steps` (under `loss`:
            and whose target's tokens are not ranked first): `keep` makes
            it all the same, `skip` leaves it out (its record's state is `skipped`, and an edit that it was to replace
            stays; of several that share a value the worst is left out first), `raise` refuses its batch.
        clamp: largest norm of the change of a hidden state, relative to that hidden state.
        kl_factor: weight of KL(before || after) on `kl_prompts`; 0 leaves the term out. The constrained descent weighs
            nothing, so that for it any number above 0 is the same, but in the sum that `search_stop="loss"` looks at.
        kl_prompts: prompts about the subject (`{}`) whose next-token distribution is to stay. One whose present
            answer starts as the edited prompt's own does asks the edited question, and is left out for that edit.
        weight_decay: weight of `||delta|| / ||h||^2`; for the constrained descent only in that same sum.
        same_subject: edits of one subject have nearly one key. With `joint` those that are active share one value,
            searched for all of them whenever one comes or goes, and an edit that asks what an active one asks takes
            its place. With `separate` each is written as if it were alone, and they wear one another down.
        keys: what is kept of each edit, in memory and in a store, to take it back exactly and to rebuild the layers:
            its keys and values, (d_k + d_v) numbers a layer. `full` keeps them in the solver's dtype; `fp16` in half of
            that, and writes the edit with the keys and values so rounded (by up to 2^-11 of each), so that taking it
            back is as exact. With None nothing is kept: undo, replace, and an edit about a subject that has others
            (unless `same_subject` is `separate`) are refused.
    """

    layers: tuple[int, ...] | None = None
    layer_module: str | None = None
    projection_module: str | None = None
    batch_size: int = 100
    fact_token: FactToken = "subject_last"
    rule: str = baselines.RECURSIVE
    rule_options: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    norm_anchor: bool = False
    key_rows: KeyRows | None = None
    bare_weight: float = 0.5
    refine: int | None = None
    values: Values = "search"
    adherence: float = 0.8
    lam: float | None = None
    mu: float | None = None
    ridge: float = 0.01
    delay: int = DEFAULT_DELAY
    context_prefixes: tuple[str, ...] = ("", "The report says this.", "As everyone knows:")
    context_samples: int = 0
    context_tokens: int = 10
    context_seed: int = 0
    search_ahead: int | None = None
    search_at_once: int | None = None
    search_memory: int | None = None
    search_descent: Descent = "constrained"
    search_rate: float | None = None
    search_steps: int = 25
    search_stop: Stop = "nll"
    search_stop_nll: float = 0.05
    search_stop_steps: int = 2
    search_stop_loss: float = 0.05
    unconverged: Unconverged = "keep"
    clamp: float = 0.75
    kl_factor: float = 0.0625
    kl_prompts: tuple[str, ...] = ("{} is a",)
    weight_decay: float = 0.5
    same_subject: SameSubject = "joint"
    keys: Keys | None = "full"

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant.

        Raises:
            InputError: naming the field, what was given and what is expected.
        """
        for name in ("layers", "context_prefixes", "kl_prompts"):
            if isinstance(given := getattr(self, name), list | range):
                object.__setattr__(self, name, tuple(given))
        for names, fits, expected in _EXPECTED:
            for name in names.split():
                if not fits(given := getattr(self, name)):
                    raise InputError(f"{name}={given!r}: expected {expected}")
        baselines.make_rule(self.rule, self.rule_options)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raises InputError for settings that exclude one another."""
        if self.rule != baselines.RECURSIVE:
            for name, needed in (("key_rows", "mean"), ("refine", 0)):
                if (given := getattr(self, name)) not in (None, needed):
                    raise InputError(
                        f"{name}={given!r} needs rule={baselines.RECURSIVE!r}, got rule={self.rule!r}; leave {name} out"
                    )
        if self.refine and self.keys is None:
            raise InputError(
                f"refine={self.refine} takes edits out again, and keys=None keeps no rows; set one of them"
            )

    @property
    def effective_key_rows(self) -> KeyRows:
        """`key_rows`, or what None stands for."""
        return self.key_rows or ("contexts" if self.rule == baselines.RECURSIVE else "mean")

    @property
    def effective_refine(self) -> int:
        """`refine`, or what None stands for."""
        if self.refine is not None:
            return self.refine
        return 2 if self.rule == baselines.RECURSIVE and self.keys is not None else 0

    def under(self, rule: str, **changes: Any) -> EditConfig:
        """These settings for a rule: other rules cannot share a value between edits of one subject."""
        apart = {} if rule == baselines.RECURSIVE else {"same_subject": "separate"}
        return replace(self, rule=rule, **{**apart, **changes})

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """The blocks that are edited in a model of `depth` blocks."""
        if self.layers is not None:
            return self.layers
        last = depth // 4
        first = max(1, min(depth // 8, last - _LEAST_LAYERS + 1)) if depth >= 8 else 0
        return tuple(range(first, last + 1))
