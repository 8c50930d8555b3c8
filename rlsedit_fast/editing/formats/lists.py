"""Edits from parallel lists, as EasyEdit's callers have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlsedit_fast.editing.edits import Edit
from rlsedit_fast.errors import InputError

Texts = Sequence[str | Sequence[str] | None]
"""Of each edit a text, several, or none."""


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
    """Edits from the keyword lists of EasyEdit's `BaseEditor.edit`, an entry per edit in each.

    Args:
        prompts: with `{}` where the subject stands, or containing the subject.
        target_new: what the model is to say.
        subject: what each fact is about.
        ground_truth: what the model says now; only its length is looked at, as editing does not need it.
        rephrase_prompts: texts that the target should then continue too, for evaluation.
        locality_prompts: texts about something else, for evaluation.
        locality_inputs: the same as EasyEdit has it, `{"neighborhood": {"prompt": [...], "ground_truth": [...]}}`;
            the prompts under all names are taken, their `ground_truth` is not needed.

    Raises:
        InputError: lengths that differ, or an entry that is no text.
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
            raise InputError(f"locality_inputs[{name!r}]: expected a dict with the list 'prompt', got {part!r}")
        label = f"locality_inputs[{name!r}]['prompt']"
        lists[label] = part["prompt"]
        nearby.append((label, part["prompt"]))
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise InputError(f"{name}={values!r}: expected a list with an entry per edit")
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"lists of different lengths: {told}; give one entry per edit in each")
    for name in ("prompts", "target_new", "subject"):
        for place, value in enumerate(lists[name]):
            if not isinstance(value, str):
                raise InputError(f"{name}[{place}]={value!r}: expected a text")
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
        raise InputError(f"{name}[{place}]={value!r}: expected a text, or a list of texts")
    return texts
