"""The base class of settings: validated and immutable, with errors that name the setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in one["loc"]).removeprefix(".")
    cause = one.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        group = name in settings.model_fields and isinstance(settings.model_fields[name].default, Settings)
        return f"{name}: {cause}" if group else str(cause)
    if one["type"] == "extra_forbidden":
        return _unknown(name, settings)
    field = settings.model_fields.get(str(one["loc"][0])) if one["loc"] else None
    if one["type"] in ("greater_than", "less_than") and field is not None and _is_fraction(field.metadata):
        expected = "a number above 0 and below 1"
    elif one["type"] in ("tuple_type", "model_type", "dataclass_type"):
        expected = _EXPECTED_LISTS.get(name, f"a dict of settings or a {type(field.default).__name__}" if field else "")
    else:
        expected = _EXPECTED.get(one["type"], one["msg"]).format(**one.get("ctx", {}))
    return f"{name}={one['input']!r:.80}: expected {expected.removeprefix('Input should be ')}"


def _is_fraction(metadata: Sequence[Any]) -> bool:
    return any(getattr(limit, "gt", None) == 0 for limit in metadata) and any(
        getattr(limit, "lt", None) == 1 for limit in metadata
    )


_EXPECTED = {
    "greater_than_equal": "a number of at least {ge:g}",
    "greater_than": "a number above {gt:g}",
    "less_than": "a number below {lt:g}",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "True or False",
    "dict_type": "a dict",
    "mapping_type": "a dict",
}
"""Expected values by pydantic's type of error."""

_EXPECTED_LISTS = {
    "layers": "a list of layer indices such as [4, 5, 6], or None",
    "prefixes": "a list of strings, '' first",
    "kl_prompts": "a list of strings with '{}' in place of the subject",
}


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
