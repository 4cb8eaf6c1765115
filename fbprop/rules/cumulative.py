"""Rules for running sums, products and extrema."""

RULES = []
