"""Tensor parallelism: each layer's product is shared by the devices of an axis."""

from __future__ import annotations

from jax.sharding import PartitionSpec

from fbprop.mesh.layouts import Axes, Layout, share


def tensor_parallel(network, axis: str = "model", *, batch: Axes = "data") -> Layout:
    """Kernels split by turns along their outputs and their inputs (Megatron).

    After a kernel split along its outputs every device has some features; the next kernel, split
    along its inputs, needs no others, and the sum over devices is the only thing sent: once a
    pair of `dense` or `conv` layers, once per attention, whose heads are shared out. An embedding
    is split along its vocabulary, or along its features where the axis does not divide that.
    What the axis does not divide is whole on every device, normalisation of whole features too.
    Shoeybi et al. 2020, arXiv:1909.08053.

    Args:
      network: a `fbprop.nn.Layer`: `nn.gpt`, `nn.mlp`, `nn.convnet`, or another of such layers.
      axis: the mesh's axis.
      batch: see `layout`.

    Raises:
      TypeError: no layer.

    Example:
      >>> import jax
      >>> from fbprop import mesh, nn
      >>> eight = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
      >>> net, x = nn.mlp(16, 4), jax.ShapeDtypeStruct((1, 8), "float32")
      >>> params = jax.eval_shape(lambda: net.init(jax.random.key(0), x))
      >>> specs = mesh.tensor_parallel(net).specs(eight, params)
      >>> tuple(specs["dense_0"]["kernel"]), tuple(specs["dense_1"]["kernel"])
      ((None, 'model'), ('model',))
    """
    if not hasattr(network, "parts") or not hasattr(network, "apply"):
        raise TypeError(
            "The order of layers says how each is split, got "
            f"{type(network).__name__} expected a fbprop.nn.Layer: write other networks' layouts "
            "with fbprop.mesh.layout."
        )

    def rule(mesh, named):
        turns = _Turns(axis, share(mesh, "a tensor-parallel layout", axis), named)
        turns.walk(network, ())
        return turns.specs

    return Layout(rule, batch)


class _Turns:
    """Goes through a network, and knows whether the features at hand are split."""

    def __init__(self, axis, n, named):
        self.axis, self.n, self.named, self.split = axis, n, named, False
        self.specs = dict.fromkeys(named, PartitionSpec())

    def walk(self, layer, path):
        """Every layer made of others begins and ends with whole features, as a shortcut needs."""
        if not layer.parts:
            return self.layer("".join(f"{name}/" for name in path))
        self.split = False
        for part in layer.parts:
            self.walk(part, (*path, part.name))
        self.split = False

    def layer(self, prefix):
        if f"{prefix}qkv/kernel" in self.named:
            self.split = False
            self.product(f"{prefix}qkv/")
            self.product(f"{prefix}out/")
        elif f"{prefix}recurrent" in self.named:  # gates of one unit lie far apart: whole
            self.split = False
        elif f"{prefix}kernel" in self.named:
            self.product(prefix)
        elif f"{prefix}embedding" in self.named and "position" not in prefix:
            self.table(f"{prefix}embedding")
        elif self.split:  # scales and shifts of features
            for name in self.named:
                if prefix and name.startswith(prefix) and self.divides(name, -1):
                    self.set(name, -1)

    def product(self, prefix):
        kernel, bias = f"{prefix}kernel", f"{prefix}bias"
        if self.split and self.divides(kernel, -2):
            self.set(kernel, -2)
            self.split = False
        elif self.divides(kernel, -1):
            self.set(kernel, -1)
            if bias in self.named:
                self.set(bias, -1)
            self.split = True

    def table(self, name):
        for d in (-2, -1):
            if self.divides(name, d):
                return self.set(name, d)

    def divides(self, name, d):
        shape = self.named[name].shape
        return len(shape) >= -d and shape[d] % self.n == 0

    def set(self, name, d):
        before = len(self.named[name].shape) + d
        self.specs[name] = PartitionSpec(*[None] * before, self.axis)
