"""The base class of settings: validated and immutable, with errors that name the setting."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rlsedit_fast.errors import InputError

_Self = TypeVar("_Self", bound="Settings")


class Settings(BaseModel):
    """Validated, immutable settings; an invalid value raises InputError that names the setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=False)

    if not TYPE_CHECKING:  # type checkers use the signature that pydantic derives from the fields

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise InputError(_describe(error, type(self))) from None

    def replace(self: _Self, **changes: Any) -> _Self:
        """Returns a copy with changed settings. A dict changes single settings of a group.

        Raises:
            InputError: a setting is unknown or invalid.

        Example:
            >>> from rlsedit_fast import EditConfig
            >>> EditConfig().replace(batch_size=10, prior={"adherence": 0.9}).prior.adherence
            0.9
        """
        values = {name: getattr(self, name) for name in type(self).model_fields}
        for name, value in changes.items():
            group = values.get(name)
            if isinstance(group, Settings) and isinstance(value, Mapping):
                try:
                    value = group.replace(**value)
                except InputError as error:
                    raise InputError(f"{name}: {error.message}", error.hint) from None
            values[name] = value
        return type(self)(**values)


def _describe(error: ValidationError, settings: type[Settings]) -> str:
    """Formats the errors of a validation: name, given value, expected values."""
    return "; ".join(_describe_one(dict(one), settings) for one in error.errors(include_url=False))


def _describe_one(one: dict[str, Any], settings: type[Settings]) -> str:
    name = ".".join(map(str, one["loc"]))
    cause = one.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        group = name in settings.model_fields and isinstance(settings.model_fields[name].default, Settings)
        return f"{name}: {cause}" if group else str(cause)
    if one["type"] == "extra_forbidden":
        return _unknown(name, settings)
    limits = {"greater_than_equal": "a number of at least {ge:g}", "greater_than": "a number above {gt:g}"}
    limits |= {"less_than": "a number below {lt:g}"}
    expected = limits[one["type"]].format(**one["ctx"]) if one["type"] in limits else one["msg"]
    expected = expected.removeprefix("Input should be ")
    return f"{name}={one['input']!r:.80}: expected {expected}"


def _unknown(name: str, settings: type[Settings]) -> str:
    """States that a setting is unknown, and where a setting with this or a similar name is."""
    places: dict[str, str] = {}
    for field, about in settings.model_fields.items():
        places[field] = field
        group = about.default
        if isinstance(group, Settings):
            for inner in type(group).model_fields:
                places.setdefault(inner, f"{field}={{{inner!r}: ...}}")
    if name in places:
        return f"unknown setting {name!r}; it belongs to a group: {places[name]}"
    near = get_close_matches(name, list(places), n=1)
    return f"unknown setting {name!r}; {f'did you mean {places[near[0]]}?' if near else 'see EditConfig'}"
