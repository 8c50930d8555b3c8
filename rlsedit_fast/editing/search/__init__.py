"""The value search."""
