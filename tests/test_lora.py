"""lora.py against PEFT, merged against unmerged, and both stages with adapters as commands."""
import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import rft
import sft
from conftest import Run, write_tiny
from eval import find_stages
from model import Config, QwenVL
from qwen import lora
from qwen.hub import CheckpointError
from qwen.processor import Processor, Prompt
from tools import bench, merge_lora
from train import dist
from train.flags import parse

# ---------------------------------------------------------------- models, prompts, commands

@pytest.fixture(scope="module", params=["tied", "untied", "Qwen2-VL", "Qwen3-VL"])
def base(
        request: pytest.FixtureRequest, tiny_checkpoint: Path,
        tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, the same with a head of its own, and those of the other families."""
    if request.param == "tied":
        return tiny_checkpoint
    path = tmp_path_factory.mktemp(request.param)
    if request.param != "untied":
        return write_tiny(path, request.param)
    shutil.copytree(tiny_checkpoint, path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(path / "model.safetensors")
    head = torch.randn(272, 64, generator=torch.Generator().manual_seed(5)) / 8
    save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors")
    return path


def with_adapters(base: Path, vision: bool = False, rank: int = 4) -> QwenVL:
    """A base with adapters that are not 0 any more."""
    model = QwenVL.from_pretrained(base, torch.float32)
    lora.add(model, rank, 12.0, vision, seed=0)
    random = torch.Generator().manual_seed(1)
    for layer in lora.adapted(model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=random) * 0.1
    return model


def make_prompt(checkpoint: Path) -> Prompt:
    image = Image.linear_gradient("L").resize((140, 100)).convert("RGB")
    return Processor.from_pretrained(checkpoint)(image, "the red ship")


@torch.no_grad()
def logits(model: QwenVL, prompt: Prompt) -> Tensor:
    """(T, V)"""
    return model(prompt.input_ids[None], None, prompt.pixel_values, prompt.image_grid_thw)[0]


@torch.no_grad()
def peer_logits(theirs: Any, prompt: Prompt, image_id: int) -> Tensor:
    """(T, V) of a transformers model, with PEFT's adapters or without."""
    ids = prompt.input_ids[None]
    return theirs(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(ids == image_id).int()).logits[0]


def open_peer(path: Path) -> Any:
    """A checkpoint in transformers, float32."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32).eval()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def flags(**changes: Any) -> argparse.Namespace:
    """The flags that lora.fit reads."""
    defaults = {"lora": 4, "lora_alpha": None, "lora_vision": False, "freeze_vision": False,
                "seed": 0, "init": "INIT"}
    return argparse.Namespace(**defaults | changes)


def main(script: ModuleType, *flags: object) -> None:
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        script.main()


# ---------------------------------------------------------------- against PEFT

@pytest.mark.parametrize("vision", [False, True])
def test_an_adapter_loads_in_peft_with_equal_logits_on_the_same_layers(
        base: Path, tmp_path: Path, vision: bool) -> None:
    peft = pytest.importorskip("peft")
    model = with_adapters(base, vision)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(open_peer(base), tmp_path)
    prompt = make_prompt(base)
    got = logits(model, prompt)
    assert relative(got, peer_logits(theirs, prompt, model.config.image_id)) < 1e-5
    # The adapters are not nothing, and all of theirs are ours.
    assert relative(got, logits(QwenVL.from_pretrained(base, torch.float32), prompt)) > 0.01
    names = []
    for name, module in theirs.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            names.append(lora.own_name(name))
    assert sorted(names) == sorted(lora.adapted(model))
    # In a layer of the language model, in a block, in a merger.
    in_block = {"Qwen2-VL": 4, "Qwen2.5-VL": 5, "Qwen3-VL": 4}[model.config.family]
    mergers = 1 + len(model.config.vision.deepstack)
    assert len(names) == 2 * 7 + (2 * in_block + mergers * 2) * vision
    # And the way back.
    assert torch.equal(logits(QwenVL.from_pretrained(tmp_path, torch.float32), prompt), got)


def test_an_adapter_of_any_family_loads_in_peft_with_equal_logits(
        tiny_family: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = with_adapters(tiny_family, vision=True)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(open_peer(tiny_family), tmp_path)
    prompt = make_prompt(tiny_family)
    got = logits(model, prompt)
    assert relative(got, peer_logits(theirs, prompt, model.config.image_id)) < 1e-5
    lora.merge(model)
    assert relative(logits(model, prompt), got) < 1e-5


@pytest.mark.parametrize("older", [False, True])
def test_an_adapter_that_peft_made_loads_here(
        tiny_checkpoint: Path, tmp_path: Path, older: bool) -> None:
    """Also with the checkpoint's names, which transformers' modules once had."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "qkv"],
        init_lora_weights=False, lora_dropout=0.1)
    theirs = peft.get_peft_model(open_peer(tiny_checkpoint), config).eval()
    theirs.save_pretrained(tmp_path)
    if older:
        file = tmp_path / "adapter_model.safetensors"
        tensors = {}
        for name, tensor in load_file(file).items():
            name = name.replace(".model.model.language_model.", ".model.model.")
            tensors[name.replace(".model.model.visual.", ".model.visual.")] = tensor
        assert len(tensors) == 2 * 8
        save_file(tensors, file)
    model = QwenVL.from_pretrained(tmp_path, torch.float32)
    # Tokenizer and image processor are the base's: PEFT copies none.
    prompt = make_prompt(tmp_path)
    expected = peer_logits(theirs, prompt, model.config.image_id)
    assert relative(logits(model, prompt), expected) < 1e-5


def test_a_merged_checkpoint_answers_as_the_adapter_does(base: Path, tmp_path: Path) -> None:
    """Written by the command; of a base in bfloat16, in which a merged weight would round."""
    stored = tmp_path / "base"
    half = QwenVL.from_pretrained(base, torch.float32)
    half.stored_dtype = torch.bfloat16
    half.config.raw["torch_dtype"] = "bfloat16"
    half.save_pretrained(stored)
    Processor.from_pretrained(base).save_pretrained(stored)
    with_adapters(stored, vision=True).save_pretrained(tmp_path / "adapter")
    script = subprocess.run(
        [sys.executable, "-m", "tools.merge_lora", tmp_path / "adapter", tmp_path / "whole"],
        capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    unmerged = QwenVL.from_pretrained(tmp_path / "adapter", torch.float32)
    prompt = make_prompt(tmp_path / "whole")
    expected = logits(unmerged, prompt)
    whole = QwenVL.from_pretrained(tmp_path / "whole", dtype=None)
    assert not lora.adapted(whole)
    assert relative(logits(whole, prompt), expected) < 1e-5
    transformers = pytest.importorskip("transformers")
    # As it is: config.json says in which dtype.
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    got = peer_logits(theirs, prompt, whole.config.image_id)
    assert got.dtype == torch.float32 and relative(got, expected) < 1e-5


def test_the_size_of_an_adapter_of_the_3b_model(tmp_path: Path) -> None:
    """By the true shapes, on the meta device: a layer has 5 widths of 2048, 2 of 256 (keys and
    values), 3 of 11008; an adapter of a linear layer has rank x (in + out) numbers."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(bench.SHAPES["3b"]))
    with torch.device("meta"):
        model = QwenVL(Config.from_json(file))
    lora.add(model, 64, 128.0, vision=False, seed=0)
    attention = 2 * (2048 + 2048) + 2 * (2048 + 256)
    mlp = 3 * (2048 + 11008)
    saved = dict(lora.saved_parameters(model))
    assert all(p.is_meta for p in saved.values()) and len(saved) == 2 * 7 * 36
    assert sum(p.numel() for p in saved.values()) == 64 * 36 * (attention + mlp) == 119_734_272


# ---------------------------------------------------------------- start and reference

def score(model: QwenVL, *prompts: Prompt) -> Tensor:
    """(tokens,) log-probabilities of two completions of each prompt."""
    completions = [torch.tensor([70, 80, 90, 258]), torch.tensor([75, 258])]
    return model.score(prompts, [completions] * len(prompts))[0]


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_the_reference_is_the_start_whatever_is_trained(
        monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path, start: str,
) -> None:
    """Also of images that would be split without a gradient."""
    monkeypatch.setattr("model.PATCHES_AT_ONCE", 1)
    init = tiny_checkpoint
    if start == "adapter":
        init = tmp_path
        with_adapters(tiny_checkpoint).save_pretrained(init)
    prompts = [make_prompt(tiny_checkpoint)] * 3
    began = score(QwenVL.from_pretrained(init, torch.float32), *prompts).detach()
    model = QwenVL.from_pretrained(init, dtype=None)
    lora.fit(model, flags())
    lora.keep_start(model)
    lora.choose_trained(model, False, False)
    model = dist.prepare(model, torch.device("cpu"))
    opt = dist.optimizer(model, 1e-2)
    for _ in range(2):
        logp = score(model, *prompts)
        with torch.no_grad(), lora.reference(model):
            reference = score(model, *prompts)
        assert torch.equal(reference, began) and not reference.requires_grad
        logp.sum().backward()
        dist.update(model, opt, 1e-2)
    assert (score(model, *prompts) - began).abs().max() > 0.1
    # A start that is 0 needs no memory.
    kept = {name for name, _ in model.named_buffers() if "start_" in name}
    assert len(kept) == (28 if start == "adapter" else 0)


def test_only_adapters_are_trained_and_their_gradient_is_that_of_the_formula(
        tiny_checkpoint: Path) -> None:
    """Against weights W + alpha / rank B A made by hand: dA = alpha / rank B^T dW, and dB alike."""
    prompt = make_prompt(tiny_checkpoint)
    model = with_adapters(tiny_checkpoint, vision=True)
    lora.choose_trained(model, False, False)
    model = dist.prepare(model, torch.device("cpu"))
    layers = lora.adapted(model)
    score(model, prompt).sum().backward()
    merged = with_adapters(tiny_checkpoint, vision=True)
    lora.merge(merged)
    score(merged, prompt).sum().backward()
    weights = dict(merged.named_parameters())
    for name, layer in layers.items():
        gradient = weights[f"{name}.weight"].grad
        assert relative(layer.lora_A.grad, 3.0 * layer.lora_B.T @ gradient) < 1e-4, name
        assert relative(layer.lora_B.grad, 3.0 * gradient @ layer.lora_A.T) < 1e-4, name
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (".lora_" in name), name


def test_gradient_checkpointing_changes_no_gradient(tiny_checkpoint: Path) -> None:
    prompt = make_prompt(tiny_checkpoint)
    gradients = []
    for checkpointing in (False, True):
        model = with_adapters(tiny_checkpoint, vision=True)
        lora.choose_trained(model, False, checkpointing)
        model = dist.prepare(model, torch.device("cpu"))
        score(model, prompt).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 2 * (14 + 12)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_adapters_begin_by_the_seed_and_as_their_base(tiny_checkpoint: Path) -> None:
    prompt = make_prompt(tiny_checkpoint)
    plain = QwenVL.from_pretrained(tiny_checkpoint, torch.float32)
    made = []
    for seed in (0, 0, 1):
        model = QwenVL.from_pretrained(tiny_checkpoint, torch.float32)
        args = flags(seed=seed)
        lora.fit(model, args)
        assert torch.equal(logits(model, prompt), logits(plain, prompt))
        assert args.lora_alpha == 8
        layer = lora.adapted(model)["model.layers.1.mlp.down_proj"]
        assert layer.lora_A.abs().max() <= 128 ** -0.5 and layer.lora_A.std() > 0.04
        made.append(layer.lora_A)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


# ---------------------------------------------------------------- bfloat16 on two processes

BFLOAT16 = """
import sys
from pathlib import Path
import torch
sys.path[:0] = [{root!r}, {tests!r}]
import model as model_module
from qwen import lora
from train import dist
from model import QwenVL
from test_lora import flags, make_prompt, score

base, adapter, out = map(Path, sys.argv[1:])
device = dist.start("cpu")
# Without a gradient each image would be a pass of its own.
model_module.PATCHES_AT_ONCE = 1
model = QwenVL.from_pretrained(adapter, dtype=None)
lora.fit(model, flags())
lora.keep_start(model)
lora.choose_trained(model, False, True)
model = dist.prepare(model, device, dtype=torch.bfloat16)
for name, p in model.named_parameters():
    assert p.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
prompt = make_prompt(base)
prompts = [prompt] * (1 + dist.rank())
logp = score(model, *prompts)
with torch.no_grad(), lora.reference(model):
    before = score(model, *prompts)
assert not before.requires_grad
assert torch.equal(before, logp.detach())
logp.sum().backward()
gradients = {{n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}}
if dist.rank() == 0:
    torch.save(gradients, out)
opt = dist.optimizer(model, 1e-2)
dist.update(model, opt, 1e-2)
with dist.gathered(model) as sampler, torch.no_grad():
    logits, _, _ = sampler.prefill([prompt], 1, 4)
assert logits.dtype == torch.bfloat16
with torch.no_grad(), lora.reference(model):
    assert torch.equal(score(model, *prompts), before)
assert not torch.equal(score(model, *prompts).detach(), before)
torch.distributed.destroy_process_group()
"""


def test_a_base_in_bfloat16_under_float32_adapters_on_two_processes(
        run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As on CUDA. One process scores a prompt, the other twice: the gradient is three times that
    of one. And unequal numbers of images make equally many passes, or this would hang."""
    with_adapters(tiny_checkpoint).save_pretrained(tmp_path / "adapter")
    script = tmp_path / "script.py"
    root = Path(dist.__file__).parents[1]
    script.write_text(BFLOAT16.format(root=str(root), tests=str(root / "tests")))
    done = run(script, tiny_checkpoint, tmp_path / "adapter", tmp_path / "gradients", processes=2)
    assert done.returncode == 0, done.stderr
    gradients = torch.load(tmp_path / "gradients")
    model = QwenVL.from_pretrained(tmp_path / "adapter", torch.float32)
    lora.choose_trained(model, False, False)
    score(model, make_prompt(tiny_checkpoint)).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert gradients[name].dtype == torch.float32
            assert relative(gradients[name] / 3, p.grad) < 0.1, name


# ---------------------------------------------------------------- the stages

@pytest.fixture(scope="module")
def taught(
        tiny_checkpoint: Path, dior_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights trained, until it answers in the format: the base of the adapters below."""
    out = tmp_path_factory.mktemp("taught") / "sft"
    main(sft, "--data", "dior", "--root", dior_root, "--init", tiny_checkpoint, "--out", out,
         "--steps", 60, "--batch", 8, "--micro-tokens", 10 ** 6, "--lr", 5e-3, "--answer-only",
         "--val", 0, "--every", 60, "--device", "cpu")
    return out


@pytest.fixture(scope="module")
def sft_flags(taught: Path, dior_root: Path) -> list[object]:
    return ["--data", "dior", "--root", dior_root, "--init", taught, "--steps", 4, "--batch", 4,
            "--micro-tokens", 400, "--lr", 3e-3, "--answer-only", "--val", 1, "--every", 2,
            "--max-new-tokens", 8, "--device", "cpu", "--lora", 4, 12]


@pytest.fixture(scope="module")
def adapter(
        sft_flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage of sft.py that has trained adapters."""
    out = tmp_path_factory.mktemp("adapter") / "sft"
    main(sft, *sft_flags, "--out", out)
    return out


@pytest.fixture(scope="module")
def rft_flags(adapter: Path, dior_root: Path) -> list[object]:
    return ["--data", "dior", "--root", dior_root, "--init", adapter, "--prompts", 4,
            "--group", 4, "--micro-tokens", 800, "--max-new-tokens", 60, "--lr", 1e-3,
            "--val", 1, "--steps", 3, "--every", 2, "--device", "cpu",
            "--reward", "iou=1", "positional=0.5", "format=0"]


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapters(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def interrupt(out: Path, copy: Path, step: int) -> None:
    """A copy of a run, as if it had been interrupted after an earlier step."""
    shutil.copytree(out, copy, symlinks=True)
    (copy / "latest").unlink()
    (copy / "latest").symlink_to(f"step_{step:06d}")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Equal to the tolerance; at 0 bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def assert_close_logs(a: Path, b: Path, names: tuple[str, ...]) -> None:
    for line_a, line_b in zip(read_log(a), read_log(b), strict=True):
        for name in names:
            assert math.isclose(line_a[name], line_b[name], rel_tol=1e-3, abs_tol=1e-5), name


def test_sft_with_adapters_saves_them_alone(taught: Path, adapter: Path) -> None:
    step = (adapter / "latest").resolve()
    files = {p.name for p in step.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "run.json", "tokenizer.json",
            "preprocessor_config.json", "manifest.json", "state"} == files
    tensors = adapters(step)
    assert len(tensors) == 28 and all(".lora_" in name for name in tensors)
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    [state] = (step / "state").iterdir()
    kinds = load_file(state).keys()
    assert len(kinds) == 3 * 28 and all(".lora_" in name for name in kinds)
    config = json.loads((step / "adapter_config.json").read_text())
    # A stage's folder gains steps: the base is the step that it was.
    assert config["base_model_name_or_path"] == str((taught / "step_000060").resolve())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert [stage.folder.name for stage in find_stages(adapter.parent)] == ["step_000004"]


def test_sft_with_adapters_on_two_processes_and_resumed(
        run: Run, sft_flags: list[object], adapter: Path, tmp_path: Path) -> None:
    straight = adapters(adapter / "latest")
    two = tmp_path / "two"
    script = run("sft.py", *sft_flags, "--out", two, processes=2)
    assert script.returncode == 0, script.stderr
    assert_close_logs(adapter, two, ("loss", "grad_norm"))
    assert_same(adapters(two / "latest"), straight, 1e-4)

    interrupt(adapter, tmp_path / "resumed", 2)
    main(sft, "--out", tmp_path / "resumed", "--resume")
    assert_same(adapters(tmp_path / "resumed" / "latest"), straight, 0)
    losses = [line["loss"] for line in read_log(adapter)]
    assert [line["loss"] for line in read_log(tmp_path / "resumed")] == losses

    # Two processes' state is read by one.
    interrupt(two, tmp_path / "one", 2)
    main(sft, "--out", tmp_path / "one", "--resume")
    assert_same(adapters(tmp_path / "one" / "latest"), straight, 1e-4)


def test_rft_trains_an_adapter_on_next_to_its_start(
        run: Run, taught: Path, rft_flags: list[object], tmp_path: Path) -> None:
    one = tmp_path / "one"
    main(rft, *rft_flags, "--lora", 4, "--out", one)
    log = read_log(one)
    assert log[0]["kl"] == 0 < log[1]["kl"]
    assert any(line["advantage"] > 0 for line in log)
    assert all(line["sampled_scored_max"] < 1e-4 for line in log)
    straight = adapters(one / "latest")
    config = json.loads((one / "latest" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((taught / "step_000060").resolve())
    run_flags = json.loads((one / "latest" / "run.json").read_text())["flags"]
    # As the adapter has it, though no flag said so.
    assert run_flags["lora_alpha"] == config["lora_alpha"] == 12

    two = tmp_path / "two"
    script = run("rft.py", *rft_flags, "--lora", 4, "--out", two, processes=2)
    assert script.returncode == 0, script.stderr
    assert_close_logs(one, two, ("reward", "loss", "grad_norm", "kl", "entropy", "length"))
    assert read_log(two)[0]["kl"] == 0
    assert_same(adapters(two / "latest"), straight, 1e-3)

    interrupt(one, tmp_path / "resumed", 2)
    main(rft, "--out", tmp_path / "resumed", "--resume")
    assert_same(adapters(tmp_path / "resumed" / "latest"), straight, 0)
    assert read_log(tmp_path / "resumed")[2]["kl"] == log[2]["kl"]

    script = run("eval.py", one, "--device", "cpu", "--max-new-tokens", 60)
    assert script.returncode == 0, script.stderr
    row = json.loads((one / "eval" / "eval.json").read_text())["rows"][0]
    assert row["data"] == "dior" and row["n"] == 4


def test_rft_with_adapters_from_a_bare_base(
        taught: Path, rft_flags: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(rft, *rft_flags, "--init", taught, "--lora", 2, "--lora-vision", "--out", out)
    log = read_log(out)
    assert log[0]["kl"] == 0 < log[1]["kl"]
    assert len(adapters(out / "latest")) == 2 * (14 + 12)


def test_rft_of_all_weights_begins_at_the_merged_adapter(
        adapter: Path, rft_flags: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(rft, *rft_flags, "--lr", 1e-9, "--out", out)
    assert read_log(out)[0]["kl"] == 0
    prompt = make_prompt(adapter)
    model = QwenVL.from_pretrained(out, torch.float32)
    assert not lora.adapted(model) and (out / "latest" / "model.safetensors").exists()
    expected = logits(QwenVL.from_pretrained(adapter, torch.float32), prompt)
    assert relative(logits(model, prompt), expected) < 1e-5


def test_a_second_model_is_opened_for_a_reference_without_adapters_alone(
        monkeypatch: pytest.MonkeyPatch, adapter: Path) -> None:
    opened = []
    open_model = rft.open_model

    def count(*args: Any, **more: Any) -> tuple[QwenVL, Processor]:
        opened.append(args)
        return open_model(*args, **more)
    monkeypatch.setattr(rft, "open_model", count)
    for rank, models in ((4, 1), (None, 2)):
        opened.clear()
        args = rft.flags().parse_args(["--device", "cpu"])
        args.lora, args.init = rank, str(adapter)
        policy = rft.open_policy(adapter, args, [])
        assert len(opened) == models
        assert (policy.reference is policy.model) == (rank is not None)


# ---------------------------------------------------------------- mistakes

def change_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("changes, words", [
    ({"use_dora": True}, "use_dora is True, a kind of adapter that is not implemented"),
    ({"use_rslora": True}, "use_rslora is True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is \\['lm_head'\\]"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"a_kind_of_tomorrow": {"x": 1}}, "a_kind_of_tomorrow is"),
    ({"r": 8}, "lora_A of .* is \\(4, (\\d+)\\), but base and rank ask for \\(8, \\1\\)"),
    ({"r": None}, "r is None and lora_alpha 12"),
    ({"base_model_name_or_path": "Qwen/none"}, "the base checkpoint 'Qwen/none' is not there"),
    ({"base_model_name_or_path": None}, "the base checkpoint '' is not there"),
])
def test_an_adapter_that_is_not_implemented_or_has_no_base_is_named(
        tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with_adapters(tiny_checkpoint).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words) as error:
        QwenVL.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def drop(tensors: dict[str, Tensor]) -> None:
    tensors.popitem()


def rename(tensors: dict[str, Tensor]) -> None:
    name, tensor = tensors.popitem()
    tensors["base_model.model.lm_head.lora_A.weight"] = tensor


def widen(tensors: dict[str, Tensor]) -> None:
    name, tensor = tensors.popitem()
    tensors[name] = torch.zeros(len(tensor), 65)


@pytest.mark.parametrize("harm, words", [
    (drop, "lora_[AB] of model.* is missing"),
    (rename, "lm_head.lora_A.weight is not an adapter of a linear layer"),
    (widen, "but base and rank ask for"),
    (dict.clear, "it holds no adapter"),
])
def test_tensors_that_do_not_fit_are_named(
        tiny_checkpoint: Path, tmp_path: Path, harm: Callable[[dict[str, Tensor]], None],
        words: str) -> None:
    with_adapters(tiny_checkpoint).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=words):
        QwenVL.from_pretrained(tmp_path)


def test_an_adapter_without_its_weights_or_with_no_json_is_named(
        tiny_checkpoint: Path, tmp_path: Path) -> None:
    with_adapters(tiny_checkpoint).save_pretrained(tmp_path)
    for content in (b"\x08", None):
        file = tmp_path / "adapter_model.safetensors"
        file.unlink()
        if content:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            QwenVL.from_pretrained(tmp_path)
    shutil.copy(tiny_checkpoint / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="adapter_config.json is next to whole weights"):
        QwenVL.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for text, words in (("{", "not a readable"), ("[]", "JSON object .a list")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            QwenVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes, words", [
    ({"lora": 8}, "--lora 8, but the adapter in INIT has rank 4"),
    ({"lora_alpha": 3.0}, "--lora 4 3.0, but the adapter in INIT has alpha 12"),
    ({"lora_vision": True}, "--lora-vision, but the adapter in INIT has none in the vision"),
])
def test_flags_that_ask_for_another_adapter_than_the_starts_are_refused(
        tiny_checkpoint: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        lora.fit(with_adapters(tiny_checkpoint), flags(**changes))


def test_an_adapter_with_vision_is_not_frozen_in_part(tiny_checkpoint: Path) -> None:
    args = flags()
    lora.fit(with_adapters(tiny_checkpoint, vision=True), args)
    assert args.lora_vision and args.lora_alpha == 12
    with pytest.raises(CheckpointError, match="--freeze-vision, but the adapter in INIT has some"):
        lora.fit(with_adapters(tiny_checkpoint, vision=True), flags(freeze_vision=True))


@pytest.mark.parametrize("typed, words", [
    ("--lora 0", "--lora: 0 is not a whole number from 1"),
    ("--lora-vision", "--lora-vision without --lora"),
    ("--lora 8 nan", "--lora: nan is not a number"),
    ("--lora 8 16 4", "--lora: 4: too many values"),
    ("--lora 8 --lora-vision --freeze-vision", "--lora-vision trains what --freeze-vision freezes"),
])
def test_flags_that_do_not_go_together_are_one_line(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, typed: str, words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["sft.py", *typed.split()])
    with pytest.raises(SystemExit) as leaving:
        parse(sft.flags(), "sft")
    lines = capsys.readouterr().err.strip().splitlines()
    assert leaving.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_merge_needs_an_adapter_and_an_empty_folder(
        capsys: pytest.CaptureFixture, tiny_checkpoint: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    with_adapters(tiny_checkpoint).save_pretrained(adapter)
    with pytest.raises(CheckpointError, match="holds no adapter: there is nothing to merge"):
        main(merge_lora, tiny_checkpoint, tmp_path / "whole")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        main(merge_lora, tmp_path / "none", tmp_path / "whole")
    with pytest.raises(SystemExit):
        main(merge_lora, adapter, tmp_path)
    assert "is not empty; name another folder" in capsys.readouterr().err
