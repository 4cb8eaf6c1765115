"""Convolutions of NHWC images by HWIO kernels, outside and inside `lax.scan`."""

from jax import lax

from benchmarks.row import looped, operation, row

LOOPED = {
    "smoke": [(2, 2, 6, 6, 3, 4)],
    "small": [(2, 4, 16, 16, 8, 16)],
    "full": [(2, 32, 16, 16, 32, 32), (2, 64, 32, 32, 16, 32)],
}
SIZES = {
    "smoke": [(2, 6, 6, 3, 4)],
    "small": [(8, 16, 16, 32, 32)],
    "full": [(64, 32, 32, 16, 32), (64, 32, 32, 64, 64), (32, 16, 16, 128, 128)],
}


# An element of dw sums up to 65,536 products of float32, here in another order.
REORDERED = 1e-4


def convolution(x, w, stride=1, groups=1):
    """``SAME`` convolution of NHWC images by an HWIO kernel."""
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _flops(B, H, W, D, E, products=3, k=3):
    """Of forward and one or two gradients: B·H·W·k² multiply-adds per pair of channels each."""
    return products * 2 * B * H * W * k * k * D * E


@row(**LOOPED)
def conv_input_gradient_in_scan(draw, K, B, H, W, D, E):
    x, w = draw.normal(K, B, H, W, D), draw.weight(3, 3, D, E)
    return looped(convolution, [x], [w], flops=K * _flops(B, H, W, D, E, 2))


@row(**LOOPED)
def conv_kernel_gradient_in_scan(draw, K, B, H, W, D, E):
    x, w = draw.normal(K, B, H, W, D), draw.weight(K, 9 * D, E).reshape(K, 3, 3, D, E)
    function = lambda w, x: convolution(x[0], w)
    # One image batch for all iterations, another kernel in each: only dw is differentiated.
    flops = K * _flops(B, H, W, D, E, 2)
    return looped(function, [w], [x], flops=flops, tolerance=REORDERED)


@row(**LOOPED)
def conv_gradients_in_scan(draw, K, B, H, W, D, E):
    x, w = draw.normal(K, B, H, W, D), draw.weight(K, 9 * D, E).reshape(K, 3, 3, D, E)
    flops = K * _flops(B, H, W, D, E)
    return looped(convolution, [x, w], [], flops=flops, tolerance=REORDERED)


@row(**SIZES)
def conv_3x3(draw, B, H, W, D, E):
    x, w = draw.normal(B, H, W, D), draw.weight(3, 3, D, E)
    return operation(convolution, [x, w], flops=_flops(B, H, W, D, E), tolerance=REORDERED)


@row(**SIZES)
def conv_3x3_stride_2(draw, B, H, W, D, E):
    x, w = draw.normal(B, H, W, D), draw.weight(3, 3, D, E)
    flops = _flops(B, H // 2, W // 2, D, E)
    return operation(lambda x, w: convolution(x, w, stride=2), [x, w], flops=flops)


@row(smoke=[(2, 6, 6, 3, 4)], small=[(8, 16, 16, 32, 32)],
     full=[(64, 32, 32, 64, 64), (32, 16, 16, 128, 256)])
def conv_1x1(draw, B, H, W, D, E):
    x, w = draw.normal(B, H, W, D), draw.weight(1, 1, D, E)
    flops = _flops(B, H, W, D, E, k=1)
    return operation(convolution, [x, w], flops=flops, tolerance=REORDERED)


@row(smoke=[(2, 6, 6, 4)], small=[(8, 16, 16, 32)], full=[(64, 32, 32, 64), (64, 16, 16, 128)])
def conv_depthwise_3x3(draw, B, H, W, C):
    x, w = draw.normal(B, H, W, C), draw.normal(3, 3, 1, C, scale=1 / 3)
    function = lambda x, w: convolution(x, w, groups=C)
    return operation(function, [x, w], flops=_flops(B, H, W, C, 1), tolerance=REORDERED)
