"""What several tests share.

Small random checkpoints in hub layout, a folder in DIOR-RSVG's layout, and a way to run a script.
"""
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import distributed as dist
from torch import nn

from model import Config, QwenVL
from qwen.answer import THINK
from qwen.hub import FAMILIES
from qwen.processor import WORDS

HERE = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess]
PROCESSORS = {
    "Qwen2-VL": "Qwen2VLProcessor", "Qwen2.5-VL": "Qwen2_5_VLProcessor",
    "Qwen3-VL": "Qwen3VLProcessor"}
ADDED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

# NIGHTLY=1 bash test.sh: many more random cases than fit a quick run.
NIGHTLY = os.environ.get("NIGHTLY") == "1"


def pytest_configure() -> None:
    """Tests on random cases: the same few each time, or 10,000 others with NIGHTLY=1.

    No proxy of this machine stands between a test and its server.
    """
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:
        # Each of these tests skips itself.
        return
    common = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
    settings.register_profile("brief", max_examples=50, derandomize=True, **common)
    settings.register_profile("nightly", max_examples=10_000, **common)
    settings.load_profile("nightly" if NIGHTLY else "brief")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Each test draws the same random numbers every time, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL of two layers with a tokenizer of single bytes; stored in float32.

    Ids 264 to 271 have no text.
    """
    return write_tiny(tmp_path_factory.mktemp("tiny"), "Qwen2.5-VL")


@pytest.fixture(scope="session", params=FAMILIES.values())
def tiny_family(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_checkpoint of each family in turn."""
    return write_tiny(tmp_path_factory.mktemp(request.param), request.param)


def write_tiny(path: Path, family: str) -> Path:
    """A tiny checkpoint of one of model.FAMILIES -> its folder."""
    tokenizer = byte_tokenizer()
    if family == "Qwen3-VL":
        # Its vocabulary has these two, as ordinary tokens.
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in THINK])
    tokenizer.save(str(path / "tokenizer.json"))
    processor = {
        "processor_class": PROCESSORS[family], "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "min_pixels": 3136, "max_pixels": 100352,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    if family == "Qwen3-VL":
        del processor["min_pixels"], processor["max_pixels"]
        processor |= {
            "patch_size": 16, "size": {"shortest_edge": 4096, "longest_edge": 131072},
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "config.json").write_text(json.dumps(tiny_config(tokenizer, family)))
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.manual_seed(0)
    model = QwenVL(Config.from_json(path / "config.json"))
    model.stored_dtype = torch.float32
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.1 if "embed" in name else p[0].numel() ** -0.5)
    model.save_pretrained(path)
    return path


def byte_tokenizer() -> Tokenizer:
    """Qwen's tokenizer without its merges: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ADDED])
    return tokenizer


def tiny_config(tokenizer: Tokenizer, family: str = "Qwen2.5-VL") -> dict:
    """config.json as the hub has it: flat, but for Qwen3-VL's."""
    ids = {token: tokenizer.token_to_id(token) for token in ADDED}
    whole = {
        "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "torch_dtype": "float32", "tie_word_embeddings": True,
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"]}
    text = {
        "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 272,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "eos_token_id": ids["<|im_end|>"]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 64, "in_chans": 3, "patch_size": 14, "temporal_patch_size": 2,
        "spatial_merge_size": 2}
    if family == "Qwen2.5-VL":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    if family == "Qwen2-VL":
        whole |= {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
        vision |= {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64}
    if family == "Qwen3-VL":
        whole |= {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
        rope = {"mrope_interleaved": True, "mrope_section": [4, 4, 4], "rope_type": "default"}
        text |= {"head_dim": 24, "attention_bias": False, "rope_scaling": rope}
        vision |= {
            "patch_size": 16, "in_channels": 3, "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0], "hidden_act": "gelu_pytorch_tanh"}
        return {**whole, "text_config": text, "vision_config": vision}
    return {**whole, **text, "vision_config": vision}


@pytest.fixture(scope="session")
def dior_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIOR-RSVG's layout: 8 images of 120 x 90 with three rectangles each.

    Of an image's objects the first two are for train, the third for val or test.
    """
    root = tmp_path_factory.mktemp("dior")
    (root / "Annotations").mkdir()
    (root / "JPEGImages").mkdir()
    rng = np.random.default_rng(0)
    splits = {"train": [], "val": [], "test": []}
    index = 0
    for i in range(1, 9):
        image = Image.new("RGB", (120, 90), (90, 110, 80))
        tags = ""
        for j, color in enumerate(("red", "blue", "white")):
            tags += draw_ship(image, color, rng)
            split = ("train", "train", "val" if i % 2 else "test")[j]
            splits[split].append(index)
            index += 1
        image.save(root / "JPEGImages" / f"{i:05d}.jpg")
        (root / "Annotations" / f"{i:05d}.xml").write_text(
            f"<annotation><filename>{i:05d}.jpg</filename>{tags}</annotation>")
    for name, indices in splits.items():
        (root / f"{name}.txt").write_text("\n".join(map(str, indices)) + "\n")
    return root


def draw_ship(image: Image.Image, color: str, rng: np.random.Generator) -> str:
    """Draws a rectangle at random -> its annotation."""
    x = int(rng.integers(0, 80))
    y = int(rng.integers(0, 60))
    w = int(rng.integers(12, 40))
    h = int(rng.integers(10, 30))
    ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=color)
    return (
        f"<object><name>ship</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax>"
        f"<ymax>{y + h}</ymax></bndbox><description>the {color} ship</description></object>")


# ---------------------------------------------------------------- commands

def serve() -> None:
    """Reads orders, a JSON list a line; answers with a JSON line each.

    ["start", job] forks a process that does a job of do(), and answers with its id;
    ["wait", ids] answers with their exit statuses, negative where a signal ended one.
    """
    # What each command would load by itself, seconds long.
    for name in ("sft", "rft", "torch._dynamo"):
        importlib.import_module(name)
    for line in sys.stdin:
        order, what = json.loads(line)
        if order == "start":
            answer = os.fork()
            if answer == 0:
                do(what)
        else:
            answer = exit_statuses(what)
        print(json.dumps(answer), flush=True)


def exit_statuses(pids: Sequence[int]) -> list[int]:
    """Waits for the processes of one run; when one fails, the others are told to end.

    What hangs is killed.
    """
    until = time.monotonic() + 300
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        time.sleep(0.005)
        for pid in set(pids) - set(statuses):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid]:
                    send(signal.SIGTERM, set(pids) - set(statuses))
        if time.monotonic() > until:
            send(signal.SIGKILL, set(pids) - set(statuses))
    return [statuses[pid] for pid in pids]


def send(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        os.kill(pid, number)


def do(job: dict[str, Any]) -> None:
    """Becomes `python SCRIPT FLAGS`, with its output in files."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    out, err = (os.open(job[to], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for to in ("stdout", "stderr"))
    for descriptor, source in enumerate((nothing, out, err)):
        os.dup2(source, descriptor)
    os.environ.clear()
    os.environ |= job["environment"]
    # The interpreter has read it before.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=os.environ.get("PYTHONIOENCODING"))
    os.chdir(job["cwd"])
    if job["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"],) * 2)
    script = Path(job["script"]).absolute()
    sys.argv = [job["script"], *job["flags"]]
    sys.path[0] = str(script.parent)
    if job["spoil"]:
        stage = importlib.import_module(script.stem)
        names = {
            "stage": "", "runtime": "train.run", "dist": "train.dist",
            "checkpoints": "train.checkpoints", "base": "readers.base"}
        modules = {name: importlib.import_module(path or script.stem)
                   for name, path in names.items()}
        exec(job["spoil"], modules)
        runtime = modules["runtime"]
        runtime.launch(stage.main, catch_signals=True)
    runpy.run_path(job["script"], run_name="__main__")
    sys.exit()


class Forks:
    """Commands as forks of a process that has torch loaded: they start in a moment.

    They compute on the CPU with one thread a process.
    """

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=self.environment() | {"PYTHONPATH": str(HERE)})
        # Where the processes of each run find each other, which outlive them as torchrun's do.
        self.stores: list[dist.TCPStore] = []

    @staticmethod
    def environment() -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def ask(self, order: str, what: Any) -> Any:
        self.server.stdin.write(json.dumps([order, what]) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def ranks(self, count: int) -> list[dict[str, str]]:
        """What torchrun has in the environment of each of a run's processes."""
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.stores.append(store)
        common = {
            "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]

    def start(
            self, script: Path | str, *flags: object, stdout: Path, stderr: Path | None = None,
            cwd: Path = HERE, environment: dict[str, str] | None = None, file_bytes: int = 0,
            spoil: str = "") -> int:
        """Starts a script -> its process id.

        script: as a user would type it in `cwd`.
        stderr: where None, stdout's file. file_bytes: no file may grow larger; 0: any may.
        spoil: code that runs before the script's main(), with its module as `stage`.
        """
        job = {"script": str(script), "flags": [str(flag) for flag in flags], "cwd": str(cwd),
               "stdout": str(stdout), "stderr": str(stderr or stdout), "file_bytes": file_bytes,
               "environment": self.environment() | (environment or {}), "spoil": spoil}
        return self.ask("start", job)

    def wait(self, *pids: int) -> list[int]:
        """The exit statuses of a run's processes, negative where a signal ended one.

        When one of them fails, the others are told to end, as torchrun does.
        """
        return self.ask("wait", pids)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.server.stdin.close()
    forks.server.wait()


@pytest.fixture(scope="session")
def run(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run("sft.py", "--steps", 3, processes=2) -> CompletedProcess of the real command.

    With a number of processes they are started as torchrun starts them; an exit status that
    is not 0 counts, and the outputs stand one behind the other.
    """
    def run(
            script: Path | str, *flags: object, processes: int | None = None, cwd: Path = HERE,
    ) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("run")
        environments = forks.ranks(processes) if processes else [{}]
        outputs = []
        for i in range(len(environments)):
            outputs.append((folder / f"stdout_{i}", folder / f"stderr_{i}"))
        pids = []
        for environment, (stdout, stderr) in zip(environments, outputs):
            pids.append(forks.start(
                HERE / script, *flags, stdout=stdout, stderr=stderr, cwd=cwd,
                environment=environment))
        statuses = forks.wait(*pids)
        return subprocess.CompletedProcess(
            # What failed by itself counts before what a signal ended.
            [str(script), *flags], max(statuses) or min(statuses),
            "".join(stdout.read_text() for stdout, _ in outputs),
            "".join(stderr.read_text() for _, stderr in outputs))
    return run


if __name__ == "__main__":
    serve()
