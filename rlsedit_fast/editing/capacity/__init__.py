"""What planned edits would do, what is left of the capacity, and what new edits share with earlier ones."""
