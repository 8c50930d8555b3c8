"""Settings of an `Editor`, in groups."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rlsedit_fast import baselines
from rlsedit_fast.baselines.experts import Carriers
from rlsedit_fast.editing.aliases import expanded
from rlsedit_fast.editing.presets import published
from rlsedit_fast.editing.settings import Settings
from rlsedit_fast.errors import InputError
from rlsedit_fast.files import read_json
from rlsedit_fast.models.facts import ChatForm
from rlsedit_fast.models.tokens import FactToken
from rlsedit_fast.rls.state import DEFAULT_DELAY

KeyRows = Literal["contexts", "mean"]
Optimizer = Literal["constrained", "normalized", "adam"]
Stop = Literal["nll", "rank", "loss"]
SameSubject = Literal["joint", "separate"]
Unconverged = Literal["keep", "skip", "raise"]
OnOverlap = Literal["keep", "warn", "skip", "raise"]
StoredRows = Literal["full", "fp16"]
Experts = Literal["exact", "separate", "split", "shared", "top"]

LEARNING_RATES: dict[Optimizer, float] = {"constrained": 0.11, "normalized": 0.09, "adam": 0.1}
"""Default learning rates of the value search."""

FILE_NAME = "edit_config.json"
"""Name of the file that `EditConfig.save_pretrained` writes."""

_LEAST_LAYERS = 7  # by default; fewer layers fill up with fewer edits (docs/benchmarks.md)


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | range) else value


def _check_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers or len(set(layers)) != len(layers):
        raise InputError(f"layers={layers}: expected at least one layer index, each given once; or None")
    return layers


def _check_prefixes(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    if prefixes[:1] != ("",):
        raise InputError(f"prefixes={prefixes!r:.80}: expected '' first, which stands for the bare prompt")
    return prefixes


def _check_kl_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [prompt for prompt in prompts if prompt.count("{}") != 1]:
        raise InputError(f"kl_prompts: {wrong[0]!r:.80}: expected '{{}}' once, in place of the subject")
    return prompts


_Count = Annotated[int, Field(ge=1)]
_Index = Annotated[int, Field(ge=0)]
_Seed = Annotated[int, Field(ge=0, lt=2**64)]
_Fraction = Annotated[float, Field(gt=0, lt=1)]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Layers = Annotated[tuple[_Index, ...], BeforeValidator(_to_tuple), AfterValidator(_check_layers)]
_Chat = Annotated[tuple[ChatForm, ...], BeforeValidator(_to_tuple)]
_Prefixes = Annotated[tuple[str, ...], BeforeValidator(_to_tuple), AfterValidator(_check_prefixes)]
_KLPrompts = Annotated[tuple[str, ...], BeforeValidator(_to_tuple), AfterValidator(_check_kl_prompts)]


CHAT_FORMS: tuple[ChatForm, ...] = ("answer", "direct")
"""Default chat contexts of an edit, if the tokenizer has a chat template."""


class ContextConfig(Settings):
    """Contexts of an edit: prefixes before the prompt, and the prompt in a chat. It is searched and written for each.

    Attributes:
        prefixes: texts placed before the prompt. The first is `""`, the bare prompt.
        chat: the prompt in a chat, see `models.encode_in_chat`: `answer`, as the start of the answer; `message`, as the
            message of the user, repeated by the answer; `direct`, as the message, and the target is the answer. None:
            `answer` and `direct` if the tokenizer has a chat template and `rows` is `contexts`; `Editor.config`
            contains what is used. `()`: no chat.
        samples: number of additional prefixes that the model generates when the editor is created. They are added to
            `Editor.config.contexts.prefixes`. The published settings of MEMIT sample twenty.
        sample_tokens: maximum number of tokens of a sampled prefix.
        seed: random seed of the samples.
        rows: rows of an edit in the least-squares problem of a layer. `contexts`: one row per context, with the key of
            that context and a part of the edit's weight, so that the edit holds in each context. `mean`: one row with
            the mean key, as published. None: `contexts` for the rule `rls`, `mean` for other rules.
        bare_weight: fraction of the edit's weight that the row of the bare prompt gets; the other contexts share the
            rest equally. Without effect if an edit has one row.

    Example:
        >>> from rlsedit_fast import ContextConfig
        >>> ContextConfig(prefixes=["", "In short:"]).prefixes
        ('', 'In short:')
    """

    prefixes: _Prefixes = ("", "The report says this.", "As everyone knows:")
    samples: _Index = 0
    sample_tokens: _Count = 10
    seed: _Seed = 0
    rows: KeyRows | None = None
    bare_weight: _Fraction = 0.5
    chat: _Chat | None = None

    @property
    def count(self) -> int:
        """Number of contexts of an edit; with `chat=None`, that of a model without a chat template."""
        return len(self.prefixes) + len(self.chat or ())


class PriorConfig(Settings):
    """Strength of the penalties on the weight change and on changed outputs on the anchors.

    Attributes:
        adherence: fraction of each target change that should arrive at the edited hidden state, measured in the model.
            It determines mu and lam from a pilot batch; later batches compensate for crowded layers. The value search
            leaves a margin, so that most edits succeed with a part of their change; the others are refined. On
            SmolLM2-135M, 0.95 changes other text twice as much as 0.8 (bench/results/real/writes-smollm2.json).
        lam: weight of `||W - W0||_F`; a number overrides `adherence`.
        mu: weight of `||K0 (W - W0)^T||_F` over the anchors; a number overrides `adherence`. `mu^2` is MEMIT's
            `mom2_update_weight`.
        ridge: if lam is calibrated, `lam^2` relative to `mu^2` times the mean diagonal of the anchor moment.

    Example:
        >>> from rlsedit_fast import PriorConfig
        >>> PriorConfig(adherence=0.9).mu is None
        True
    """

    adherence: _Fraction = 0.8
    lam: _NonNegative | None = None
    mu: _NonNegative | None = None
    ridge: _NonNegative = 0.01


class LossConfig(Settings):
    """The published loss of MEMIT's value search, minimized by `adam` and `normalized`.

    Attributes:
        kl_factor: factor of KL(before || after) at the end of the KL prompts.
        weight_decay: factor of `||delta|| / ||h||^2`.

    Example:
        >>> from rlsedit_fast import LossConfig
        >>> LossConfig().kl_factor
        0.0625
    """

    kl_factor: _NonNegative = 0.0625
    weight_decay: _NonNegative = 0.5


class ValueSearchConfig(Settings):
    """Search of the value of an edit: the hidden state at the edited token with which the model states the target.

    Attributes:
        optimizer: `constrained` moves to the nearest point where the target is likely enough and, among such points,
            down the KL term. `normalized` takes gradient steps of equal length on the published loss; `adam` minimizes
            the published loss as MEMIT does.
        learning_rate: longest step relative to the hidden state (`constrained`), length of the first step relative to
            the hidden state (`normalized`), or Adam's learning rate. None: 0.11, 0.09 and 0.1.
        steps: maximum number of steps for a target of up to 4 tokens; in proportion for longer ones, at most four times
            as many. With other optimizers than `constrained`, the maximum for all targets.
        stop: when the search of an edit ends. `nll`: all target tokens are ranked first in every context, with a mean
            NLL of at most `stop_nll`. `rank`: they were ranked first in `stop_evaluations` evaluations in a row.
            `loss`: the published loss is below `stop_loss`, which the clamp may prevent.
        stop_nll: nats.
        stop_evaluations: number of evaluations.
        stop_loss: nats.
        clamp: largest norm of the change, relative to the hidden state.
        kl_prompts: prompts about the subject (`{}`) whose next-token distribution is preserved; `()` for none. A prompt
            whose answer starts like the one of the edited prompt is not used for that edit.
        loss: the published loss; only for `adam` and `normalized`.
        ahead: number of edits of a call that are searched together, if more than a batch. The batches are then written
            one after the other. A batch that shares a subject with another one or with an active edit is searched when
            it is written.
        at_once: maximum number of edits in one forward pass of the search. None: as many as fit into device memory,
            found by halving after an out-of-memory error. Results do not depend on it.
        memory: approximate bytes that the search may use in addition to the model; limits the number of edits in one
            forward pass.

    Example:
        >>> from rlsedit_fast import ValueSearchConfig
        >>> ValueSearchConfig(optimizer="adam").effective_learning_rate
        0.1
    """

    optimizer: Optimizer = "constrained"
    learning_rate: _Positive | None = None
    steps: _Count = 25
    stop: Stop = "nll"
    stop_nll: _NonNegative = 0.05
    stop_evaluations: _Count = 2
    stop_loss: _NonNegative = 0.05
    clamp: _Positive = 0.75
    kl_prompts: _KLPrompts = ("{} is a",)
    loss: LossConfig = LossConfig()
    ahead: _Count | None = None
    at_once: _Count | None = None
    memory: _Count | None = None

    @model_validator(mode="after")
    def _check_optimizer(self) -> ValueSearchConfig:
        if self.optimizer == "constrained" and (self.stop == "loss" or self.loss != LossConfig()):
            given = "stop='loss'" if self.stop == "loss" else f"loss={self.loss!r}"
            raise InputError(f"{given} has no meaning for optimizer='constrained'; set optimizer='adam'")
        return self

    @property
    def effective_kl_prompts(self) -> tuple[str, ...]:
        """`kl_prompts`, or none if the loss gives them no weight."""
        return self.kl_prompts if self.loss.kl_factor else ()

    @property
    def effective_learning_rate(self) -> float:
        """`learning_rate`, or the default of the optimizer."""
        return self.learning_rate or LEARNING_RATES[self.optimizer]


class EditConfig(Settings):
    """Settings of an `Editor`.

    Groups accept an object or a dict. Some names of peft and of MEMIT's hyperparameter files are accepted as well:
    `layers_to_transform` (`layers`), `v_num_grad_steps` (`search.steps`), `clamp_norm_factor` (`search.clamp`),
    `mom2_update_weight` (`prior.mu` squared); and `v_lr`, `v_weight_decay` and `kl_factor`, which select
    `search.optimizer="adam"` unless another one is given.

    Attributes:
        layers: indices of the decoder layers whose MLP output projection is edited. None: the published ones for a
            model of a known architecture and shape (`presets`); for other models the layers from an eighth to a quarter
            of the depth, or the last seven up to a quarter if these are more (2 to 8 of 32).
        layer_module: dotted name of the list of decoder layers, for an unknown architecture.
        projection_module: dotted name of the projection within a decoder layer, for an unknown architecture.
        fact_token: the token whose hidden state is edited.
        batch_size: number of edits written at once.
        contexts: contexts of an edit.
        prior: strength of the penalties.
        search: value search.
        rule: editing method: `rls`, or a baseline of `rlsedit_fast.baselines`, which gets the same keys, values and
            priors and cannot undo edits.
        rule_options: options of the rule, by name.
        norm_anchor: scale each value to the mean norm of the values of the first search (norm-anchor scaling, Liu et
            al. 2026, arXiv 2602.02543); for any rule.
        same_subject: edits of one subject have nearly the same key. `joint`: active edits of one subject share one
            value, searched for all of them whenever one is added or removed; an edit with the prompt of an active one
            replaces it. `separate`: each edit is written independently, and they weaken each other.
        unconverged: what happens to an edit whose search does not converge within `search.steps`. `keep`: it is written
            nevertheless. `skip`: it is not written, its record has the state `skipped`, and an edit that it would
            replace stays; of several edits that share a value the worst is skipped first. `raise`: its batch fails.
        overlap: what happens to an edit whose key active edits already use, so that it repeats or contradicts one of
            them although their texts differ (see `Editor.overlaps`). `keep`: it is written, and its record has the used
            share. `warn`: the same, with a warning. `skip`: it is not written, its record has the state `skipped`.
            `raise`: its batch fails.
        overlap_share: used share of the key above which an edit overlaps.
        refine: rounds of refinement. An edit whose target is not ranked first after the write, at the bare prompt or in
            its contexts in a chat, is searched again in the edited model, and its value is moved by the difference. The
            edits of a batch are checked when it is written; at the end of a call of several batches all of its edits
            are checked, and as many earlier edits as the call added, drawn at random. Requires `rls` and stored rows.
            None: 2 if these are given, otherwise 0.
        measure_chat: also ask each prompt as the user message of a chat, before and after its batch, if the tokenizer
            has a chat template; see `EditRecord.chat_answer`. Two answers are generated for each edit.
        stored_rows: keys and values of each edit that are kept in memory and in the store, for exact removal and for
            rebuilding the layers: `d_k + d_v` numbers per row and layer. `full`: in the dtype of the solver. `fp16`:
            half of that; the edit is written with the rounded keys and values (relative error 2^-11), so removal is
            equally exact. None: nothing is kept; undo, replace, and a second edit of one subject (with
            `same_subject="joint"`) raise an error.
        experts: solver of a mixture of experts. `exact`: the least-squares problem over all edits, with exact undo;
            memory and time of a batch grow with the number of active edits. `separate`: one covariance per expert, so
            that they do not grow. Earlier edits are then protected only approximately, and an undo applies the
            remaining edits again. The baselines edit each expert of a token separately: `split`, all of them with equal
            parts of the change; `shared`, the shared expert only; `top`, one expert only.
        delay: number of rows that a layer collects before they are folded into its inverse, see `RLSState`.
        halve_after: number of later edits after which the weight of an edit is halved, exactly; again after twice, four
            times, ... as many. Recent edits then count more where edits compete, and the prior keeps its weight. It
            takes effect when a later batch is written. Requires `rls`, stored rows and `experts="exact"`. None: all
            edits keep their weight.

    Raises:
        InputError: a setting is unknown or invalid, or settings exclude each other.

    Example:
        >>> from rlsedit_fast import EditConfig
        >>> config = EditConfig(layers=range(3, 8), prior={"adherence": 0.9})
        >>> config.layers, config.search.steps
        ((3, 4, 5, 6, 7), 25)
        >>> EditConfig(layers_to_transform=[4], mom2_update_weight=16).prior.mu
        4.0
    """

    layers: _Layers | None = None
    layer_module: str | None = None
    projection_module: str | None = None
    fact_token: FactToken = "subject_last"
    batch_size: _Count = 100
    contexts: ContextConfig = ContextConfig()
    prior: PriorConfig = PriorConfig()
    search: ValueSearchConfig = ValueSearchConfig()
    rule: str = baselines.RECURSIVE
    rule_options: Mapping[str, Any] = Field(default_factory=dict)
    norm_anchor: bool = False
    same_subject: SameSubject = "joint"
    unconverged: Unconverged = "keep"
    overlap: OnOverlap = "keep"
    overlap_share: _Fraction = 0.9
    refine: _Index | None = None
    measure_chat: bool = False
    stored_rows: StoredRows | None = "full"
    experts: Experts = "exact"
    delay: _Index = DEFAULT_DELAY
    halve_after: _Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_names(cls, settings: Any) -> Any:
        return expanded(settings) if isinstance(settings, Mapping) else settings

    @model_validator(mode="after")
    def _check_combinations(self) -> EditConfig:
        baselines.make_rule(self.rule, self.rule_options)
        if self.rule != baselines.RECURSIVE:
            for name, given, allowed in (
                ("contexts.rows", self.contexts.rows, self.effective_rows if self._by_expert else "mean"),
                ("refine", self.refine, 0),
            ):
                if given not in (None, allowed):
                    raise InputError(
                        f"{name}={given!r} requires rule={baselines.RECURSIVE!r}, got rule={self.rule!r}; omit {name}"
                    )
        if self._by_expert and self.rule == baselines.RECURSIVE:
            raise InputError(
                f"experts={self.experts!r} requires another rule than {self.rule!r}; use experts='exact' or 'separate'"
            )
        if self.halve_after is not None:
            for name, wrong, needed in (
                ("rule", self.rule != baselines.RECURSIVE, baselines.RECURSIVE),
                ("stored_rows", self.stored_rows is None, "full"),
                ("experts", self.experts != "exact", "exact"),
            ):
                if wrong:
                    given = getattr(self, name)
                    raise InputError(
                        f"halve_after={self.halve_after} requires {name}={needed!r}, got {name}={given!r}; omit "
                        "halve_after"
                    )
        if self.refine and self.stored_rows is None:
            raise InputError(
                f"refine={self.refine} requires stored rows, and stored_rows is None; set stored_rows='full' or "
                "refine=0"
            )
        return self

    def __hash__(self) -> int:
        """Hashes all settings but `rule_options`, which is a dict."""
        return hash(tuple(getattr(self, name) for name in type(self).model_fields if name != "rule_options"))

    @property
    def effective_rows(self) -> KeyRows:
        """`contexts.rows`, or its default for the rule; contexts have experts of their own."""
        several = self.rule == baselines.RECURSIVE or self._by_expert
        return self.contexts.rows or ("contexts" if several else "mean")

    @property
    def _by_expert(self) -> bool:
        """Whether a baseline edits the experts of a mixture separately."""
        return self.experts in get_args(Carriers)

    @property
    def effective_refine(self) -> int:
        """`refine`, or its default."""
        if self.refine is not None:
            return self.refine
        return 2 if self.rule == baselines.RECURSIVE and self.stored_rows is not None else 0

    @classmethod
    def from_store(cls, settings: Mapping[str, Any]) -> EditConfig:
        """Returns the settings of a store; one without `contexts.chat` has no chat contexts."""
        contexts = {"chat": ()} | dict(settings.get("contexts", {}))
        return cls(**dict(settings) | {"contexts": contexts})

    def for_rule(self, rule: str, **changes: Any) -> EditConfig:
        """Returns these settings for another rule, with `changes` as in `replace`.

        Rules other than `rls` cannot share a value between edits of one subject, so `same_subject` becomes `separate`.
        """
        separate = {} if rule == baselines.RECURSIVE else {"same_subject": "separate"}
        return self.replace(**{"rule": rule, **separate, **changes})

    def layers_for(self, depth: int) -> tuple[int, ...]:
        """Returns the layers to edit in a model of `depth` decoder layers."""
        if self.layers is not None:
            return self.layers
        last = depth // 4
        first = max(1, min(depth // 8, last - _LEAST_LAYERS + 1)) if depth >= 8 else 0
        return tuple(range(first, last + 1))

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as nested, JSON-serializable dicts."""
        return self.model_dump(mode="json")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> EditConfig:
        """Returns the published settings for a model, changed as in `replace`.

        Args:
            name: a name in `rlsedit_fast.editing.presets.PRESETS`, or `generic` for the defaults.
            **changes: settings to change.

        Raises:
            InputError: the preset or a setting is unknown, or a value is invalid.

        Example:
            >>> from rlsedit_fast import EditConfig
            >>> EditConfig.from_preset("gpt2-xl", batch_size=10).layers
            (13, 14, 15, 16, 17)
        """
        return cls(**published(name)).replace(**changes)

    def replace(self, **changes: Any) -> EditConfig:
        """See `Settings.replace`; accepts the names of peft and MEMIT as well."""
        return super().replace(**expanded(changes))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `edit_config.json` into a folder, which is created if it does not exist."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> EditConfig:
        """Reads `edit_config.json` of a folder, or a JSON file.

        Raises:
            InputError: the file cannot be read, or a setting is unknown or invalid.
        """
        return cls(**load_settings(Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)))


def load_settings(file: Path, named: str | None = None) -> dict[str, Any]:
    """Reads a JSON file with settings of `EditConfig` and checks them.

    Args:
        file: the file.
        named: name of the file in error messages; by default its path.

    Returns:
        The settings that the file contains; names of peft and MEMIT are replaced by those of `EditConfig`.

    Raises:
        InputError: the file cannot be read, or a setting is unknown or invalid.
    """
    named, expected = named or str(file), "a JSON object with fields of EditConfig"
    settings = read_json(file, expected, named)
    if not isinstance(settings, dict):
        raise InputError(f"{named}: expected {expected}, got {settings!r:.40}")
    try:
        EditConfig(**settings)
    except InputError as error:
        raise InputError(f"{named}: {error.message}", error.hint) from None
    return expanded(settings)
