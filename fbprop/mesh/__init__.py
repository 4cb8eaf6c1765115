"""One device to many hosts by JAX's own SPMD: layouts of parameters over a mesh."""

from fbprop.mesh.feed import feed
from fbprop.mesh.layouts import Layout, fully_sharded, layout, replicated
from fbprop.mesh.show import show
from fbprop.mesh.start import start
from fbprop.mesh.tensor import tensor_parallel

__all__ = [
    "Layout", "feed", "fully_sharded", "layout", "replicated", "show", "start",
    "tensor_parallel",
]
