"""Rules for communication between devices."""

RULES = []
