"""Everything that depends on transformers: projections, hidden states, tokens and generation."""
