"""Full weights from an adapter and its base: python -m tools.merge_lora ckpt/rft merged/"""
import shutil

import torch

from model import QwenVL
from qwen import lora
from qwen.hub import ADAPTER_CONFIG, CheckpointError, folder
from qwen.processor import Processor
from train.dist import check_writable, fail
from train.flags import FlagParser
from train.run import launch


def main() -> None:
    parser = FlagParser(description="Full weights from an adapter and the base that it names")
    parser.add_argument("ckpt", help="folder of an adapter, or of a stage that trained one")
    parser.add_argument("out", help="folder for the whole checkpoint, in hub layout")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="dtype of the weights; bfloat16 halves the file, but rounds small adapters away")
    args = parser.parse_args()
    path = folder(args.ckpt)
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{path} holds no adapter: there is nothing to merge")
    out = check_writable(args.out)
    if any(out.iterdir()):
        fail(f"{out} is not empty; name another folder")
    model = QwenVL.from_pretrained(path, dtype=None)
    processor = Processor.from_pretrained(path)
    lora.merge(model)
    model.stored_dtype = getattr(torch, args.dtype)
    raw = model.config.raw
    for part in (raw, raw.get("text_config", {}), raw.get("vision_config", {})):
        part |= {key: args.dtype for key in ("torch_dtype", "dtype") if key in part}
    model.save_pretrained(out)
    processor.save_pretrained(out)
    if (path / "run.json").exists():
        shutil.copyfile(path / "run.json", out / "run.json")
    print(f"merged: {out}")


if __name__ == "__main__":
    launch(main)
