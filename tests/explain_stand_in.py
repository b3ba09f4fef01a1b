"""Records a training program as PyTorch's CUDA allocator would, on a CPU: one block for each new storage.

The stacks are PyTorch's own (`CapturedTraceback`), with C++ frames or without, the marks are those of its optimizers.
Three things a GPU does are put in: the forms of the file, threads of autograd that have no Python frames, and blocks
that lie in segments.
"""

import weakref

import torch
from torch._C._profiler import gather_traceback, symbolize_tracebacks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

_OURS = ("explain_stand_in.py", "_python_dispatch.py")


class StandIn(TorchDispatchMode):
    """Records what happens inside of it; the tensors in `resident` are there before."""

    def __init__(self, resident=()):
        super().__init__()
        self._time, self._live = 0, {}
        self.trace, self.notes, self._gathered = [], [], []
        for tensor in resident:
            self._live[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), None

    def __enter__(self):
        self._hooks = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self._note(optimizer, "START")),
            register_optimizer_step_post_hook(lambda optimizer, *_: self._note(optimizer, "END")),
        ]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self._seen(tensor.untyped_storage())
        return result

    def _seen(self, storage):
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._live:
            return
        in_thread = torch._C._current_graph_task_id() != -1
        gathered = gather_traceback(python=True, script=False, cpp=True)
        self._gathered.append(gathered)
        self._live[address] = size, (len(self._gathered) - 1, in_thread)
        self._event("alloc", address, size, self._live[address][1])
        weakref.finalize(storage, self._freed, address)

    def _freed(self, address):
        size, _ = self._live.pop(address)
        self._event("free_requested", address, size, None)
        self._event("free_completed", address, size, None)

    def _event(self, action, address, size, context):
        self._time += 1
        event = {"action": action, "addr": address, "size": size, "stream": 0, "time_us": self._time, "frames": context}
        self.trace.append(event)

    def _note(self, optimizer, stage):
        self._time += 1
        name = f"Optimizer.step#{type(optimizer).__name__}.step"
        self.notes.append({"name": name, "stage": stage, "device": 0, "time_us": self._time})

    def snapshot(self, stacks="all", form="frames"):
        """The file's content. `stacks` is "python" or "all", as in `_record_memory_history`.

        `form` "history" is how blocks looked in PyTorch 2.0.
        """
        gathered = symbolize_tracebacks(self._gathered)
        cut = [self._as_on_a_gpu(frames, stacks == "all") for frames in gathered]
        trace = [event | {"frames": self._frames(cut, event["frames"])} for event in self.trace]
        segments = []
        for address, (size, context) in self._live.items():
            rounded, frames = -(-size // 512) * 512, self._frames(cut, context)
            block = {"size": rounded, "state": "active_allocated"}
            if form == "history":
                block["history"] = [{"addr": address, "real_size": size, "frames": frames}]
            else:
                block |= {"address": address, "requested_size": size, "frames": frames}
            segments.append({"device": 0, "address": address, "total_size": rounded, "blocks": [block]})
        return {"segments": segments, "device_traces": [trace], "external_annotations": self.notes}

    @staticmethod
    def _frames(cut, context):
        if context is None:
            return []
        number, in_thread = context
        of_thread, whole = cut[number]
        return of_thread if in_thread else whole

    @staticmethod
    def _as_on_a_gpu(frames, with_cpp):
        """A stack as autograd's own threads have it, without what called the backward pass; and the whole one."""
        frames = [frame for frame in frames if not frame["filename"].endswith(_OURS)]
        engine = [i for i, frame in enumerate(frames) if frame["name"] == "_engine_run_backward"]
        of_thread = frames[: engine[0]] if engine else frames
        if with_cpp:
            return of_thread, frames
        of_thread, frames = ([f for f in some if f["filename"].endswith(".py")] for some in (of_thread, frames))
        return (of_thread if any(f["name"] in ("backward", "unpack_hook") for f in of_thread) else []), frames
