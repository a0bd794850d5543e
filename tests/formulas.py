"""The recipes of low-precision training, written out a second time: plain formulas in float64.

Nothing of fewbit is used, and elements are rounded by ml_dtypes. Shapes: x [m, k], w [n, k], g [m, n].
"""

import ml_dtypes
import numpy as np
import torch

ELEMENTS = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 448.0),
    "e5m2": (ml_dtypes.float8_e5m2, 57344.0),
    "e2m3": (ml_dtypes.float6_e2m3fn, 7.5),
    "e3m2": (ml_dtypes.float6_e3m2fn, 28.0),
    "e2m1": (ml_dtypes.float4_e2m1fn, 6.0),
}


def rounded(u, element):
    """Nearest element of u, which lies within reach."""
    if element == "int8":
        return u.round().clamp(-127, 127).double()
    dtype, top = ELEMENTS[element]
    u = u.float().clamp(-top, top)
    return torch.from_numpy(u.numpy().astype(dtype).astype(np.float64))


def largest(x, rows=None, columns=None):
    """The largest magnitude of the block of rows x columns (None: all) that each element lies in, like x."""
    (r, c), a = x.shape, x.abs()
    rows, columns = rows or r, columns or c
    a = torch.nn.functional.pad(a, (0, -c % columns, 0, -r % rows))
    a = a.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3))
    return a.repeat_interleave(rows, 0)[:r].repeat_interleave(columns, 1)[:, :c]


def scaled(x, element, rows=None, columns=None, up=False):
    """x on ``element`` with a step for each block; up: the next power of two."""
    top = 127.0 if element == "int8" else ELEMENTS[element][1]
    step = largest(x, rows, columns) / top
    if up:
        exact = largest(x, rows, columns).double() / top
        step = torch.exp2(torch.log2(exact).ceil()).float()
    step = torch.where(step > 0, step, 1.0)
    return rounded(x / step, element) * step.double()


def nv(x, rows, columns):
    """NVFP4: E2M1 over E4M3 over a float32 for the tensor."""
    raw = largest(x, rows, columns) / 6
    outer = raw.max() / 448
    inner = rounded((raw / outer).clamp(min=2.0**-9), "e4m3").float()
    step = inner * outer
    return rounded(x / step, "e2m1") * step.double()


def _tensors(element, gradient):
    def three(x, w, g):
        x, w, g = scaled(x, element), scaled(w, element), scaled(g, gradient)
        return x @ w.t(), g @ w, g.t() @ x

    return three


def _rows(x, w, g):
    def by(x, rows, columns):
        return scaled(x, "e4m3", rows, columns, up=True)

    forward = by(x, 1, None) @ by(w, 1, None).t()
    return forward, by(g, 1, None) @ by(w, None, 1), by(g, None, 1).t() @ by(x, None, 1)


def _folded(x, w, g):
    """Backward from the codes of forward, whose steps have gone into g before it is rounded."""

    def by(x):
        return scaled(x, "e4m3", 1, None, up=True)

    def steps(x):
        step = torch.exp2(torch.log2(x.double().abs().amax(1, keepdim=True) / 448).ceil())
        return torch.where(step > 0, step, 1.0)

    a, s = steps(x), steps(w)
    x, w = by(x), by(w)
    return x @ w.t(), by(g * s.t()) @ (w / s), by((g * a).t()) @ (x / a)


def _folded_tensors(x, w, g):
    x, w, g = (scaled(t, e, up=True) for t, e in ((x, "e4m3"), (w, "e4m3"), (g, "e5m2")))
    return x @ w.t(), g @ w, g.t() @ x


def _rows_wide(x, w, g):
    forward, _, _ = _rows(x, w, g)
    dx = scaled(g, "e4m3", 1, None, up=True) @ scaled(w, "e4m3", up=True)
    return forward, dx, g.double().t() @ x.double()


def _blocks(x, w, g):
    def by(x, rows, columns):
        return scaled(x, "e4m3", rows, columns, up=True)

    w = by(w, 128, 128)
    return by(x, 1, 128) @ w.t(), by(g, 1, 128) @ w, by(g, 128, 1).t() @ by(x, 128, 1)


def _mx(element, gradient):
    def three(x, w, g):
        def by(x, e, rows, columns):
            return scaled(x, e, rows, columns, up=True)

        forward = by(x, element, 1, 32) @ by(w, element, 1, 32).t()
        dx = by(g, gradient, 1, 32) @ by(w, element, 32, 1)
        return forward, dx, by(g, gradient, 32, 1).t() @ by(x, element, 32, 1)

    return three


def _nv(x, w, g):
    w = nv(w, 16, 16)
    return nv(x, 1, 16) @ w.t(), nv(g, 1, 16) @ w, nv(g, 16, 1).t() @ nv(x, 16, 1)


def _switchback(x, w, g):
    w = scaled(w, "int8")
    dx = scaled(g, "int8", 1, None) @ w
    return scaled(x, "int8", 1, None) @ w.t(), dx, g.double().t() @ x.double()


def _memory(x, w, g):
    forward, dx, _ = _switchback(x, w, g)
    return forward, dx, g.double().t() @ scaled(x, "int8", 1, None)


def _columns(x, w, g):
    _, _, dw = _switchback(x, w, g)
    forward = scaled(x, "int8", 1, None) @ scaled(w, "int8", 1, None).t()
    return forward, scaled(g, "int8", 1, None) @ scaled(w, "int8", None, 1), dw


def wide(x, w, g):
    """The three products as they should be, in float64."""
    x, w, g = x.double(), w.double(), g.double()
    return x @ w.t(), g @ w, g.t() @ x


# y, dx, dw of x, w, g; of mxfp4 and nvfp4 rounded to nearest, which backward does not
REFERENCES = {
    "wide": wide,
    "tensorwise": _tensors("e4m3", "e5m2"),
    "rowwise": _rows,
    "rowwise-wide-weight-gradient": _rows_wide,
    "folded": _folded,
    "folded-tensorwise": _folded_tensors,
    "delayed": _tensors("e4m3", "e5m2"),
    "blockwise": _blocks,
    "mxfp8": _mx("e4m3", "e4m3"),
    "mxfp6": _mx("e2m3", "e3m2"),
    "mxfp4": _mx("e2m1", "e2m1"),
    "nvfp4": _nv,
    "switchback": _switchback,
    "switchback-memory": _memory,
    "switchback-rows": _columns,
}
