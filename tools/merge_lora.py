"""Full weights from an adapter: python -m tools.merge_lora ckpt/rft OUT."""
from __future__ import annotations

import shutil

from model import QwenVL
from qwen.hub import ADAPTER_CONFIG, CheckpointError, folder
from qwen.lora import merge, store_as
from qwen.processor import Processor
from train import dist
from train.flags import FlagParser
from train.run import launch


def main() -> None:
    parser = FlagParser("Full weights from an adapter and the base that it names")
    parser.add_argument("ckpt", help="folder of an adapter, or a stage's of a LoRA run")
    parser.add_argument("out", help="folder for the whole checkpoint, in hub layout")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the weights; bfloat16 halves the file, and rounds small adapters away")
    args = parser.parse_args()
    path = folder(args.ckpt)
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{path} holds no adapter: there is nothing to merge")
    out = dist.check_writable(args.out)
    if any(out.iterdir()):
        dist.fail(f"{out} is not empty; name another folder")
    model = QwenVL.from_pretrained(path, dtype=None)
    processor = Processor.from_pretrained(path)
    merge(model)
    store_as(model, args.dtype)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    # What it was trained on goes with it.
    if (path / "run.json").exists():
        shutil.copyfile(path / "run.json", out / "run.json")
    print(f"merged: {out}")


if __name__ == "__main__":
    launch(main)
