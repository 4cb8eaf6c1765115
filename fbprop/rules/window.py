"""Rules for windowed reductions: pooling."""

RULES = []
