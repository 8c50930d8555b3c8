"""The model of an editor without its edits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlsedit_fast.editing import Editor


@contextmanager
def unedited(editor: Editor) -> Iterator[None]:
    """Gives the model its original weights inside the block; afterwards it has the edited ones, bit for bit.

    Nothing is copied: the parameters refer to the original weights, which an editor keeps. The block must not edit.

    Args:
        editor: editor of the model.

    Raises:
        ModelError: a weight was modified by other code.

    Example:
        >>> from rlsedit_fast import Edit, EditConfig, Editor
        >>> from rlsedit_fast.evaluation import unedited
        >>> from rlsedit_fast.models import generate_answers
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
        >>> editor = Editor(model, tokenizer, config=config)
        >>> _ = editor.edit([Edit("{} plays the", "Toze Lado Rekuno", "harp")])
        >>> with unedited(editor):
        ...     print(generate_answers(model, tokenizer, [("Toze Lado Rekuno plays the", "harp")]))
        ['clarinet']
        >>> generate_answers(model, tokenizer, [("Toze Lado Rekuno plays the", "harp")])
        ['harp']
    """
    held = []
    try:
        for change in editor.changes():
            parameter = editor.model.get_parameter(f"{change.name}.weight")
            held.append((parameter, parameter.data))
            parameter.data = change.original.T if change.transposed else change.original
        yield
    finally:
        for parameter, data in held:
            parameter.data = data
