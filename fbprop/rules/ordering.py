"""Rules for sorting and selecting."""

RULES = []
