"""Forward passes that resume and prefixes that are shared are used only where they give the logits of whole passes."""

import pytest
import torch

from rlsedit_fast.models import find_decoder, find_site, greedy, with_prefixes
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.tokens import Row

from ..tiny_families import make

VOCABULARY = 50
ROWS = [Row([1, 2, 3, 4, 5], 2, 4), Row([1, 2, 9, 4], 2, 3), Row([7, 8, 9], 0, 2)]


@pytest.mark.parametrize(
    ("name", "prefixed"),
    [("falcon_h1", False), ("nemotron_h", False), ("qwen3_5", False), ("recurrent_gemma", False), ("llava", True)],
)
def test_states_that_rows_cannot_share_are_not_cached(name, prefixed):
    model = make(name, VOCABULARY)
    assert with_prefixes(find_decoder(model)).prefixed is prefixed


@pytest.mark.parametrize(
    ("name", "changes", "layer", "resumable"),
    [
        ("gemma3n", {}, 1, False),  # several streams
        ("gemma4", {"num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4}, 2, False),  # keys of layer 1
        ("gemma4", {}, 1, True),
        ("falcon_h1", {}, 1, True),
    ],
)
def test_a_resumed_pass_gives_the_logits_of_a_whole_one(name, changes, layer, resumable):
    decoder = find_decoder(make(name, VOCABULARY, **changes))
    with quiet(decoder.model):
        decoder = with_prefixes(decoder)
        site = find_site(decoder, decoder.select([layer]))
        assert site.resumable is resumable
        batch = site.batch(ROWS)
        captured = site.capture(batch)
        lookup = torch.tensor([row.lookup for row in ROWS]) - batch.before
        change = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        every = torch.arange(3)
        with site.resumed() as forward, torch.no_grad():
            found = forward(batch, captured.below, lookup, change, every, batch.lengths - 1)
            unchanged = forward(batch, captured.below, lookup, 0 * change, every, batch.lengths - 1)
    for at, row in enumerate(ROWS):

        def add(_module, _inputs, output, at=at, row=row):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[..., row.lookup, :] += change[at]

        with torch.no_grad():
            ids = torch.tensor([row.ids])
            torch.testing.assert_close(unchanged[at], decoder.model(ids, use_cache=False).logits[0, -1])
            handle = site.module.register_forward_hook(add)
            torch.testing.assert_close(found[at], decoder.model(ids, use_cache=False).logits[0, -1])
            handle.remove()


@pytest.mark.parametrize("name", ["recurrent_gemma", "falcon_h1", "llama4"])
def test_generation_without_a_shared_cache(name):
    model = make(name, VOCABULARY)
    if name == "llama4":
        from rlsedit_fast.models.repairs import repair_forward

        repair_forward(model)
    rows = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 1]]
    found = greedy(model, rows, [3, 3, 3])
    for row, new in zip(rows, found, strict=True):
        ids = list(row)
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert new == ids[len(row) :]
