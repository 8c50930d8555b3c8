"""The change report: one page about an edited model, to be read before a release."""
