"""A CUDA device simulated on the CPU, so every line for a GPU runs on a machine without one.

    with PlayedDevice() as gpu:
        model = QwenVL.from_pretrained(path, torch.bfloat16, "cuda")
        ...
    gpu.syncs, gpu.launches, gpu.launches_by_name, gpu.live_bytes, gpu.peak_bytes

Inside, device="cuda", x.to("cuda"), x.is_cuda and torch.cuda's streams, graphs and memory
figures work. A tensor on the device is a `PlayedTensor`: its device is cuda:0, and a plain tensor
on the CPU, its `content`, does the work. So all numbers are real.

It refuses what a GPU refuses: tensors of two devices in one operation, what the kernel of
variable-length attention checks (PyTorch's flash_api.cpp) or silently relies on, and, while a
graph is captured, every wait for the host and every copy from its memory. Replaying a graph over
freed memory is an error, too; a GPU would read whatever is there by then.

It counts what a GPU would do, with three simplifications. An aten operation that is not a view
counts as one launch, though some take two. Bytes are those that the storages ask for, without the
allocator's rounding and without what a kernel needs while it runs. Time is the CPU's.
"""
import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
SOURCES = {ROOT, ROOT / "qwen", ROOT / "train", ROOT / "report"}
CUDA = torch.device("cuda", 0)
# Operations with a result that the host has to see, or a shape that depends on values.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount",
    "_unique", "_unique2", "unique_consecutive", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPYING = {"copy_", "_to_copy"}
# Matrix products. A CPU without bfloat16 instructions takes minutes for those of 3B's widths;
# they are computed in float32 there, in which a GPU adds up, too.
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
HAS_BFLOAT16_PRODUCTS = (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
# No kernel runs for these, though the schema does not call them views.
FREE = {
    "detach", "alias", "lift_fresh", "_unsafe_view", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "_local_scalar_dense"}

run_backward = torch.autograd._engine_run_backward
active: "PlayedDevice | None" = None          # the one that is entered now


def on_cuda(device: Any) -> bool:
    """Whether an argument `device` names a CUDA device."""
    return device is not None and torch.device(device).type == "cuda"


def product_in_float32(product: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """A bfloat16 product computed in float32 and rounded once; any other unchanged."""
    if args[0].dtype != torch.bfloat16:
        return product(*args, **kwargs)
    widened = [x.float() if isinstance(x, Tensor) else x for x in args]
    return product(*widened, **kwargs).bfloat16()


def line_of_project() -> str:
    """File and line of the project's code that is running, as in "model.py:12"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent in SOURCES:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the project"


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in a nest of lists, tuples and dicts. (torch's own pytree is slow.)"""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    found = []
    for part in tree:
        found += tensors_in(part)
    return found


def replaced(tree: Any, replace: Callable[[Tensor], Any]) -> Any:
    """The same nest with each tensor replaced."""
    if isinstance(tree, Tensor):
        return replace(tree)
    if isinstance(tree, dict):
        return {name: replaced(part, replace) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [replaced(part, replace) for part in tree]
        return parts if isinstance(tree, list) else tuple(parts)
    return tree


def require(fits: bool, words: str) -> None:
    if not fits:
        raise RuntimeError(f"{words} (at {line_of_project()})")


# ---------------------------------------------------------------- memory

class Memory:
    """Bytes of the storages that tensors of a device hold; OutOfMemoryError above `total`."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.live = 0
        self.peak = 0
        self.holds: Counter[int] = Counter()    # storage -> tensors that hold it

    def take(self, size: int) -> None:
        if self.live + size > self.total:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size:,} bytes; {self.live:,} of "
                f"{self.total:,} are in use (at {line_of_project()})")
        self.live += size
        self.peak = max(self.peak, self.live)


class Hold:
    """One tensor's hold on a storage. The storage's bytes count until the last hold is gone."""

    def __init__(self, memory: Memory, content: Tensor) -> None:
        storage = content.untyped_storage()
        self.memory = memory
        self.size = storage.nbytes()
        self.storage = storage._cdata
        if not memory.holds[self.storage]:
            memory.take(self.size)
        memory.holds[self.storage] += 1

    def __del__(self) -> None:
        # An allocation that failed holds nothing.
        if self.memory.holds[self.storage]:
            self.memory.holds[self.storage] -= 1
            if not self.memory.holds[self.storage]:
                del self.memory.holds[self.storage]
                self.memory.live -= self.size


class Pool:
    """Memory that graphs keep for tensors that live only during a replay."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.size = 0

    def resize(self, size: int) -> None:
        self.memory.live -= self.size
        self.size = 0
        self.memory.take(size)
        self.size = size

    def __del__(self) -> None:
        self.memory.live -= self.size


# ---------------------------------------------------------------- tensors

class PlayedTensor(torch.Tensor):
    """A tensor on the played device; torch's C++ takes it for one on the CPU."""

    content: Tensor
    gpu: "PlayedDevice"

    @staticmethod
    def __new__(
            cls, content: Tensor, gpu: "PlayedDevice",
            requires_grad: bool = False) -> "PlayedTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, content.size(), strides=content.stride(), dtype=content.dtype, device="cpu",
            storage_offset=content.storage_offset(), requires_grad=requires_grad)

    def __init__(
            self, content: Tensor, gpu: "PlayedDevice", requires_grad: bool = False) -> None:
        self.gpu = gpu
        self.set_content(content)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
            cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = tensors_in((args, kwargs))
        gpu = next(x.gpu for x in tensors if isinstance(x, PlayedTensor))
        return gpu.dispatch(func, args, kwargs or {}, tensors)

    def set_content(self, content: Tensor) -> None:
        self.hold = Hold(self.gpu.memory, content)
        self.content = content

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.content.untyped_storage()

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    def tolist(self) -> Any:
        self.gpu.wait("tolist")
        return self.content.tolist()

    def numpy(self, *args: Any, **more: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> "PlayedTensor":
        if id(self) not in memo:
            copied = PlayedTensor(self.content.clone(), self.gpu, self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied.detach(), self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __repr__(self) -> str:
        return f"PlayedTensor({self.content!r})"


def contents(tree: Any) -> Any:
    """The same nest of arguments with plain tensors in place of played ones."""
    return replaced(tree, lambda x: x.content if isinstance(x, PlayedTensor) else x)


class Move(torch.autograd.Function):
    """A copy between host and device; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_device: bool, dtype: torch.dtype) -> Tensor:
        ctx.way_back = isinstance(x, PlayedTensor), x.dtype
        copied = contents(x).detach().to(dtype, copy=True)
        return PlayedTensor(copied, active) if to_device else copied

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return Move.apply(grad, *ctx.way_back), None, None


class FusedRMSNorm(torch.autograd.Function):
    """torch's kernel for CUDA; on the CPU torch would spell it out in six operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        plain = contents([x, weight])

        def run() -> tuple[Tensor, Tensor]:
            x, weight = plain
            scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
            return (x.float() * scale * weight).to(x.dtype), scale
        y, scale = x.gpu.launch("_fused_rms_norm", run, [x, weight])
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs = [grad, *ctx.saved_tensors]
        plain = contents(inputs)

        def run() -> tuple[Tensor, Tensor]:
            grad, x, weight, scale = plain
            normed = x.float() * scale
            to_normed = grad.float() * weight
            mean = (to_normed * normed).mean(-1, keepdim=True)
            to_weight = (grad.float() * normed).flatten(0, -2).sum(0)
            return (scale * (to_normed - normed * mean)).to(x.dtype), to_weight.to(weight.dtype)
        return *grad.gpu.launch("_fused_rms_norm_backward", run, inputs), None


# ---------------------------------------------------------------- graphs

class Graph:
    """Plays torch.cuda.CUDAGraph: the captured steps run again, on the same memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.gpu = active
        # What to run, and the tensors that its results are written to.
        self.steps: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self.made: set[int] = set()           # storages that the graph has made itself
        self.read: dict[int, str] = {}        # the others that it uses, and where
        self.memory_pool: Pool | None = None

    def record(
            self, run: Callable[[], Any], inputs: list[Tensor], results: list[Tensor]) -> None:
        self.steps.append((run, results))
        for x in inputs:
            if isinstance(x, PlayedTensor) and x.hold.storage not in self.made:
                self.read.setdefault(x.hold.storage, line_of_project())
        self.made |= {x.untyped_storage()._cdata for x in results}

    def replay(self) -> None:
        freed = [line for key, line in self.read.items() if key not in self.gpu.memory.holds]
        require(not freed, f"a graph reads memory that was freed since its capture: {freed[:3]}")
        require(self.gpu.capturing is None, "a replay within a capture")
        self.gpu.replays += 1
        for run, targets in self.steps:
            # A step in place has no targets.
            for target, result in zip(targets, tensors_in(run())):
                target.copy_(result)

    def reset(self) -> None:
        self.__init__()

    def pool(self) -> Pool:
        return self.memory_pool


class Stream:
    """Plays torch.cuda.Stream and Event: everything runs at once and in order."""

    def __init__(self, *args: Any, **more: Any) -> None:
        pass

    def wait_stream(self, other: Any = None) -> None:
        pass

    wait_event = record_event = record = wait = wait_stream

    def synchronize(self) -> None:
        active.wait("synchronize")


@contextlib.contextmanager
def capture(graph: Graph, pool: Pool | None = None, **more: Any) -> Iterator[None]:
    """Plays torch.cuda.graph: what changes a tensor is recorded and not run."""
    memory = graph.gpu.memory
    require(graph.gpu.capturing is None, "a capture within a capture")
    graph.memory_pool = pool or Pool(memory)
    # Tensors of a capture use the pool, which grows if they need more.
    kept = graph.memory_pool.size
    graph.memory_pool.resize(0)
    earlier_peak = memory.peak
    memory.peak = memory.live
    graph.gpu.capturing = graph
    graph.gpu.captures += 1
    try:
        yield
    finally:
        graph.gpu.capturing = None
        graph.memory_pool.resize(max(kept, memory.peak - memory.live))
        memory.peak = max(memory.peak, earlier_peak)


# ---------------------------------------------------------------- the device

class PlayedDevice(TorchFunctionMode):
    """A CUDA device during its `with`, and counts of what happened on it, readable at any time.

    syncs: waits of the host for the device, by (operation, line of the project).
    launches, launches_by_name: kernels, altogether and by the operation of aten.
    live_bytes, peak_bytes: of the storages that its tensors hold. Views count once.
    captures, replays: of graphs.
    """

    def __init__(self, total_bytes: int = 80 * 10 ** 9) -> None:
        super().__init__()
        self.memory = Memory(total_bytes)
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.launches_by_name: Counter[str] = Counter()
        self.captures = 0
        self.replays = 0
        self.capturing: Graph | None = None
        self.pinned: set[int] = set()         # data pointers of pinned tensors
        self.instead = {
            torch.Tensor.to: self.to,
            torch.Tensor.cuda: lambda x, *args, **more: self.move(x, True, x.dtype, **more),
            torch.Tensor.cpu: lambda x, *args: self.move(x, False, x.dtype),
            torch.Tensor.pin_memory: self.pin,
            torch.Tensor.data.__set__: self.set_data,
            F.rms_norm: self.rms_norm,
            torch.rms_norm: self.rms_norm,
        }

    @property
    def launches(self) -> int:
        return self.launches_by_name.total()

    @property
    def live_bytes(self) -> int:
        return self.memory.live

    @property
    def peak_bytes(self) -> int:
        return self.memory.peak

    def reset_peak(self) -> None:
        self.memory.peak = self.memory.live

    def __enter__(self) -> "PlayedDevice":
        global active
        require(active is None, "one device is played at a time")
        active = self
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch.multiple(torch.cuda, **self.functions()))
        self.patches.enter_context(
            mock.patch.object(torch.autograd, "_engine_run_backward", self.run_backward))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        global active
        super().__exit__(*error)
        self.patches.close()
        active = None

    def functions(self) -> dict[str, Any]:
        """What takes the place of torch.cuda's functions of these names."""
        def free_and_total(device: Any = None) -> tuple[int, int]:
            return self.memory.total - self.live_bytes, self.memory.total
        return {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "is_bf16_supported": lambda *args: True, "set_device": lambda device: None,
            "get_device_name": lambda *args: "played",
            "get_device_capability": lambda *args: (9, 0),
            "get_device_properties": lambda *args: SimpleNamespace(
                name="played", major=9, minor=0, total_memory=self.memory.total),
            "synchronize": lambda *args: self.wait("synchronize"),
            "Stream": Stream, "Event": Stream, "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: Pool(self.memory),
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "memory_allocated": lambda *args: self.live_bytes,
            "max_memory_allocated": lambda *args: self.peak_bytes,
            "reset_peak_memory_stats": lambda *args: self.reset_peak(),
            "mem_get_info": free_and_total, "empty_cache": lambda: None,
        }

    def wait(self, name: str) -> None:
        """The host waits for the device."""
        require(self.capturing is None,
                f"CUDA error: operation not permitted when stream is capturing: {name}")
        self.syncs[name, line_of_project()] += 1

    # ------------------------------------------------------------ operations of aten

    def dispatch(
            self, func: Callable, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor],
    ) -> Any:
        """One operation; `tensors` are those among its arguments."""
        name = func._schema.name.removeprefix("aten::")
        self.check_devices(name, args, tensors)
        if waits(name, func, args, kwargs):
            self.wait(name)
        run = func
        if name in ATTENTION:
            named = {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs
            check_varlen(named)
            run = ATTENTION[name]
        if name in PRODUCTS and not HAS_BFLOAT16_PRODUCTS:
            run = functools.partial(product_in_float32, func)
        if func.is_view or name in FREE:
            return self.wrap(func(*contents(args), **contents(kwargs)), tensors)
        run = functools.partial(run, *contents(args), **contents(kwargs))
        return self.launch(name, run, tensors, func._schema.is_mutable)

    def check_devices(self, name: str, args: tuple, tensors: list[Tensor]) -> None:
        """As on a GPU: a CPU tensor of no dimension is a number, an index is moved, any other
        is a mistake."""
        if all(isinstance(x, PlayedTensor) or not x.ndim for x in tensors):
            return
        if name in COPYING or name in INDEXING and isinstance(args[0], PlayedTensor):
            self.wait(f"{name}: a copy between host and device")
            return
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu, in {name} (at {line_of_project()})")

    def launch(
            self, name: str, run: Callable[[], Any], inputs: list[Tensor],
            in_place: bool = False) -> Any:
        """Runs a kernel -> its results, on the device.

        inputs: its arguments; in place it changes the first of them."""
        self.launches_by_name[name] += 1
        if self.capturing is None:
            return self.wrap(run(), inputs)
        if in_place:
            self.capturing.record(run, inputs, [])
            return inputs[0]
        # It runs for the shapes of its results; the numbers come with a replay.
        made = run()
        self.capturing.record(run, inputs, tensors_in(made))
        return self.wrap(made, [])

    def wrap(self, results: Any, arguments: list[Tensor]) -> Any:
        """Plain tensors -> played ones; an argument that comes back stays what it is."""
        known = {id(contents(x)): x for x in arguments}
        return replaced(
            results, lambda x: known[id(x)] if id(x) in known else PlayedTensor(x, self))

    # ------------------------------------------------------------ functions of torch

    def __torch_function__(
            self, func: Callable, types: Any, args: tuple = (),
            kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.instead:
            return self.instead[func](*args, **kwargs)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        if on_cuda(kwargs["device"]):
            return self.make(func, args, kwargs)
        # Such as x.new_zeros(2, device="cpu"), of a shape and dtype like x.
        return func(*contents(args), **kwargs)

    def make(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """torch.zeros(3, device="cuda") and the like."""
        name = func.__name__
        if name in ("tensor", "as_tensor", "new_tensor", "asarray"):
            self.wait(f"torch.{name}: a copy from the host's memory")
        requires_grad = kwargs.pop("requires_grad", False)
        run = functools.partial(func, *contents(args), **kwargs | {"device": "cpu"})
        made = self.wrap(run(), []) if name in FREE else self.launch(name, run, tensors_in(args))
        return made.requires_grad_(requires_grad)

    def to(self, x: Tensor, *args: Any, **more: Any) -> Tensor:
        """Tensor.to in all its forms."""
        device = more.pop("device", None)
        dtype = more.pop("dtype", None)
        rest = []
        for value in (*args, *([more.pop("other")] if "other" in more else [])):
            if isinstance(value, Tensor):
                device = value.device
                dtype = value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (str, torch.device)):
                device = torch.device(value)
            elif isinstance(value, bool):
                rest.append(value)
        more |= dict(zip(("non_blocking", "copy"), rest))
        dtype = dtype or x.dtype
        on_device = isinstance(x, PlayedTensor)
        if device is None or on_cuda(device) == on_device:
            if not on_device and device is not None:
                more["device"] = device
            return x.to(dtype=dtype, **more)
        require(torch.device(device).type in ("cpu", "cuda"), f"no copy to {device}")
        return self.move(x, on_cuda(device), dtype, **more)

    def move(
            self, x: Tensor, to_device: bool, dtype: torch.dtype, non_blocking: bool = False,
            **more: Any) -> Tensor:
        """A copy between host and device, or x itself where it is there."""
        if isinstance(x, PlayedTensor) == to_device:
            return x
        # Only a copy from pinned memory goes on while the host does something else.
        if not (non_blocking and x.data_ptr() in self.pinned):
            self.wait("copy to the device" if to_device else "copy to the host")
        return Move.apply(x, to_device, dtype)

    def pin(self, x: Tensor, *args: Any) -> Tensor:
        pinned = x.clone()
        self.pinned.add(pinned.data_ptr())
        return pinned

    def set_data(self, x: Tensor, new: Tensor) -> None:
        """x.data = new. That is how Module.to moves a parameter, which stays the same object."""
        if isinstance(x, PlayedTensor) != isinstance(new, PlayedTensor):
            moved = new.detach().requires_grad_(x.requires_grad)
            if isinstance(x, torch.nn.Parameter):
                moved = torch.nn.Parameter(moved, x.requires_grad)
            torch.utils.swap_tensors(x, moved)
            return
        torch.Tensor.data.__set__(x, new)
        if isinstance(x, PlayedTensor):
            x.set_content(new.content)

    def run_backward(self, *args: Any, **more: Any) -> Any:
        """autograd's engine. A mode is off within the functions that it has been asked about,
        and backward() is one, but what a backward pass computes again must meet it."""
        if self in torch.overrides._get_current_function_mode_stack():
            return run_backward(*args, **more)
        super().__enter__()
        try:
            return run_backward(*args, **more)
        finally:
            super().__exit__(None, None, None)

    def rms_norm(
            self, x: Tensor, shape: Any, weight: Tensor | None = None,
            eps: float | None = None) -> Tensor:
        """One kernel, where torch has one: weight and input of one dtype."""
        fused = isinstance(x, PlayedTensor) and weight is not None and weight.dtype == x.dtype
        if not fused:
            return torch.rms_norm(x, shape, weight, eps)
        return FusedRMSNorm.apply(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)


def waits(name: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a GPU's host waits within this operation."""
    if name in WAITING:
        return True
    if name == "repeat_interleave":
        # Repeats that lie on the device say how long the result is.
        return kwargs.get("output_size") is None and func._overloadname != "self_int"
    if name in INDEXING:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return False


# ---------------------------------------------------------------- the attention kernel

def check_varlen(call: dict[str, Any]) -> None:
    """What mha_varlen_fwd and mha_varlen_bwd check or rely on (torch 2.11 to 2.13).

    call: arguments by their names in aten's schema. Shapes: q (N, H, hd), k and v (M, KV, hd),
    boundaries (sequences + 1,).
    """
    tensors = [x for x in call.values() if isinstance(x, Tensor)]
    require(all(isinstance(x, PlayedTensor) for x in tensors), "tensors must be on CUDA")
    q, k, v = call["query"], call["key"], call["value"]
    for x in (q, k, v, *(call[n] for n in ("grad_out", "out") if n in call)):
        require(x.dtype in (torch.float16, torch.bfloat16),
                "FlashAttention only supports fp16 and bf16")
        require(x.dtype == q.dtype, "query and the others must have the same dtype")
        require(x.ndim == 3 and x.stride(-1) == 1, "the last dimension must be contiguous")
    require(k.shape == v.shape and q.shape[2] == k.shape[2], "shapes of query, key and value")
    require(q.shape[2] % 8 == 0 and q.shape[2] <= 256, "head width: a multiple of 8 up to 256")
    require(q.shape[1] % k.shape[1] == 0, "key heads must divide query heads")
    check_boundaries(call)
    if "logsumexp" in call:
        lse = call["logsumexp"]
        require(lse.dtype == torch.float32 and lse.is_contiguous()
                and lse.shape == (q.shape[1], len(q)), "log-sum-exp: float32 (H, N), contiguous")
        require(call["rng_state"].dtype == torch.uint64, "rng_state is uint64")


def check_boundaries(call: dict[str, Any]) -> None:
    """Boundaries are int32, cover every row, and no sequence is longer than is said."""
    q, k = call["query"], call["key"]
    counts = set()
    for rows, side, which in ((q, "cum_seq_q", "max_q"), (k, "cum_seq_k", "max_k")):
        boundaries = call[side]
        require(boundaries.dtype == torch.int32 and boundaries.is_contiguous(),
                f"{side} must be int32 and contiguous")
        require(boundaries.ndim == 1 and len(boundaries) > 1, f"{side}: no sequence")
        ends = boundaries.content
        require(int(ends[0]) == 0 and int(ends[-1]) == len(rows),
                f"{side}: rows outside of every sequence stay unwritten")
        require(type(call[which]) is int and int(ends.diff().max()) <= call[which],
                f"{which}: rows after it are not computed")
        counts.add(len(ends))
    require(len(counts) == 1, "as many sequences of queries as of keys")
    # With one query a sequence and fewer key heads the kernel reshapes queries by sequence.
    one_each = call["max_q"] == 1 and q.shape[1] > k.shape[1]
    require(not one_each or len(q) == len(call["cum_seq_q"]) - 1,
            "max_q is 1, and a sequence has no query: the kernel's reshape fails")


def sequences(boundaries: Tensor, others: Tensor) -> list[tuple[slice, slice]]:
    """Rows of each sequence's queries and keys; those without a query are left out."""
    starts = zip(boundaries.tolist(), others.tolist())
    ends = zip(boundaries[1:].tolist(), others[1:].tolist())
    pairs = []
    for (q, k), (q_end, k_end) in zip(starts, ends):
        if q_end > q:
            pairs.append((slice(q, q_end), slice(k, k_end)))
    return pairs


def head_copies(x: Tensor, heads: int) -> Tensor:
    """(M, KV, hd) -> (H, M, hd) float32."""
    return x.float().repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)


def scaled_scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """q (L, H, hd), k (M, KV, hd) -> (H, L, M), aligned at the lower right corner."""
    scores = q.float().transpose(0, 1) @ head_copies(k, q.shape[1]).transpose(1, 2)
    scores = scores * q.shape[2] ** -0.5
    if causal:
        L, M = scores.shape[1:]
        unseen = torch.ones(L, M, dtype=torch.bool).triu(M - L + 1)
        scores = scores.masked_fill(unseen, -torch.inf)
    return scores


def varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cum_q: Tensor, cum_k: Tensor, *rest: Any, **more: Any,
) -> tuple[Tensor, ...]:
    """aten::_flash_attention_forward; rows of no sequence are NaN."""
    causal = rest[3]
    out = torch.full_like(q, torch.nan)
    lse = q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
    for rows, keys in sequences(cum_q, cum_k):
        scores = scaled_scores(q[rows], k[keys], causal)                   # (H, L, M)
        values = head_copies(v[keys], q.shape[1])
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
        lse[:, rows] = scores.logsumexp(-1)
    state = torch.zeros(2, dtype=torch.uint64)
    return out, lse, state, torch.zeros((), dtype=torch.uint64), q.new_empty(0)


def varlen_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any,
        **more: Any) -> tuple[Tensor, ...]:
    """aten::_flash_attention_backward -> gradients of q, k and v."""
    cum_q, cum_k, _, _, _, causal = rest[:6]
    shares = [torch.zeros(x.shape) for x in (q, k, v)]
    H = q.shape[1]

    def by_key_head(x: Tensor) -> Tensor:
        """(H, M, hd) -> (M, KV, hd): query heads of one key head add up."""
        return x.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)

    for rows, keys in sequences(cum_q, cum_k):
        weights = (scaled_scores(q[rows], k[keys], causal) - lse[:, rows, None]).exp()
        to_out = grad[rows].float().transpose(0, 1)                        # (H, L, hd)
        mean = (to_out * out[rows].float().transpose(0, 1)).sum(-1, keepdim=True)
        to_weights = to_out @ head_copies(v[keys], H).transpose(1, 2)
        to_scores = weights * (to_weights - mean) * q.shape[2] ** -0.5     # (H, L, M)
        shares[0][rows] += (to_scores @ head_copies(k[keys], H)).transpose(0, 1)
        queries = q[rows].float().transpose(0, 1)
        shares[1][keys] += by_key_head(to_scores.transpose(1, 2) @ queries)
        shares[2][keys] += by_key_head(weights.transpose(1, 2) @ to_out)
    return tuple(share.to(x.dtype) for share, x in zip(shares, (q, k, v)))


ATTENTION = {
    "_flash_attention_forward": varlen_forward, "_flash_attention_backward": varlen_backward,
}
