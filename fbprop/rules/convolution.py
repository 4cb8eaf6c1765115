"""Rules for convolutions."""

RULES = []
