"""Names of peft and of MEMIT's hyperparameter files for settings of `EditConfig`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlsedit_fast.editing.settings import Settings
from rlsedit_fast.errors import InputError

_NAMES = {
    "layers_to_transform": ("layers",),
    "v_num_grad_steps": ("search", "steps"),
    "clamp_norm_factor": ("search", "clamp"),
    "v_lr": ("search", "learning_rate"),
    "v_weight_decay": ("search", "loss", "weight_decay"),
    "kl_factor": ("search", "loss", "kl_factor"),
    "mom2_update_weight": ("prior", "mu"),
}
"""Names of peft and of MEMIT's hyperparameter files, and the settings that they stand for."""

_SELECT_ADAM = {"v_lr", "v_weight_decay", "kl_factor"}


def expanded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the names of peft and MEMIT by the settings that they stand for.

    Raises:
        InputError: a setting is given under both names, or `mom2_update_weight` is not a number of at least 0.
    """
    found = {name: value for name, value in settings.items() if name not in _NAMES}
    for name in (name for name in settings if name in _NAMES):
        value, (*groups, last) = settings[name], _NAMES[name]
        if name == "mom2_update_weight":
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise InputError(f"{name}={value!r}: expected a finite number of at least 0")
            value = math.sqrt(value)
        place = _group(found, groups)
        if last in place:
            raise InputError(f"{name} and {'.'.join((*groups, last))} are the same setting; pass one of them")
        place[last] = value
    if _SELECT_ADAM.intersection(settings):
        _group(found, ["search"]).setdefault("optimizer", "adam")
    return found


def _group(settings: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Returns a nested group as a dict that is part of `settings`."""
    for name in names:
        group = settings.get(name, {})
        if isinstance(group, Settings):
            group = {field: getattr(group, field) for field in group.model_fields_set}
        settings[name] = dict(group)
        settings = settings[name]
    return settings
