"""What the commands write, as hashes: run before and after a change that should change nothing.

    python tests/golden.py OUT                  all cases, one thread, about five minutes
    python tests/golden.py OUT --only sft eval  the cases whose names begin so
    python tests/golden.py OUT --repo OTHER     the commands of another checkout
    diff BEFORE/golden.json AFTER/golden.json

Weights are hashed by tensor. Seconds, memory and folders are left out of logs. The hashes belong
to one processor and one version of torch.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from safetensors import safe_open

HERE = Path(__file__).resolve().parent.parent
COMMON = "--data synth --device cpu --val 8 --max-new-tokens 48"
SFT = f"{COMMON} --init toy/base --steps 20 --every 10 --batch 4 --lr 1e-3"
RFT = f"{COMMON} --init toy/base --steps 6 --every 3 --prompts 4 --group 4 --lr 1e-4"
FANCY = "--resample 2 --minibatches 2 --updates 2 --ratio sequence --temperature 0.8"
MORE = "--loss grpo --weighting shuffled --no-std --mask-truncated --freeze-vision --beta 0"
STAGES = {
    "sft": f"sft.py {SFT}",
    "sft-lora": f"sft.py {SFT} --lora 8 --lora-vision",
    "sft-answer": f"sft.py {SFT} --answer-only --freeze-vision --micro-tokens 200",
    "rft": f"rft.py {RFT}",
    "rft-fancy": f"rft.py {RFT} {FANCY}",
    "rft-lora": f"rft.py {RFT} --lora 8",
    "rft-more": f"rft.py {RFT} {MORE}",
    "rft-terms": f"rft.py {RFT} --loss dr-grpo --reward iou=1 giou=1 diou=1 center=1 positional=1 "
                 "format=0 --weighting variance --gradient-checkpointing",
}
# Run after the stages; {out} is the output folder.
READERS = {
    "eval-rft": "eval.py {out}/rft --limit 24 --max-new-tokens 48 --out {out}/eval-rft",
    "eval-all": "eval.py {out}/sft --limit 12 --temperature 0 1 --samples 4 --max-new-tokens 48 "
                "--out {out}/eval-all",
    "eval-blind": "eval.py {out}/rft-lora --limit 12 --blind --max-new-tokens 48 "
                  "--out {out}/eval-blind",
    "eval-predictions": "eval.py --predictions {out}/eval-all/predictions_sft.jsonl --data synth "
                        "--limit 12 --out {out}/eval-predictions",
    "eval-dior": "eval.py {out}/sft --data dior --root {out}/dior --max-new-tokens 48 "
                 "--out {out}/eval-dior",
    "data-synth": "data.py synth --out {out}/synth.png",
    "data-dior": "data.py dior --root {out}/dior --out {out}/dior.png",
    "data-jsonl": "data.py jsonl --root {out}/jsonl --out {out}/jsonl.png",
    "data-shared": "data.py dior jsonl --root {out} --out {out}/shared.png",
    "cot-synth": "cot.py synth --out {out}/cot-synth.png",
    "cot-dior": "cot.py dior --root {out}/dior --init toy/base --out {out}/cot-dior.png",
    "cot-teacher": "cot.py synth --teacher toy/base --limit 8 --max-new-tokens 48 "
                   "--out {out}/teacher.jsonl --device cpu",
    "plan": "rft.py --init toy/base --plan 1 80 800 800",
    "plan-sft": "sft.py --init toy/base --plan 2 --lora 8",
}
MISTAKES = {
    "no-flag": "rft.py --nonsense 1",
    "no-term": "rft.py --reward distance=1",
    "no-data": "rft.py --data dior --root nowhere --init toy/base",
    "no-set": "rft.py --data nothing --init toy/base",
    "no-init": "rft.py --init nowhere",
    "no-resume": "rft.py --resume --out nowhere",
    "output": "rft.py --init toy/base --out {out}/rft",
    "other-stage": "sft.py --resume --out {out}/rft",
    "other-flag": "rft.py --resume --out {out}/rft --lr 1",
    "group": "rft.py --group 1 --init toy/base",
    "prompts": "rft.py --prompts 3 --minibatches 2 --init toy/base",
    "lora": "sft.py --lora-vision",
    "negative": "sft.py --steps -1",
    "eval-nothing": "eval.py nowhere",
    "eval-flags": "eval.py --image nothing.png",
    "data-nothing": "data.py nothing",
    "data-nowhere": "data.py dior --root nowhere",
    "cot-nothing": "cot.py nothing",
    "cot-teacher": "cot.py synth --teacher nowhere --out {out}/none.jsonl",
}
LEFT_OUT = re.compile(r"seconds|peak|tokens_per_second|time|commit|versions|checkpoint$|command")


def run(repo: Path, out: Path, command: str, processes: int = 1) -> tuple[int, str, str]:
    """A command in `repo` -> its exit status and its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, *command.format(out=out).split()]
    running = []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for rank in range(processes):
        if processes > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost",
                "MASTER_PORT": port}
        running.append(subprocess.Popen(
            words, cwd=repo, env=dict(environment), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE))
    outputs = [process.communicate() for process in running]
    texts = ["".join(parts).replace(str(out), "OUT").replace(str(repo), "REPO")
             for parts in zip(*outputs)]
    return max(process.returncode for process in running), *texts


def short(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def tensors_hash(file: Path) -> str:
    with safe_open(file, "pt") as tensors:
        lines = []
        for name in sorted(tensors.keys()):
            x = tensors.get_tensor(name).contiguous()
            data = x.reshape(-1).view(dtype=__import__("torch").uint8).numpy().tobytes()
            lines.append(f"{name} {x.dtype} {tuple(x.shape)} {short(data)}")
    return short("\n".join(lines))


def kept(value: object) -> object:
    """A JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {k: kept(v) for k, v in sorted(value.items()) if not LEFT_OUT.search(k)}
    return [kept(v) for v in value] if isinstance(value, list) else value


def folder_hashes(folder: Path) -> dict[str, str]:
    """The files of a run or a report -> hashes."""
    hashes = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_symlink() or file.is_dir() or "latest" in name:
            continue
        if name.endswith(".safetensors"):
            hashes[name] = tensors_hash(file)
        elif name.endswith(".jsonl"):
            lines = [json.dumps(kept(json.loads(line))) for line in file.open(encoding="utf-8")]
            hashes[name] = short("\n".join(lines).replace(str(folder.parent), ""))
        elif name == "eval.json":
            text = json.dumps(kept(json.loads(file.read_text(encoding="utf-8"))))
            hashes[name] = short(text.replace(str(folder.parent), ""))
        elif name.endswith(".png"):
            hashes[name] = short(Image.open(file).tobytes())
    return hashes


def write_data(out: Path) -> None:
    """Two small sets: DIOR-RSVG's layout, and the same images with a JSONL."""
    for folder in ("dior/Annotations", "dior/JPEGImages", "jsonl"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    splits = {"train": [], "val": [], "test": []}
    lines = {name: [] for name in splits}
    for i in range(12):
        image = Image.new("RGB", (160, 120), (90, 110, 80))
        tags = ""
        for j, color in enumerate(("red", "blue", "white")):
            x, y = 7 * i + 20 * j, 5 + 3 * i + 25 * j
            box = [x, y, x + 20 + i, y + 12 + j]
            ImageDraw.Draw(image).rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=color)
            text = f"the {color} ship on the {'left' if x < 70 else 'right'}"
            corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in
                              zip(("xmin", "ymin", "xmax", "ymax"), box))
            tags += (f"<object><name>ship</name><bndbox>{corners}</bndbox>"
                     f"<description>{text}</description></object>")
            split = ("train", "train", "val" if i % 2 else "test")[j]
            splits[split].append(str(3 * i + j))
            lines[split].append(json.dumps({
                "image": f"{i:05d}.jpg", "text": text, "box": box, "category": "ship"}))
        image.save(out / f"dior/JPEGImages/{i:05d}.jpg")
        image.save(out / f"jsonl/{i:05d}.jpg")
        (out / f"dior/Annotations/{i:05d}.xml").write_text(
            f"<annotation><filename>{i:05d}.jpg</filename>{tags}</annotation>")
    for name in splits:
        (out / f"dior/{name}.txt").write_text("\n".join(splits[name]) + "\n")
        (out / f"jsonl/{name}.jsonl").write_text("\n".join(lines[name]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="hashes of what the commands write")
    parser.add_argument("out", type=Path)
    parser.add_argument("--repo", type=Path, default=HERE)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names begin so")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    repo = args.repo.resolve()
    result = {}

    def chosen(name: str) -> bool:
        return any(name.startswith(start) for start in args.only)

    def do(name: str, command: str, processes: int = 1) -> tuple[int, str, str]:
        print(name, flush=True)
        status, stdout, stderr = run(repo, out, command, processes)
        if status:
            print(f"    exit status {status}: {stderr[-600:]}", flush=True)
        result[name] = {"status": status}
        return status, stdout, stderr

    write_data(out)
    for name, command in STAGES.items():
        if not chosen(name):
            continue
        for processes, folder in ((1, name), (2, f"{name}-2")):
            shutil.rmtree(out / folder, ignore_errors=True)
            do(folder, f"{command} --out {{out}}/{folder}", processes)
            result[folder] |= folder_hashes(out / folder)
            # Once more from the middle: the last half is done again.
            steps = sorted((out / folder).glob("step_*"))
            shutil.rmtree(steps[-1])
            (out / folder / "latest").unlink()
            (out / folder / "latest").symlink_to(steps[-2].name)
            resumed = f"{folder}-resumed"
            do(resumed, f"{command.split()[0]} --resume --out {{out}}/{folder}", processes)
            result[resumed] |= folder_hashes(out / folder)
    for name, command in READERS.items():
        if chosen(name):
            _, stdout, _ = do(name, command)
            result[name]["stdout"] = re.sub(r"\d+(\.\d+)? ?(s\b|records/s|seconds)", "S", stdout)
            folder = out / name
            result[name] |= folder_hashes(folder) if folder.is_dir() else {}
            for file in (f"{name.split('-')[-1]}.png", f"{name}.png", "teacher.jsonl"):
                if (out / file).is_file():
                    data = (out / file).read_bytes()
                    result[name][file] = short(data)
    for name, command in MISTAKES.items():
        if chosen(f"mistake-{name}"):
            _, stdout, stderr = do(f"mistake-{name}", command)
            result[f"mistake-{name}"]["stderr"] = stderr
    (out / "golden.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
