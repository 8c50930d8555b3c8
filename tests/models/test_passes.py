"""Partial forward passes match full passes and do not change the model."""

import pytest
import torch

from rlsedit_fast.models.passes import hidden_of, quiet, read_keys, resume_above
from rlsedit_fast.models.prefixes import Prefixed
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.sites import Site


@pytest.fixture
def batch(tokenizer):
    torch.manual_seed(0)
    ids = torch.randint(4, len(tokenizer), (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def run_to(decoder, block, batch):
    """Runs a forward pass up to a site at the output of a block."""
    places = torch.arange(9).expand(3, 9), torch.zeros(3, dtype=torch.long)
    rows = Prefixed(batch["input_ids"], batch["attention_mask"], *places, None)
    return Site(decoder, decoder.projections[block], direct=True).capture(rows)


def test_keys_are_inputs_of_the_projections(model, batch):
    decoder = find_decoder(model)
    seen = {}
    for projection in decoder.projections:
        projection.module.register_forward_pre_hook(
            lambda _m, inputs, layer=projection.layer: seen.update({layer: inputs[0]})
        )
    model(**batch)
    whole = dict(seen)
    seen.clear()
    keys, hidden = read_keys(decoder, decoder.projections[:2], batch)
    assert sorted(seen) == [0, 1], "the pass stops at the deepest projection"
    assert hidden is None
    for layer in (0, 1):
        assert torch.equal(keys[layer], whole[layer])


def test_hidden_state_is_the_output_of_the_block(model, batch):
    decoder = find_decoder(model)
    output = run_to(decoder, 2, batch).below
    keys, hidden = read_keys(decoder, decoder.projections[:2], batch, output_of=decoder.blocks[2])
    assert sorted(keys) == [0, 1]
    assert torch.equal(hidden, hidden_of(output))


@pytest.mark.parametrize("block", [0, 2, 3])
def test_resumed_pass_matches_the_full_pass_and_skips_blocks(model, batch, block):
    decoder = find_decoder(model)
    seen = run_to(decoder, block, batch)
    ran = []
    for projection in decoder.projections:
        projection.module.register_forward_pre_hook(lambda _m, _i, layer=projection.layer: ran.append(layer))
    run_to(decoder, block, batch)
    assert ran == list(range(block + 1)), "the pass stops at the site"
    ran.clear()
    with torch.no_grad(), resume_above(decoder, block) as state:
        state["output"] = seen.below
        resumed = model(**batch).logits
        assert ran == list(range(block + 1, 4))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(resumed[real], model(**batch).logits[real])
    assert all("forward" not in module.__dict__ for module in decoder.blocks)


def test_failed_pass_leaves_no_patch_or_hook(model, batch):
    decoder = find_decoder(model)

    class Stop(Exception):
        pass

    with pytest.raises(Stop), resume_above(decoder, 1):
        raise Stop
    assert all("forward" not in module.__dict__ for module in decoder.blocks)
    with pytest.raises(IndexError):
        read_keys(decoder, decoder.projections, batch | {"input_ids": batch["input_ids"] + 10_000})
    assert not any(p.module._forward_pre_hooks for p in decoder.projections)


def test_quiet_restores_mode_and_gradients(model):
    model.train()
    fixed = next(model.parameters()).requires_grad_(False)
    with quiet(model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert not fixed.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters())) - 1
