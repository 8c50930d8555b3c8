"""Keys are read where the model is edited, and anchors from every token that they were given."""

import torch

from rlsedit_fast.editing import Edit, EditConfig
from rlsedit_fast.editing.keys import request_keys, text_keys
from rlsedit_fast.editing.requests import prepare
from rlsedit_fast.models.passes import read_keys
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.tokens import pad


def test_keys_are_the_mean_over_contexts_at_the_lookup_token(model, tokenizer):
    decoder = find_decoder(model)
    config = EditConfig(layers=(1, 2), context_prefixes=("", "People speak .", "Lado speaks"))
    edits = [Edit("The home of {} is in", "Fado Veta", "Port Alder"), Edit("{} speaks", "Lado", "Kubeish")]
    requests = prepare(tokenizer, edits, config, longest=64)
    keys, hidden = request_keys(decoder, decoder.select((1, 2)), requests, block=2)
    for i, request in enumerate(requests):
        alone = [
            read_keys(decoder, decoder.select((1, 2)), *pad([row], decoder.device), block=2) for row in request.contexts
        ]
        for found, layer in zip(keys, (1, 2), strict=True):
            each = [seen[layer][0, row.lookup] for (seen, _), row in zip(alone, request.contexts, strict=True)]
            torch.testing.assert_close(found[i], torch.stack(each).mean(0))
        torch.testing.assert_close(hidden[i], alone[0][1][0, request.contexts[0].lookup])


def test_keys_of_texts_are_those_of_every_real_token(model, tokenizer):
    decoder = find_decoder(model)
    texts = ["Lado speaks Kubeish .", "Veta plays the organ and the organ .", "Fado"]
    found = text_keys(decoder, tokenizer, decoder.select((1, 2)), texts, longest=64)
    for keys, layer in zip(found, (1, 2), strict=True):
        alone = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            alone.append(read_keys(decoder, decoder.select((layer,)), ids, torch.ones_like(ids))[0][layer][0])
        torch.testing.assert_close(keys, torch.cat(alone))
