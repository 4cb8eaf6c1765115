"""Random programs, differentiated by fbprop and by JAX.

`grammar` draws programs as Python source, `program` runs and prints them, `compare` differentiates
them both ways under one of several transformations and settings, `shrink` makes a program that
disagrees as small as it can be. ``python -m tests.programs --seed S --count N`` looks at N of them.
"""
