"""Methods of the editor, by what they are for."""
