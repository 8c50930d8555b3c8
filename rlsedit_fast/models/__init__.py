"""All that knows transformers: where a model keeps its projections, its hidden states, its tokens."""
