"""A forward that begins at a site gives what a whole forward with the change added gives."""

from __future__ import annotations

import pytest
import torch

from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.sites import Site


@pytest.fixture
def batch(tokenizer):
    torch.manual_seed(0)
    ids = torch.randint(4, len(tokenizer), (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("block", [0, 2])
def test_resumed_forward_equals_a_whole_one_with_the_change(make_model, family, batch, block, direct):
    model = make_model(family)
    decoder = find_decoder(model)
    (projection,) = decoder.select((block,))
    at, change = torch.tensor([3, 5, 0]), torch.randn(3, 64)

    def add(_module, _inputs, output):
        state = output[0] if isinstance(output, tuple) else output
        moved = state.clone().reshape(3, 9, -1)
        moved[torch.arange(3), at] += change
        moved = moved.reshape(state.shape)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    place = decoder.blocks[block] if direct else projection.module
    ran = []
    with quiet(model):
        handle = place.register_forward_hook(add)
        with torch.no_grad():
            whole = model(input_ids=batch[0], attention_mask=batch[1], use_cache=False).logits
        handle.remove()
        site = Site(decoder, projection, direct)
        seen = site.look(*batch)
        assert seen.state.shape == (3, 9, 64)
        for layer, every in enumerate(decoder.blocks):
            every.register_forward_hook(lambda _m, _i, _o, layer=layer: ran.append(layer))
        with torch.no_grad(), site.resumed() as forward:
            ran.clear()
            resumed = forward(seen.below, *batch, at, change)
    real = batch[1].bool()
    torch.testing.assert_close(resumed[real], whole[real])
    assert not torch.allclose(seen.logits[real], whole[real])
    assert not any(projection.module._forward_hooks.values())
