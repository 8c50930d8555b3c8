"""The base class of settings: validated and immutable, with errors that name the setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rlsedit_fast.editing.config_messages import describe
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
                raise InputError(describe(error, type(self))) from None

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
