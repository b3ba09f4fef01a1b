"""Runs Liger's Triton kernels on a CPU, through Triton's interpreter. Slow, exact, and needs no GPU.

Three gaps of the interpreter stand between it and Liger's kernels (seen with triton 3.6.0 and 3.9.0) and are closed
here: Python floats passed to a kernel stay Python floats, where a compiled kernel sees a float32 scalar;
`libdevice.rsqrt` and `libdevice.tanh` have no body; and a launch keeps its arguments alive until the garbage collector
runs, which would show in tracked memory peaks.
"""

import os

from src.utils import UsageError


def enable() -> None:
    """Make the interpreter run Liger's kernels. Call it before Liger is imported.

    Raises `UsageError` if Triton was imported without TRITON_INTERPRET=1.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError("set TRITON_INTERPRET=1 before Python starts to run Liger's kernels on a CPU")
    _convert_float_arguments()
    _define_functions()
    _pass_host_tensors_through()


def _convert_float_arguments() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt
    if getattr(convert, "converts_floats", False):
        return

    def convert_with_floats(arg: object) -> object:
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return convert(arg)

    convert_with_floats.converts_floats = True
    interpreter._implicit_cvt = convert_with_floats


def _define_functions() -> None:
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    # Liger's kernels import these names when they are first loaded.
    libdevice.rsqrt = lambda x: tl.math.rsqrt(x)
    libdevice.tanh = lambda x: tl.tensor(TensorHandle(np.tanh(x.handle.data), x.handle.dtype), x.type)


def _pass_host_tensors_through() -> None:
    from triton.runtime import interpreter

    # What these two do for tensors on a GPU, copying them to the host and back, is not needed for tensors on the host;
    # their recursive closures are reference cycles that hold every argument.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    interpreter.GridExecutor._restore_args_dev = lambda self, args, args_host, kwargs, kwargs_host: None
