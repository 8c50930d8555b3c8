"""Keys of edits are read at the lookup token, and keys of anchor texts at every token."""

from dataclasses import replace

import pytest
import torch

from rlsedit_fast import Edit, EditConfig
from rlsedit_fast.editing.keys import request_keys, text_keys
from rlsedit_fast.editing.requests import prepare
from rlsedit_fast.models.passes import read_keys
from rlsedit_fast.models.prefixes import with_prefixes
from rlsedit_fast.models.projections import find_decoder


def assert_close(found, expected):
    """Compares float32 results of different batch shapes; rounding errors are relative to the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_keys_are_read_in_each_context_at_the_lookup_token(model, tokenizer):
    decoder = find_decoder(model)
    config = EditConfig(layers=(1, 2), contexts={"prefixes": ("", "People speak .", "Lado speaks")})
    edits = [Edit("The home of {} is in", "Fado Veta", "Port Alder"), Edit("{} speaks", "Lado", "Kubeish")]
    requests = prepare(tokenizer, edits, config, longest=64)
    block = decoder.blocks[2]
    keys, hidden = request_keys(decoder, decoder.select((1, 2)), requests, output_of=block)
    for i, request in enumerate(requests):
        alone = [
            read_keys(decoder, decoder.select((1, 2)), {"input_ids": torch.tensor([row.ids])}, output_of=block)
            for row in request.contexts
        ]
        for found, layer in zip(keys, (1, 2), strict=True):
            each = [seen[layer][0, row.lookup] for (seen, _), row in zip(alone, request.contexts, strict=True)]
            assert_close(found[i], torch.stack(each))
        states = [output[0, row.lookup] for (_, output), row in zip(alone, request.contexts, strict=True)]
        assert_close(hidden[i], torch.stack(states))


@pytest.mark.parametrize("prefixed", [True, False])
def test_shared_prefixes_run_once_and_later_blocks_do_not_run(make_model, tokenizer, family, prefixed):
    decoder = replace(find_decoder(make_model(family)), prefixed=prefixed)
    if prefixed:
        decoder = with_prefixes(decoder, longest=64)
        assert decoder.prefixed
    config = EditConfig(
        layers=(1,),
        contexts={"prefixes": ("", "People speak in the home of Fado .", "Lado plays the organ and speaks")},
    )
    prompts = ["The home of {} is in", "The native language of {} is"]
    names = ["Fado Veta", "Lado", "Toze Lado Rekuno", "Voluvu Lado"]
    edits = [Edit(prompt, name, "Port Alder") for prompt in prompts for name in names]
    requests = prepare(tokenizer, edits, config, longest=64)
    calls = []
    for projection in decoder.projections:
        width = projection.weight.shape[1]
        projection.module.register_forward_pre_hook(
            lambda _m, inputs, layer=projection.layer, width=width: calls.append((layer, inputs[0].numel() // width))
        )
    (keys,), _ = request_keys(decoder, decoder.select((1,)), requests)
    tokens = sum(count for layer, count in calls if layer == 0)
    whole = sum(len(row.ids) for request in requests for row in request.contexts)
    assert max(layer for layer, _ in calls) == 1
    assert tokens < 0.8 * whole if prefixed else tokens >= whole
    for i, request in enumerate(requests):
        each = []
        for row in request.contexts:
            seen, _ = read_keys(decoder, decoder.select((1,)), {"input_ids": torch.tensor([row.ids])})
            each.append(seen[1][0, row.lookup])
        torch.testing.assert_close(keys[i], torch.stack(each), rtol=1e-4, atol=1e-4)


def test_text_keys_are_the_keys_of_every_token_without_padding(model, tokenizer):
    decoder = find_decoder(model)
    texts = ["Lado speaks Kubeish .", "Veta plays the organ and the organ .", "Fado"]
    found = text_keys(decoder, tokenizer, decoder.select((1, 2)), texts, longest=64)
    for keys, layer in zip(found, (1, 2), strict=True):
        alone = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            alone.append(read_keys(decoder, decoder.select((layer,)), {"input_ids": ids})[0][layer][0])
        torch.testing.assert_close(keys, torch.cat(alone))
