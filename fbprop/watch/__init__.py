"""What a backward pass can report besides gradients."""

from fbprop.watch import curvature, per_example

__all__ = ["curvature", "per_example"]
