"""A model with predetermined next-token distributions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch


class TableModel(torch.nn.Module):
    """A model with a predetermined distribution over the next token for each given text."""

    def __init__(self, tokenizer, distributions):
        super().__init__()
        self.embedding = torch.nn.Embedding(len(tokenizer), 2)
        text = SimpleNamespace(max_position_embeddings=64)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.distributions = {
            tuple(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt: {
                tokenizer.convert_tokens_to_ids(word): probability for word, probability in answers.items()
            }
            for prompt, answers in distributions.items()
        }

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, attention_mask, use_cache):
        logits = torch.full((*input_ids.shape, self.embedding.num_embeddings), math.log(1e-9))
        for row, ids in enumerate(input_ids.tolist()):
            for at in range(len(ids)):
                for token, probability in self.distributions.get(tuple(ids[: at + 1]), {}).items():
                    logits[row, at, token] = math.log(probability)
        return SimpleNamespace(logits=logits)
