"""What a backward pass can report besides gradients."""

from fbprop.watch import per_example

__all__ = ["per_example"]
