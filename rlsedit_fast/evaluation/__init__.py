"""What editing did: cases, scores, metrics, and the demonstration that puts them together."""
