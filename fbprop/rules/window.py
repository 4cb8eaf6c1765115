"""placeholder"""

RULES = []
