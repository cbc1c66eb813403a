"""What runs on a GPU, on a played one (played_device.py), compared with the same on the CPU.

Also FSDP2 as on a GPU, with bfloat16 copies of float32 parameters, on the CPU by gloo.
"""
import argparse
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cot
import eval as evaluation
import rft
import sft
from conftest import Run, write_tiny
from data import load, open_image
from model import LanguageModel, QwenVL
from played_device import PlayedDevice
from qwen import generate as sampling
from qwen.generate import generate
from qwen.hub import FAMILIES
from qwen.processor import Processor, Prompt
from readers.base import Records
from train import checkpoints, dist
from train.run import record_at

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 0.03)]


@dataclass
class Setup:
    """A checkpoint, opened on the CPU in float32, and something to ask it."""

    path: Path
    model: QwenVL
    processor: Processor
    records: Records
    prompts: list[Prompt]         # of the first three records

    def completions(self, lengths: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Random ids of these lengths, for the first prompts."""
        random = torch.Generator().manual_seed(0)
        groups = []
        for group in lengths:
            groups.append([torch.randint(0, 200, (n,), generator=random) for n in group])
        return groups


@pytest.fixture(scope="module")
def checkpoint(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `setup` opens: a tiny model of the family that a test names.

    In an "untied " one the head is a tensor of its own."""
    name = getattr(request, "param", "Qwen2.5-VL")
    path = write_tiny(tmp_path_factory.mktemp("tiny"), name.removeprefix("untied "))
    if name.startswith("untied "):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        weights = load_file(path / "model.safetensors")
        [embedding] = [x for key, x in weights.items() if key.endswith("embed_tokens.weight")]
        weights["lm_head.weight"] = embedding.roll(1, 0)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


every_family = pytest.mark.parametrize("checkpoint", FAMILIES.values(), indirect=True)


@pytest.fixture
def setup(checkpoint: Path, dior_root: Path) -> Setup:
    processor = Processor.from_pretrained(checkpoint)
    records = load("dior", dior_root, "train")
    prompts = [processor(open_image(record), record.text) for record in records[:3]]
    model = QwenVL.from_pretrained(checkpoint, torch.float32)
    return Setup(checkpoint, model, processor, records, prompts)


def on_cuda(path: Path, dtype: torch.dtype = torch.float32) -> QwenVL:
    """The checkpoint's model on the played device, to be trained."""
    return QwenVL.from_pretrained(path, dtype, "cuda").requires_grad_(True)


def close(got: Tensor, want: Tensor, within: float) -> bool:
    """Whether the difference of a played tensor is that small a share of what is wanted."""
    difference = got.detach().content.float() - want.detach()
    return bool(difference.norm() <= within * want.norm())


# ---------------------------------------------------------------- scoring

@every_family
@pytest.mark.parametrize("dtype, within", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_and_their_gradient_are_the_cpus(
        setup: Setup, dtype: torch.dtype, within: float, checkpointing: bool) -> None:
    completions = setup.completions([[5, 9, 2], [1, 30, 4], [12, 12, 12]])
    setup.model.requires_grad_(True)
    want, want_entropy = setup.model.score(setup.prompts, completions)
    want.sum().backward()
    with PlayedDevice() as gpu:
        model = on_cuda(setup.path, dtype)
        model.visual.checkpointing = checkpointing
        model.model.checkpointing = checkpointing
        got, entropy = model.score(setup.prompts, completions)
        got.sum().backward()
    assert close(got, want, within) and close(entropy, want_entropy, within)
    errors = []
    norms = []
    for (name, p), host in zip(model.named_parameters(), setup.model.parameters()):
        errors.append((p.grad.content.float() - host.grad).norm())
        norms.append(host.grad.norm())
        # A key's bias shifts all scores of a query alike: its gradient is rounding.
        if "k_proj.bias" not in name:
            assert errors[-1] < 2 * within * norms[-1], name
    assert torch.stack(errors).norm() < within * torch.stack(norms).norm()
    kernels = gpu.launches_by_name["_flash_attention_forward"]
    assert bool(kernels) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("lengths", [[[1, 1], [2, 1]], [[2, 1], [1, 1]], [[1, 1], [1, 1]]])
def test_groups_of_which_little_or_nothing_is_fed_are_scored(
        setup: Setup, lengths: list[list[int]]) -> None:
    """A completion of one token feeds none, and the kernel has a layout of its own for one."""
    completions = setup.completions(lengths)
    want, _ = setup.model.score(setup.prompts[:2], completions)
    with PlayedDevice():
        model = on_cuda(setup.path, torch.bfloat16)
        got, _ = model.score(setup.prompts[:2], completions)
        got.sum().backward()
    assert close(got, want, 0.03)
    assert all(p.grad.content.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- sampling

@pytest.mark.parametrize("dtype, within", DTYPES)
def test_prefill_gives_the_cpus_logits(
        setup: Setup, dtype: torch.dtype, within: float) -> None:
    with torch.no_grad(), PlayedDevice():
        want, _, want_positions = setup.model.prefill(setup.prompts, 2, 4)
        got, cache, positions = on_cuda(setup.path, dtype).prefill(setup.prompts, 2, 4)
        assert close(got, want, within)
        assert positions.tolist() == want_positions.tolist()
        assert cache.completion_k[0].is_cuda


def sample(
        setup: Setup, monkeypatch: pytest.MonkeyPatch, model: QwenVL, tokens: int,
        cuda_graphs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Eight rollouts of each prompt; many ids stop one, so that they end at all lengths."""
    monkeypatch.setattr(model, "stop_ids", tuple(range(10)))
    return generate(model, setup.prompts, 8, tokens, 1.0, torch.arange(3), cuda_graphs)


@every_family
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_sampled_tokens_are_the_cpus(
        setup: Setup, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool) -> None:
    """While the batch shrinks, and over many buckets of the CPU's cache."""
    tokens, logprobs, lengths = sample(setup, monkeypatch, setup.model, 80)
    with PlayedDevice() as gpu:
        got = sample(setup, monkeypatch, on_cuda(setup.path), 80, cuda_graphs)
    assert torch.equal(got[0].content, tokens) and torch.equal(got[2].content, lengths)
    assert torch.allclose(got[1].content, logprobs, atol=1e-5)
    assert lengths.min() < 20 and lengths.max() > 64
    assert (gpu.replays > 60 and gpu.captures >= 2) if cuda_graphs else not gpu.captures


def waits_of_more_tokens(
        setup: Setup, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool = False) -> Counter:
    """Waits for the host in 12 tokens more, between two looks at who has finished."""
    monkeypatch.setattr(sampling, "CHECK_EVERY", 1000)
    counts = []
    for tokens in (8, 20):
        with PlayedDevice() as gpu:
            model = on_cuda(setup.path, torch.bfloat16)
            generate(model, setup.prompts, 4, tokens, 1.0, torch.arange(3), cuda_graphs)
            counts.append(gpu.syncs)
    return counts[1] - counts[0]


@every_family
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_sampled_token_waits_for_no_host(
        setup: Setup, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool) -> None:
    assert not waits_of_more_tokens(setup, monkeypatch, cuda_graphs)


@every_family
def test_a_step_of_64_rollouts_of_256_tokens_waits_40_times_at_most(setup: Setup) -> None:
    args = step_flags(rft, prompts=8, group=8, max_new_tokens=256, cuda_graphs=True)
    records = setup.records[:8]
    prompts = [setup.processor(open_image(record), record.text) for record in records]
    with PlayedDevice() as gpu:
        model = on_cuda(setup.path, torch.bfloat16)
        model.stop_ids = ()
        gpu.syncs.clear()
        policy = rft.Policy(model, setup.processor, None, None)
        groups = rft.sample(policy, records, prompts, torch.arange(8), args)
    shortest = min(len(c) for group in groups for c in group.completions)
    assert shortest == 256 and gpu.syncs.total() <= 40


# ---------------------------------------------------------------- faults that must be seen

def test_a_wait_in_every_token_would_be_seen(
        setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = sampling.draw

    def draw_and_look(logp: Tensor, u: Tensor) -> Tensor:
        assert logp.max().item() <= 0
        return draw(logp, u)
    monkeypatch.setattr(sampling, "draw", draw_and_look)
    waits = waits_of_more_tokens(setup, monkeypatch)
    assert waits.total() == 12
    assert all(line.startswith("generate.py") for _, line in waits)


def test_a_copy_from_the_host_while_a_graph_is_captured_would_be_seen(
        setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LanguageModel.forward

    def forward_with_an_index(
            self: LanguageModel, x: Tensor, positions: Tensor, *more: Any, **named: Any) -> Tensor:
        axes = torch.tensor([0, 1, 2], device=positions.device)
        return forward(self, x, positions[axes], *more, **named)
    monkeypatch.setattr(LanguageModel, "forward", forward_with_an_index)
    with PlayedDevice():
        sample(setup, monkeypatch, on_cuda(setup.path), 4)
        with pytest.raises(RuntimeError, match="stream is capturing: torch.tensor"):
            sample(setup, monkeypatch, on_cuda(setup.path), 4, cuda_graphs=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_index_left_on_the_cpu_would_be_seen(
        setup: Setup, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def embed_on_the_cpu(self: QwenVL, ids: Tensor, *images: Any) -> Tensor:
        return self.model.embed_tokens(ids.cpu())
    monkeypatch.setattr(QwenVL, "embed", embed_on_the_cpu)
    with PlayedDevice(), pytest.raises(RuntimeError, match="on the same device"):
        on_cuda(setup.path, dtype).score(setup.prompts, setup.completions([[2], [3], [4]]))


# ---------------------------------------------------------------- steps of both stages

def step_flags(stage: Any, **changes: Any) -> argparse.Namespace:
    """The stage's flags for a small step, in several micro-batches."""
    flags = vars(stage.flags().parse_args([]))
    flags |= {"prompts": 4, "group": 3, "max_new_tokens": 16, "micro_tokens": 400, "lr": 1e-3}
    return argparse.Namespace(**flags | {"steps": 10, "updates": 2, "data": "dior"} | changes)


def reward_by_letters(group: rft.Group, args: argparse.Namespace) -> rft.Group:
    """Rewards that differ within a group, for a model that has learned nothing."""
    group.reward = torch.tensor([len(c) % 5 / 5 + int(c[0]) % 7 / 7 for c in group.completions])
    group.terms = {name: group.reward / 2 for name in ("iou", *args.reward)}
    group.boxes = torch.full((len(group.reward), 4), torch.nan)
    return group


def rft_step(setup: Setup, model: QwenVL, reference: QwenVL) -> dict[str, Any]:
    opt = dist.optimizer(model, 1e-3)
    policy = rft.Policy(model, setup.processor, opt, reference.requires_grad_(False))
    records = setup.records[:4]
    prompts = [setup.processor(open_image(r), r.text) for r in records]
    line, _ = rft.train_step(policy, records, prompts, step_flags(rft), 0)
    return line


def sft_step(setup: Setup, model: QwenVL, reference: QwenVL) -> dict[str, Any]:
    examples = []
    for record in setup.records[:4]:
        examples.append(sft.make_example(record, setup.processor, lambda r, frame: r.text * 3))
    opt = dist.optimizer(model, 1e-3)
    return [sft.train_step(model, opt, examples, step_flags(sft), step) for step in (0, 1)][-1]


def compare_lines(got: dict[str, Any], want: dict[str, Any], within: float) -> None:
    """Two log lines say the same, but for time and memory."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if not name.startswith(("seconds", "peak", "time", "tokens_per", "sampled_scored")):
            assert math.isclose(got[name], value, rel_tol=within, abs_tol=within), name


@pytest.mark.parametrize("step", [rft_step, sft_step])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_in_float32_is_the_cpus(
        setup: Setup, monkeypatch: pytest.MonkeyPatch, step: Callable, checkpointing: bool,
) -> None:
    """Two updates with the fused optimizer; RFT samples, and has a reference."""
    monkeypatch.setattr(rft, "grade", reward_by_letters)
    reference = QwenVL.from_pretrained(setup.path, torch.float32)
    host = dist.prepare(setup.model, torch.device("cpu"))
    want = step(setup, host, reference)
    with PlayedDevice() as gpu:
        model = QwenVL.from_pretrained(setup.path, None)
        model.visual.checkpointing = model.model.checkpointing = checkpointing
        model = dist.prepare(model, torch.device("cuda"))
        got = step(setup, model, QwenVL.from_pretrained(setup.path, torch.float32, "cuda"))
        assert got["peak_GiB"] == gpu.peak_bytes / 2 ** 30 > 0
    compare_lines(got, want, 1e-4)
    assert gpu.launches_by_name["_fused_adamw_"] == 2
    for (name, p), q in zip(model.named_parameters(), host.parameters()):
        # Adam gives what is rounding alone a full step, in either direction.
        if "k_proj.bias" not in name:
            assert close(p, q, 1e-3), name


@pytest.mark.parametrize("step", [rft_step, sft_step])
def test_a_step_in_bfloat16_learns(
        setup: Setup, monkeypatch: pytest.MonkeyPatch, step: Callable) -> None:
    """With the attention kernel; RFT scores what it sampled as it sampled it."""
    monkeypatch.setattr(rft, "grade", reward_by_letters)
    with PlayedDevice() as gpu:
        reference = QwenVL.from_pretrained(setup.path, torch.bfloat16, "cuda")
        line = step(setup, on_cuda(setup.path, torch.bfloat16), reference)
    assert line["finite"] and line["grad_norm"] > 0 and math.isfinite(line["loss"])
    assert line.get("sampled_scored_max", 0) < 0.3
    assert gpu.launches_by_name["_flash_attention_backward"] > 0


# ---------------------------------------------------------------- validation and checkpoints

def test_a_validation_gives_the_cpus_scores(setup: Setup) -> None:
    args = step_flags(rft)
    want = evaluation.validate(setup.model, setup.processor, setup.records[:3], args)
    with PlayedDevice():
        model = on_cuda(setup.path)
        got = evaluation.validate(model, setup.processor, setup.records[:3], args)
    assert got == want and want


def test_a_checkpoint_of_the_device_is_the_cpus_and_is_restored_there(
        setup: Setup, tmp_path: Path) -> None:
    """Written on the device and on the CPU after the same step, and read on either."""
    def trained(model: QwenVL) -> torch.optim.Optimizer:
        opt = dist.optimizer(model, 1e-3)
        sum(p.square().sum() for p in model.parameters()).backward()
        dist.update(model, opt, 1e-3)
        return opt

    def kept(folder: Path) -> dict[str, Tensor]:
        return load_file(next((folder / "latest" / "state").iterdir()))

    keep = argparse.Namespace(keep=2, keep_weights=None)
    host = dist.prepare(setup.model, torch.device("cpu"))
    checkpoints.save(
        tmp_path / "host", {"step": 1}, host, trained(host), setup.processor, {}, keep)
    with PlayedDevice() as gpu:
        model = on_cuda(setup.path)
        opt = trained(model)
        checkpoints.save(tmp_path / "gpu", {"step": 1}, model, opt, setup.processor, {}, keep)
        restored = on_cuda(setup.path)
        restored_opt = dist.optimizer(restored, 1e-3)
        assert checkpoints.restore(tmp_path / "gpu", restored, restored_opt) == 1
        for a, b in zip(restored.parameters(), model.parameters()):
            assert torch.equal(a, b)
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                assert restored_opt.state[a][kind].is_cuda
                assert torch.equal(restored_opt.state[a][kind], opt.state[b][kind])
        # As many bytes as the run that wrote it.
        del model, opt, a, b
        assert gpu.live_bytes <= 3.01 * sum(p.nbytes for p in setup.model.parameters())
        trained(restored)
    for name, want in kept(tmp_path / "host").items():
        assert torch.allclose(kept(tmp_path / "gpu")[name], want, atol=1e-6), name
    assert checkpoints.restore(tmp_path / "gpu", host, dist.optimizer(host, 1e-3)) == 1


# ---------------------------------------------------------------- FSDP2 in bfloat16

# A stage as a GPU runs it: float32 parameters, bfloat16 copies of them to compute with.
BFLOAT16_STAGE = """
import functools, sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import rft, sft
from train import dist
from train.run import launch
from test_cuda import reward_by_letters
rft.grade = reward_by_letters
dist.prepare = functools.partial(dist.prepare, dtype=torch.bfloat16)
launch({stage}.main)
"""
FLAGS = {
    "sft": ["--split", "train", "--batch", 4, "--val", 2],
    "rft": ["--prompts", 2, "--group", 3, "--updates", 2, "--val", 0, "--beta", 0.1]}


@pytest.fixture
def run_bfloat16(
        setup: Setup, run: Run, dior_root: Path,
        tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """run_bfloat16("sft", out, flag, ...) -> the log of a stage's run on two processes."""
    def run_stage(stage: str, out: Path, *flags: object) -> list[dict[str, Any]]:
        script = tmp_path / f"{stage}.py"
        script.write_text(BFLOAT16_STAGE.format(root=str(Path(__file__).parents[1]), stage=stage))
        done = run(
            script, "--data", "dior", "--root", dior_root, "--init", setup.path, "--out", out,
            "--device", "cpu", "--lr", 1e-3, "--steps", 4, "--every", 2, "--micro-tokens", 400,
            "--max-new-tokens", 12, *FLAGS[stage], *flags, processes=2)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return run_stage


@pytest.mark.parametrize(
    "checkpoint, stage", [("Qwen2.5-VL", "sft"), ("untied Qwen2.5-VL", "rft")],
    indirect=["checkpoint"])
def test_two_processes_train_in_bfloat16_and_resume_to_the_bit(
        setup: Setup, run_bfloat16: Callable, tmp_path: Path, stage: str) -> None:
    out = tmp_path / stage
    lines = run_bfloat16(stage, out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["finite"] and line["grad_norm"] > 0 for line in lines)
    want = read_checkpoint(out)
    assert {x.dtype for name, x in want.items() if name.startswith("rank")} == {torch.float32}
    # As if the run had been interrupted after its second step.
    shutil.rmtree(out / "step_000004")
    (out / "latest").unlink()
    (out / "latest").symlink_to("step_000002")
    resumed = run_bfloat16(stage, out, "--resume")
    for a, b in zip(lines, resumed, strict=True):
        compare_lines(b, a, 0)
    got = read_checkpoint(out)
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name
    if stage == "sft":
        float32 = sft_step_of_run(setup)
        assert math.isclose(lines[0]["loss"], float32["loss"], rel_tol=0.01)
        assert math.isclose(lines[0]["grad_norm"], float32["grad_norm"], rel_tol=0.03)
    else:
        assert max(line["sampled_scored_max"] for line in lines) < 0.3


def read_checkpoint(out: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, by file and name."""
    tensors = {}
    for file in (out / "latest").rglob("*.safetensors"):
        for name, x in load_file(file).items():
            tensors[f"{file.name} {name}"] = x
    return tensors


def sft_step_of_run(setup: Setup) -> dict[str, Any]:
    """The first step of FLAGS["sft"], by one process in float32."""
    write = cot.writer(setup.records, None, False)
    examples = []
    for record in (record_at(setup.records, i, 0) for i in range(4)):
        examples.append(sft.make_example(record, setup.processor, write))
    model = dist.prepare(setup.model, torch.device("cpu"))
    return sft.train_step(model, dist.optimizer(model, 1e-3), examples, step_flags(sft), 0)
