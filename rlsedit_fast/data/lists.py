"""Edits from parallel lists in the style of EasyEdit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.errors import InputError

Texts = Sequence[str | Sequence[str] | None]
"""One string, a list of strings, or None per edit."""


def edits_from_lists(
    prompts: Sequence[str],
    *,
    target_new: Sequence[str],
    subject: Sequence[str],
    ground_truth: Sequence[str | None] | None = None,
    rephrase_prompts: Texts | None = None,
    locality_prompts: Texts | None = None,
    locality_inputs: Mapping[str, Mapping[str, Texts]] | None = None,
) -> list[Edit]:
    """Builds edits from the keyword lists of EasyEdit's `BaseEditor.edit`, with one entry per edit in each list.

    Args:
        prompts: prompts with `{}` in place of the subject, or containing the subject.
        target_new: new targets.
        subject: subjects.
        ground_truth: current answers; only the length is checked, since editing does not use them.
        rephrase_prompts: paraphrases of the prompts, for evaluation.
        locality_prompts: prompts about other subjects, for evaluation.
        locality_inputs: locality prompts in EasyEdit's layout,
            `{"neighborhood": {"prompt": [...], "ground_truth": [...]}}`; the prompts of all names are used, their
            `ground_truth` is not.

    Returns:
        One edit per entry.

    Raises:
        InputError: the lengths differ, or an entry is not a string.

    Example:
        >>> from rlsedit_fast import edits_from_lists
        >>> edits_from_lists(["{} lives in"], subject=["Ann"], target_new=["Rome"])[0].target
        'Rome'
    """
    lists: dict[str, Sequence[object]] = {"prompts": prompts, "target_new": target_new, "subject": subject}
    optional: dict[str, Sequence[object] | None] = {
        "ground_truth": ground_truth,
        "rephrase_prompts": rephrase_prompts,
        "locality_prompts": locality_prompts,
    }
    lists |= {name: values for name, values in optional.items() if values is not None}
    nearby = [] if locality_prompts is None else [("locality_prompts", locality_prompts)]
    for name, part in (locality_inputs or {}).items():
        if not isinstance(part, Mapping) or "prompt" not in part:
            raise InputError(f"locality_inputs[{name!r}]: expected a dict with a list 'prompt', got {part!r}")
        label = f"locality_inputs[{name!r}]['prompt']"
        lists[label] = part["prompt"]
        nearby.append((label, part["prompt"]))
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise InputError(f"{name}={values!r}: expected a list with one entry per edit")
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"the lists have different lengths: {described}; pass one entry per edit in each")
    for name in ("prompts", "target_new", "subject"):
        for place, value in enumerate(lists[name]):
            if not isinstance(value, str):
                raise InputError(f"{name}[{place}]={value!r}: expected a string")
    return [
        Edit(
            prompt,
            about,
            target,
            paraphrases=_texts("rephrase_prompts", rephrase_prompts, place),
            neighborhood=tuple(text for name, values in nearby for text in _texts(name, values, place)),
        )
        for place, (prompt, about, target) in enumerate(zip(prompts, subject, target_new, strict=True))
    ]


def _texts(name: str, values: Texts | None, place: int) -> tuple[str, ...]:
    value = None if values is None else values[place]
    if value is None:
        return ()
    texts = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}[{place}]={value!r}: expected a string or a list of strings")
    return texts
