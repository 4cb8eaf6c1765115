"""Rules for special functions."""

RULES = []
