"""The coarse SFT of the map: a tenth of the world's SFT records, their boxes beside the things.

    python study/coarse.py ckpt/coarse
    python sft.py --data jsonl --root ckpt/coarse

As where annotators were in a hurry: each box keeps its size and is moved by a normal deviate of
half its side, across and down. What learns from that names the right thing and answers near it.
Ours.
"""
import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Box, load, open_image  # noqa: E402
from train import dist  # noqa: E402
from train.run import launch  # noqa: E402

SPREAD = 0.5                   # deviation of a box's place, in its own sides


def moved(box: Box, size: tuple[int, int], rng: random.Random) -> Box:
    """The box somewhere near, within an image of this size (width, height), in pixels."""
    edges = list(box)
    for axis in (0, 1):
        side = box[axis + 2] - box[axis]
        step = rng.gauss(0, SPREAD * side)
        step = min(max(step, -box[axis]), size[axis] - box[axis + 2])
        edges[axis] += step
        edges[axis + 2] += step
    return tuple(round(v, 2) for v in edges)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that is written; it is read as --data jsonl")
    out = dist.check_writable(parser.parse_args().out)
    rng = random.Random(0)
    lines = []
    for record in load("synth:0.1", None, "sft"):
        image = f"{Path(record.id).name}.png"
        open_image(record).save(out / image)
        lines.append(json.dumps({
            "id": record.id, "image": image, "text": record.text, "category": record.category,
            "box": moved(record.box, record.size, rng)}))
    # Last, so that a folder that has it is whole.
    (out / "train.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} records: {out}")


if __name__ == "__main__":
    launch(main)
