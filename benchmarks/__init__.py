"""fbprop measured against `jax.grad` of the same plain code: ``python -m benchmarks``."""
