"""Rules for linear algebra."""

RULES = []
