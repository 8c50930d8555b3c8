"""Extension of griffe for the docstrings and types of this package.

- `Example:` is a section of examples, as in Sphinx.
- Every attribute of a class gets its description from the section `Attributes:` of the class.
- Aliases of `Annotated[T, ...]` and `Literal[...]` in the types of attributes are expanded, so that the reference shows
  `int` for `_Count = Annotated[int, Field(ge=1)]`, and the allowed values of a setting.
- Classes of settings have one keyword argument per field.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from griffe import (
    Attribute,
    Class,
    Docstring,
    DocstringSectionKind,
    Expr,
    ExprName,
    ExprSubscript,
    Extension,
    Function,
    Module,
    Parameter,
    ParameterKind,
    Parameters,
)

_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
_SETTINGS = "Settings"
"""Base class of the settings."""


class Docstrings(Extension):
    """Prepares the docstrings and types of a package."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Visits all objects of the package."""
        _prepare(pkg)


def _prepare(scope: Module | Class) -> None:
    for member in scope.members.values():
        if member.is_alias:
            continue
        if member.docstring is not None:
            member.docstring.value = _EXAMPLE.sub(r"\1Examples:", member.docstring.value)
        if isinstance(member, Class):
            _prepare_class(member)
        if isinstance(member, Module | Class):
            _prepare(member)


def _prepare_class(owner: Class) -> None:
    attributes = {name: one for name, one in owner.members.items() if isinstance(one, Attribute)}
    for attribute in attributes.values():
        attribute.annotation = _expanded(attribute.annotation)
    if any(str(base) == _SETTINGS for base in owner.bases):
        settings = [
            Parameter(name, annotation=one.annotation, default=one.value, kind=ParameterKind.keyword_only)
            for name, one in attributes.items()
            if one.annotation is not None and "property" not in one.labels
        ]
        first = Parameter("self", kind=ParameterKind.positional_or_keyword)
        owner.set_member("__init__", Function("__init__", parameters=Parameters(first, *settings)))
    if owner.docstring is None:
        return
    for section in owner.docstring.parse("google", warnings=False):
        if section.kind is DocstringSectionKind.attributes:
            for item in section.value:
                known = attributes.get(item.name)
                if known is not None and known.docstring is None:
                    known.docstring = Docstring(item.description, parent=known)


def _expanded(annotation: Any) -> Any:
    """Returns an annotation in which aliases of `Annotated` and `Literal` are replaced by what they stand for."""
    if isinstance(annotation, ExprName):
        alias = _alias(annotation)
        if isinstance(alias, ExprSubscript) and str(alias.left) == "Annotated":
            return _expanded(alias.slice.elements[0])
        return alias if isinstance(alias, ExprSubscript) and str(alias.left) == "Literal" else annotation
    if isinstance(annotation, Expr):
        for part in fields(annotation):
            setattr(annotation, part.name, _expanded(getattr(annotation, part.name)))
    return [_expanded(one) for one in annotation] if isinstance(annotation, list) else annotation


def _alias(name: ExprName) -> Any:
    """Returns the value that a name is assigned in this package, or None."""
    try:
        found = name.parent.modules_collection[name.canonical_path]
    except (AttributeError, KeyError):
        return None
    return found.value if isinstance(found, Attribute) else None
