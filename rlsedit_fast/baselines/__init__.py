"""Baselines: published update rules that RLS is compared with.

Each rule has its own module with its source. All rules receive the same keys, innovations, exact weight and prior, so
that a comparison differs only in the rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from rlsedit_fast.baselines.alphaedit import AlphaEdit
from rlsedit_fast.baselines.base import Batch, Rule
from rlsedit_fast.baselines.emmet import EMMET
from rlsedit_fast.baselines.experts import ExpertRuleLayer
from rlsedit_fast.baselines.fine_tuning import BoundedFineTuning, FineTuning
from rlsedit_fast.baselines.history import HistoryMEMIT
from rlsedit_fast.baselines.layer import LayerState, RuleLayer, RulePanel
from rlsedit_fast.baselines.memit import MEMIT
from rlsedit_fast.baselines.nse import NSE
from rlsedit_fast.baselines.prune import PRUNE
from rlsedit_fast.baselines.rect import RECT
from rlsedit_fast.baselines.rome import ROME
from rlsedit_fast.baselines.ultraedit import UltraEdit
from rlsedit_fast.errors import InputError, did_you_mean
from rlsedit_fast.rls.columns import WHOLE, Columns

if TYPE_CHECKING:
    from torch import Tensor

    from rlsedit_fast.rls import Prior, Saved

__all__ = ["BASELINES", "EMMET", "MEMIT", "NSE", "PRUNE", "RECT", "RECURSIVE", "ROME", "RULES"]
__all__ += ["AlphaEdit", "Batch", "BoundedFineTuning", "FineTuning", "HistoryMEMIT", "LayerState", "Rule", "RuleLayer"]
__all__ += ["ExpertRuleLayer", "RulePanel", "UltraEdit", "make_layer", "make_rule"]

RECURSIVE = "rls"
"""Name of this package's own rule, whose layer is an `RLSState`.

Example:
    >>> from rlsedit_fast.baselines import BASELINES, RECURSIVE
    >>> RECURSIVE, RECURSIVE in BASELINES
    ('rls', False)
"""

BASELINES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        FineTuning,
        BoundedFineTuning,
        ROME,
        MEMIT,
        HistoryMEMIT,
        PRUNE,
        RECT,
        EMMET,
        AlphaEdit,
        NSE,
        UltraEdit,
    )
}
"""The baselines by name.

Example:
    >>> from rlsedit_fast.baselines import BASELINES
    >>> BASELINES["memit"]
    <class 'rlsedit_fast.baselines.memit.MEMIT'>
"""

RULES: tuple[str, ...] = (RECURSIVE, *BASELINES)
"""Names of all rules.

Example:
    >>> from rlsedit_fast.baselines import RULES
    >>> RULES[0], len(RULES)
    ('rls', 12)
"""


_EXPECTED: dict[Any, str] = {int: "an integer", float: "a number", float | None: "a number or None"}
"""Description of the allowed values of an option, by its type."""


def _option_types(rule: type[Rule]) -> dict[str, Any]:
    """Returns the types of a rule's options by name."""
    hints = get_type_hints(rule)
    return {field.name: hints[field.name] for field in fields(rule)}  # type: ignore[arg-type]


def make_rule(name: str, options: Mapping[str, Any]) -> Rule | None:
    """Creates a rule from its name and options.

    Args:
        name: name of the rule, one of `RULES`.
        options: options of the rule by name.

    Returns:
        The rule, or None for `rls`, which has no options here.

    Raises:
        InputError: the rule or an option is unknown, or a value is invalid.

    Example:
        >>> from rlsedit_fast.baselines import make_rule
        >>> make_rule("rect", {"share": 0.2})
        RECT(share=0.2)
    """
    if name not in RULES:
        raise InputError(
            f"rule={name!r}: expected {RECURSIVE}, or a rule that cannot undo edits: {', '.join(BASELINES)}"
            f"{did_you_mean(name, RULES)}"
        )
    if not isinstance(options, Mapping):
        raise InputError(f"rule_options={options!r}: expected a mapping of options for rule {name!r}")
    known = _option_types(BASELINES[name]) if name in BASELINES else {}
    if unknown := sorted(str(key) for key in options if key not in known):
        raise InputError(
            f"rule_options: rule {name!r} has no option {', '.join(unknown)}; its options are "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    wrong = [
        f"{key}={value!r}, expected {_EXPECTED[known[key]]}"
        for key, value in options.items()
        if isinstance(value, bool) or not isinstance(value, known[key] | int)  # an int is a valid float
    ]
    if wrong:
        raise InputError(f"rule_options: {'; '.join(wrong)}")
    return BASELINES[name](**options) if name in BASELINES else None


def make_layer(
    name: str,
    options: Mapping[str, Any],
    weight: Tensor,
    prior: Prior,
    *,
    delay: int,
    label: str,
    saved: Saved | None = None,
    columns: Columns = WHOLE,
) -> LayerState:
    """Creates a layer with a rule; the weight is updated in place.

    Args:
        name: name of the rule, one of `RULES`.
        options: options of the rule by name.
        weight: `W0 [d_v, d_k]`, any floating dtype.
        prior: prior of the layer.
        delay: see `RLSState`; the baselines ignore it.
        label: name of the layer, for error messages.
        saved: saved contents of an `RLSState` to continue from; the baselines cannot be saved.
        columns: the columns of the weight that this process holds.

    Returns:
        An `RLSState` for `rls`, else a `RuleLayer`.

    Raises:
        InputError: the rule, an option or the weight is invalid.
        PriorError: the rule does not support the prior.

    Example:
        >>> import torch
        >>> from rlsedit_fast.baselines import make_layer
        >>> from rlsedit_fast.rls import Prior
        >>> weight = torch.zeros(1, 3)
        >>> layer = make_layer("memit", {}, weight, Prior(lam=1.0), delay=0, label="layer 0")
        >>> panel = layer.project(torch.ones(1, 3))
        >>> _ = layer.update_projected(panel, torch.tensor([[4.0]]))
        >>> weight
        tensor([[1., 1., 1.]])
    """
    from rlsedit_fast.rls import RLSState

    rule = make_rule(name, options)
    if rule is None:
        return RLSState(weight, prior, delay=delay, name=label, in_place=True, saved=saved, columns=columns)
    if columns.ranks > 1:
        raise InputError(f"rule={name!r} does not edit a weight that several processes hold; use rule={RECURSIVE!r}")
    return RuleLayer(weight, prior, rule, name=label, in_place=True)
