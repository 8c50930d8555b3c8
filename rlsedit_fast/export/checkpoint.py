"""Writes an edited model as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlsedit_fast.export.card import CARD
from rlsedit_fast.files import check_new, written_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    card: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model and its tokenizer into a folder, which gets its name once it is complete.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        directory: folder of the checkpoint.
        card: text of its model card, see `export.card.make_card`; None for no card.
        overwrite: replace the checkpoint in a folder that contains files.

    Raises:
        InputError: `directory` is a file, or contains files and `overwrite` is False.

    Example:
        >>> import tempfile
        >>> from rlsedit_fast.export import write_checkpoint
        >>> from rlsedit_fast.world import load_demo_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_checkpoint(*load_demo_model(), f"{folder}/model")
    """
    with written_folder(Path(directory)) as folder:
        check_new(directory, overwrite=overwrite)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
