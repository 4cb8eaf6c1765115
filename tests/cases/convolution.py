"""Rows of rules/convolution.py."""

from jax import lax

from cases.case import Case, complex_, real

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def conv(label, x, w, numbers=NHWC, strides=(1, 1), padding="SAME", make=real, **options):
    """A row from the shapes of the operands and the arguments of `lax.conv_general_dilated`."""
    case = {k: options.pop(k) for k in ("tolerance", "why", "dtypes") if k in options}

    def fun(x, w):
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=numbers, **options
        )

    return Case("conv_general_dilated", fun, (make(*x), make(*w)), label, **case)


CASES = [
    conv("same", (2, 5, 3, 3), (3, 3, 3, 2)),
    conv("valid", (2, 5, 7, 3), (2, 3, 3, 5), padding="VALID"),
    conv("stride", (2, 7, 5, 3), (3, 2, 3, 2), strides=(2, 3)),
    conv("uncovered edge", (2, 7, 5, 2), (2, 2, 2, 3), strides=(3, 2), padding="VALID"),
    conv("padding", (2, 3, 5, 2), (3, 2, 2, 3), padding=((3, 1), (0, 2))),
    conv("negative padding", (2, 7, 5, 2), (3, 2, 2, 3), padding=((-1, -2), (1, -1))),
    conv(
        "dilated operand", (2, 3, 5, 2), (3, 2, 2, 3), lhs_dilation=(2, 3),
        padding=((1, 2), (0, 1)),
    ),
    conv("dilated kernel", (2, 7, 7, 2), (3, 2, 2, 3), rhs_dilation=(2, 3)),
    conv(
        "all at once", (2, 5, 7, 2), (3, 2, 2, 3), strides=(2, 3), padding=((2, -1), (1, 3)),
        lhs_dilation=(3, 2), rhs_dilation=(2, 3),
    ),
    conv("NCHW", (2, 3, 5, 7), (2, 3, 3, 2), NCHW, strides=(1, 2)),
    conv("odd layouts", (5, 2, 3, 7), (3, 2, 2, 5), ("HNCW", "IHWO", "WNHC")),
    conv("1-D", (2, 7, 3), (3, 3, 2), ("NWC", "WIO", "NWC"), (2,)),
    conv("3-D", (2, 3, 2, 5, 2), (2, 2, 3, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), (1, 2, 1)),
    conv("0-D", (2, 3), (3, 5), ("NC", "IO", "NC"), (), ()),
    conv("1x1", (2, 3, 5, 3), (1, 1, 3, 2)),
    conv("1x1 NCHW", (2, 3, 3, 5), (2, 3, 1, 1), NCHW),
    conv("1x1 stride", (2, 5, 3, 3), (1, 1, 3, 2), strides=(2, 2)),
    conv("groups", (2, 5, 3, 6), (3, 2, 2, 9), feature_group_count=3, strides=(2, 1)),
    conv("groups NCHW", (2, 6, 5, 3), (4, 3, 3, 2), NCHW, feature_group_count=2),
    conv("depthwise", (2, 5, 7, 3), (3, 3, 1, 3), feature_group_count=3),
    conv("depthwise twice", (3, 5, 7, 3), (3, 2, 1, 6), feature_group_count=3, strides=(2, 1)),
    conv("batch groups", (6, 5, 3, 2), (3, 2, 2, 9), batch_group_count=3, strides=(2, 1)),
    conv("complex", (2, 5, 3, 2), (3, 2, 2, 3), make=complex_, dtypes=("float32",)),
]
