"""A forward pass that starts at a site after a prefix matches a full pass with the change added."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import Prefixed, reading, with_prefixes
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.sites import Site
from rlsedit_fast.models.tokens import Row


@pytest.fixture
def rows(tokenizer):
    """Returns rows of different lengths, changed at the first token, the last, and beyond a sliding window."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 3), (6, 5), (9, 0), (14, 11)]
    return [
        Row(torch.randint(4, len(tokenizer), (length,), generator=generator).tolist(), lookup, length)
        for length, lookup in shapes
    ]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("block", [0, 2])
def test_resumed_forward_matches_a_full_pass(make_model, family, rows, block, direct, cached):
    model = make_model(family)
    decoder = find_decoder(model)
    (projection,) = decoder.select((block,))
    change = torch.randn(len(rows), 64, generator=torch.Generator().manual_seed(1))
    place = decoder.blocks[block] if direct else projection.module

    def alone(row, added):
        def add(_module, _inputs, output):
            state = output[0] if isinstance(output, tuple) else output
            moved = state.clone().reshape(1, len(row.ids), -1)
            moved[0, row.lookup] += added
            return (
                (moved.reshape(state.shape), *output[1:]) if isinstance(output, tuple) else moved.reshape(state.shape)
            )

        handle = place.register_forward_hook(add)
        logits = model(torch.tensor([row.ids]), use_cache=False).logits[0, row.lookup :]
        handle.remove()
        return logits

    ran = []
    with quiet(model), torch.no_grad():
        whole = torch.cat([alone(row, added) for row, added in zip(rows, change, strict=True)])
        unchanged = torch.cat([alone(row, torch.zeros(64)) for row in rows])
        site = Site(replace(decoder, prefixed=cached), projection, direct)
        batch = site.batch(rows)
        assert batch.ids.shape[1] == (9 if cached else 14)
        lookup = torch.tensor([row.lookup for row in rows]) - batch.before
        assert not cached or lookup.tolist() == [0, 0, 0, 0]
        read = [(i, int(lookup[i]) + at) for i, row in enumerate(rows) for at in range(len(row.ids) - row.lookup)]
        row, at = torch.tensor(read).T
        seen = site.capture(batch)
        assert seen.state.shape == (len(rows), batch.ids.shape[1], 64)
        for layer, every in enumerate(decoder.blocks):
            every.register_forward_hook(lambda _m, _i, _o, layer=layer: ran.append(layer))
        with site.resumed() as forward:
            still = forward(batch, seen.below, lookup, torch.zeros_like(change), row, at)
            ran.clear()
            resumed = forward(batch, seen.below, lookup, change, row, at)
            again = forward(batch, seen.below, lookup, change, row, at)
            few = torch.tensor([3, 1])
            part = torch.isin(row, few)
            part_batch = batch.taken(few)
            below, width = seen.below, part_batch.ids.shape[1]
            assert width == (3 if cached else 14), "unused columns are removed"
            if below is not None:
                fewer_states = (below[0] if isinstance(below, tuple) else below)[few, :width]
                below = (fewer_states, *below[1:]) if isinstance(below, tuple) else fewer_states
            order = torch.argsort((row[part][:, None] == few).long().argmax(1), stable=True)
            fewer = forward(
                part_batch, below, lookup[few], change[few],
                (row[part][:, None] == few).long().argmax(1)[order], at[part][order],
            )  # fmt: skip
    torch.testing.assert_close(still, unchanged, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(resumed, whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, resumed), "a forward pass does not change the prefix"
    torch.testing.assert_close(fewer, resumed[part][order], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, unchanged, atol=1e-2)


def test_every_family_supports_prefixes(make_model, family):
    for dtype in (torch.float32, torch.bfloat16):
        decoder = find_decoder(make_model(family, dtype))
        with quiet(decoder.model):
            assert with_prefixes(decoder, longest=64).prefixed


@pytest.mark.parametrize("flaw", ["positions", "mask", "cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsupported_prefixes_are_detected_and_logged(make_model, flaw, dtype, caplog):
    caplog.set_level("INFO")
    model = make_model("gpt2", dtype)  # rotary positions are relative, so a common shift would have no effect
    decoder = find_decoder(model)
    forward = model.forward

    names = ("cache", "past_key_values")

    def flawed(position_ids=None, attention_mask=None, **rest):
        if flaw == "positions":
            position_ids = None
        if flaw == "mask" and any(rest.get(name) is not None for name in names):
            attention_mask = torch.ones_like(attention_mask)
        if flaw == "cache":
            rest = {key: value for key, value in rest.items() if key not in names}
            if position_ids is not None:
                attention_mask = attention_mask[:, -position_ids.shape[1] :]
        return forward(position_ids=position_ids, attention_mask=attention_mask, **rest)

    model.forward = flawed
    with quiet(model):
        assert not with_prefixes(decoder, longest=64).prefixed
        assert "every step runs whole rows" in caplog.text
        model.forward = forward
        assert with_prefixes(decoder, longest=64).prefixed


def test_head_runs_at_selected_tokens(make_model, family, rows):
    model = make_model(family)
    decoder = find_decoder(model)
    batch = Prefixed.of(decoder, rows, [0] * len(rows))
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape))
    row, at = torch.tensor([0, 3, 3]), torch.tensor([2, 0, 13])
    with torch.no_grad():
        whole = model(**batch.arguments()).logits[row, at]
        with reading(decoder, row, at) as read:
            chosen = read(model(**batch.arguments()))
    torch.testing.assert_close(chosen, whole)
    assert [shape[1] for shape in seen] == [14, 3]


def test_shared_prefixes_are_run_once(make_model, family):
    model = make_model(family)
    decoder = replace(find_decoder(model), prefixed=True)
    lead = [5, 9, 7, 11, 6]
    rows = [Row([*lead, 8, token], 5, 7) for token in (12, 13, 14)] + [Row([9, 4, 3], 1, 3)]
    seen = []
    decoder.blocks[0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].numel() // 64))
    with quiet(model), torch.no_grad():
        batch = Prefixed.of(decoder, rows, [row.lookup for row in rows])
        assert seen == [10], "two prefixes of at most five tokens"
        every = torch.arange(4)
        with reading(decoder, every, batch.lengths - 1) as read:
            found = read(model(**batch.arguments()))
        whole = torch.stack([model(torch.tensor([row.ids])).logits[0, -1] for row in rows])
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
