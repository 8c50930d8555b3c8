"""The version, in its one place: `pyproject.toml` and `__version__` read it here."""

__version__ = "0.1.0.dev0"
"""The version of the package.

Example:
    >>> import rlsedit_fast
    >>> rlsedit_fast.__version__.split(".")[0]
    '0'
"""
