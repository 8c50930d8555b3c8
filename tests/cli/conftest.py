"""The shipped model as a checkpoint in a folder."""

from __future__ import annotations

import pytest

from rlsedit_fast.world import load_demo_model
from rlsedit_fast.world.tokens import save_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = load_demo_model()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder
