"""Rules for gather, scatter and dynamic slices."""

RULES = []
