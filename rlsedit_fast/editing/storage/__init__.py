"""Changes of an editor in its store, and the editor read back from them."""
