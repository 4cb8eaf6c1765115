"""Programs for several devices: what they send each other, counted from the compiled text."""
