"""The played device itself: it refuses and counts what a GPU would."""
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from played_device import PlayedDevice, PlayedTensor
from qwen.attention import Plan, attention

KiB = 1024


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# ---------------------------------------------------------------- what is refused

def test_tensors_of_two_devices_in_one_operation_are_refused() -> None:
    with PlayedDevice():
        x = torch.ones(3, device="cuda")
        for mixed in (
                lambda: x + torch.ones(3), lambda: torch.cat((torch.ones(1), x)),
                lambda: F.embedding(torch.tensor([0]), torch.ones(2, 2, device="cuda")),
                lambda: x.masked_fill(torch.tensor([True, False, True]), 0.0)):
            with pytest.raises(RuntimeError, match="on the same device.*cuda:0 and cpu"):
                mixed()
        with pytest.raises(TypeError, match="convert cuda:0 device type tensor to numpy"):
            x.numpy()
        # A CPU tensor of no dimension is a number; copies may go from one device to the other.
        assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]
        x[:2] = torch.zeros(2)
        assert x.cpu().tolist() == [0, 0, 1]


def test_every_wait_for_the_host_is_counted_with_its_line() -> None:
    with PlayedDevice() as gpu:
        x = torch.arange(4, device="cuda")
        mask = x > 1
        assert not gpu.syncs
        for waiting in (
                lambda: x.max().item(), lambda: bool(mask.any()), lambda: x.tolist(),
                lambda: x.cpu(), lambda: x[mask], lambda: mask.nonzero(), lambda: int(x[0]),
                lambda: torch.tensor([1], device="cuda"), lambda: torch.ones(2).to("cuda"),
                lambda: x.repeat_interleave(x), torch.cuda.synchronize,
                lambda: x.index_put_((mask,), torch.zeros((), dtype=torch.long, device="cuda"))):
            before = gpu.syncs.total()
            waiting()
            assert gpu.syncs.total() == before + 1
        before = gpu.syncs.total()
        for _ in (x + 1, x[torch.zeros_like(x)], x.cumsum(0), x.repeat_interleave(2),
                  torch.zeros(3, device="cuda"), x.to(torch.float32), x.to("cuda")):
            pass
        pinned = torch.ones(2).pin_memory()
        assert pinned.to("cuda", non_blocking=True).is_cuda
        assert gpu.syncs.total() == before


def captured(step: object, x: Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x)
    return graph


@pytest.mark.parametrize("step, words", [
    (lambda x: x + torch.tensor([1.0, 2.0], device="cuda"), "torch.tensor"),
    (lambda x: x + torch.ones(2).to("cuda"), "copy to the device"),
    (lambda x: x.copy_(torch.ones(2)), "copy_"),
    (lambda x: x.cpu(), "copy to the host"),
    (lambda x: x[x > 0], "index"),
    (lambda x: x * x.max().item(), "_local_scalar_dense")])
def test_a_wait_or_a_copy_while_a_graph_is_captured_is_refused(step: object, words: str) -> None:
    with PlayedDevice() as gpu:
        x = torch.ones(2, device="cuda")
        with pytest.raises(RuntimeError, match=f"not permitted when stream is capturing: {words}"):
            captured(step, x)
        # The device goes on.
        assert gpu.capturing is None and (x + 1).tolist() == [2, 2]


# ---------------------------------------------------------------- graphs

def test_a_graph_runs_again_on_the_same_memory_and_capturing_runs_nothing() -> None:
    with PlayedDevice() as gpu:
        x = torch.tensor([1.0, 2.0], device="cuda")
        total = torch.zeros(2, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (x * 2).view(2, 1) + torch.ones(2, 1, device="cuda")
            total += y[:, 0]
        assert total.tolist() == [0, 0]
        graph.replay()
        assert y.tolist() == [[3], [5]] and total.tolist() == [3, 5]
        x.fill_(0.0)
        graph.replay()
        assert y.tolist() == [[1], [1]] and total.tolist() == [4, 6]
        assert (gpu.captures, gpu.replays) == (1, 2)


def test_a_replay_over_freed_memory_is_refused() -> None:
    with PlayedDevice():
        x = torch.ones(2, device="cuda")
        graph = captured(lambda x: x.add_(1), x)
        graph.replay()
        del x
        with pytest.raises(RuntimeError, match="memory that was freed"):
            graph.replay()


def test_graphs_of_one_pool_share_what_lives_within_a_replay() -> None:
    with PlayedDevice() as gpu:
        x = torch.zeros(256, device="cuda")                                 # 1 KiB

        def chain(x: Tensor) -> Tensor:
            for _ in range(9):
                x = x + 1
            return x
        outputs = []
        graphs = []
        pool = torch.cuda.graph_pool_handle()
        for _ in range(2):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool):
                outputs.append(chain(x))
        # The input, two outputs, and one more for what a chain has in between.
        assert gpu.live_bytes == 4 * KiB
        del graphs, outputs, pool
        assert gpu.live_bytes == KiB



# ---------------------------------------------------------------- bytes and launches

def test_bytes_count_storages_once_and_leave_with_the_last_view() -> None:
    with PlayedDevice() as gpu:
        x = torch.zeros(4, 256, device="cuda")                              # 4 KiB
        views = [x[1], x.T, x.view(-1), x.detach(), x.unbind(0)]
        assert gpu.live_bytes == gpu.peak_bytes == 4 * KiB
        y = x.to(torch.bfloat16)
        assert gpu.live_bytes == 6 * KiB
        del x
        assert gpu.live_bytes == 6 * KiB
        del views
        assert gpu.live_bytes == 2 * KiB and gpu.peak_bytes == 6 * KiB
        gpu.reset_peak()
        assert gpu.peak_bytes == torch.cuda.max_memory_allocated() == 2 * KiB
        y.add_(1)
        assert gpu.peak_bytes == 2 * KiB
        (y + 1) * 2
        assert gpu.peak_bytes == 6 * KiB
        # The host's memory is not the device's.
        host = y.cpu()
        del y
        assert gpu.live_bytes == 0 and len(host) == 4
        # Memory is counted after the `with` as well.
        z = torch.zeros(256, device="cuda")
    del z
    assert gpu.live_bytes == 0


def test_what_a_backward_pass_keeps_is_counted_by_hand() -> None:
    with PlayedDevice() as gpu:
        w = torch.ones(256, 256, device="cuda").requires_grad_()            # 256 KiB
        x = torch.ones(512, 256, device="cuda")                             # 512 KiB
        y = (x @ w).exp()                           # exp keeps its output alone: 512 KiB
        assert gpu.live_bytes == (256 + 512 + 512) * KiB
        y.sum().backward()
        del y
        assert gpu.live_bytes == (256 + 512 + 256) * KiB                    # the gradient
        w.grad = None
        gc.collect()
        assert gpu.live_bytes == (256 + 512) * KiB


def test_more_than_the_device_has_is_out_of_memory() -> None:
    with PlayedDevice(total_bytes=10 * KiB) as gpu:
        x = torch.zeros(2048, device="cuda")                                # 8 KiB
        with pytest.raises(torch.OutOfMemoryError, match="in use"):
            x + 1
        assert gpu.live_bytes == 8 * KiB
        assert torch.cuda.mem_get_info() == (2 * KiB, 10 * KiB)
        del x
        assert torch.zeros(2048, device="cuda").sum().item() == 0


def test_launches_are_counted_by_name_and_views_are_none() -> None:
    with PlayedDevice() as gpu:
        x = torch.zeros(4, 8, device="cuda")
        y = (x.T @ x).view(64)[1:]
        y += 1
        assert gpu.launches_by_name == {"zeros": 1, "mm": 1, "add_": 1} and gpu.launches == 3


# ---------------------------------------------------------------- kernels and gradients

def test_modules_move_and_their_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    x = random(3, 8)
    host(x).square().sum().backward()
    with PlayedDevice():
        played = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
        played.load_state_dict(host.state_dict())
        played = played.to("cuda")
        assert all(p.is_cuda and isinstance(p, nn.Parameter) for p in played.parameters())
        played(x.to("cuda")).square().sum().backward()
        for p, q in zip(played.parameters(), host.parameters()):
            assert torch.equal(p.grad.cpu(), q.grad)
        assert played.double()[0].weight.data.cpu().dtype == torch.float64


def test_a_moved_parameter_stays_the_same_object_and_so_stays_tied() -> None:
    embedding = nn.Embedding(4, 8)
    head = nn.Linear(8, 4, bias=False)
    head.weight = embedding.weight
    with PlayedDevice() as gpu:
        model = nn.ModuleList((embedding, head)).to("cuda")
        assert model[0].weight is model[1].weight and model[1].weight.is_cuda
        assert gpu.live_bytes == 4 * 8 * 4


@pytest.mark.parametrize("lengths, prefix", [
    ([5, 3, 3, 1], []), ([4, 6, 3, 3, 2], [(4, 6), (6, 2)]), ([4, 6, 1, 2], [(4, 3), (6, 0)])])
def test_the_kernel_of_variable_lengths_is_attention_by_pieces(
        lengths: list[int], prefix: list[tuple[int, int]]) -> None:
    """Grouped heads, with a shared prefix and without: outputs and gradients."""
    n = sum(lengths)
    inputs = [random(n, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    grad = random(n, 4, 16)
    leaves = [x.float().requires_grad_() for x in inputs]
    want = attention(*leaves, Plan(lengths, prefix=prefix))
    want.backward(grad)
    with PlayedDevice() as gpu:
        played = [x.to("cuda").requires_grad_() for x in inputs]
        got = attention(*played, Plan(lengths, prefix=prefix, device="cuda"))
        got.backward(grad.to("cuda", torch.bfloat16))
    kernels = 1 + any(tokens for _, tokens in prefix)
    assert gpu.launches_by_name["_flash_attention_forward"] == kernels
    assert gpu.launches_by_name["_flash_attention_backward"] == kernels
    assert (got.content.float() - want).norm() < 0.01 * want.norm()
    for x, leaf in zip(played, leaves):
        assert (x.grad.content.float() - leaf.grad).norm() < 0.02 * leaf.grad.norm()


@pytest.mark.parametrize("change, words", [
    ({"max_q": 2}, "max_q: rows after it"), ({"dtype": torch.float32}, "only supports fp16"),
    ({"ends": [0, 2, 4]}, "outside of every sequence"), ({"width": 12}, "multiple of 8"),
    ({"int": torch.int64}, "must be int32"), ({"where": "cpu"}, "same device|must be on CUDA")])
def test_the_kernel_of_variable_lengths_refuses_what_it_cant_do(change: dict, words: str) -> None:
    given = {"max_q": 3, "dtype": torch.bfloat16, "ends": [0, 2, 5], "width": 16,
             "int": torch.int32, "where": "cuda"} | change
    with PlayedDevice(), pytest.raises(RuntimeError, match=words):
        q = torch.zeros(5, 2, given["width"], dtype=given["dtype"], device="cuda")
        ends = torch.tensor(given["ends"], dtype=given["int"], device=given["where"])
        torch.ops.aten._flash_attention_forward(
            q, q, q, ends, ends, given["max_q"], 3, 0.0, True, False)


def test_the_fused_norm_is_one_launch_with_the_gradient_of_its_formula() -> None:
    x = random(5, 16).requires_grad_()
    weight = random(16).requires_grad_()
    grad = random(5, 16)
    want = F.rms_norm(x, (16,), weight, 1e-6)
    want.backward(grad)
    with PlayedDevice() as gpu:
        played = [t.detach().to("cuda").requires_grad_() for t in (x, weight)]
        gpu.launches_by_name.clear()
        got = F.rms_norm(played[0], (16,), played[1], 1e-6)
        assert gpu.launches_by_name == {"_fused_rms_norm": 1}
        got.backward(grad.to("cuda"))
    assert isinstance(got, PlayedTensor) and torch.allclose(got.content, want, atol=1e-6)
    for t, leaf in zip(played, (x, weight)):
        assert torch.allclose(t.grad.content, leaf.grad, atol=1e-5)
