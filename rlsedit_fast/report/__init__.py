"""The change report: one page about an edited model, to be read before a release."""

from rlsedit_fast.report.collect import ChangeReport, collect

__all__ = ["ChangeReport", "collect"]
