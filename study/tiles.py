"""How often is the likeliest tile's answer right, next to the answer of the right tile?

    python study/tiles.py ckpt/rft --device cpu

draws 3 x 3 scenes of the embedded world as one large scene, asks about each of the nine as
`eval.py --tile` does, and prints shares of large scenes with Wilson's 95% intervals:

    tile known    the answer about the tile that holds the object has an IoU above 0.5
    likeliest     the answer with the highest score (of those with a box) has
    right tile    the likeliest answer is about the tile that holds the object

The expression names the object (kinds "category" and "attribute"), and no other tile has an object
that its noun phrase fits, so it is unique in the large scene too.
"""
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load  # noqa: E402
from eval import evaluate, find_stages, likeliest  # noqa: E402
from readers.base import Record  # noqa: E402
from readers.views import windows  # noqa: E402
from reward import iou  # noqa: E402
from toy import scenes  # noqa: E402
from train.checkpoints import open_model  # noqa: E402
from train.dist import choose_device, fail  # noqa: E402
from train.flags import DEVICE_FLAG, FlagParser, natural, positive  # noqa: E402
from train.run import launch  # noqa: E402

NAMES = ("category", "attribute")
TILES = 3                         # in a row and in a column


def large_scenes(
        records: Sequence[Record], n: int, seed: int) -> list[tuple[Record, int, list[Record]]]:
    """-> target, place of its tile, and the nine tiles as records with the target's expression."""
    rng = random.Random(seed)
    drawn = []
    targets = [record for record in records if record.kind in NAMES]
    for target in rng.sample(targets, len(targets))[:n]:
        # "red ship" of "the red ship", which also ends with "ship".
        phrases = scenes.noun_phrases(target.image)
        phrase = max((p for p in phrases if target.text.endswith(f" {p}")), key=len)
        others = []
        while len(others) < TILES ** 2 - 1:
            other = rng.choice(records).image
            if phrase not in scenes.noun_phrases(other) and other not in others:
                others.append(other)
        place = rng.randrange(TILES ** 2)
        others.insert(place, target.image)
        places = windows((TILES * scenes.SIDE,) * 2, scenes.SIDE, 0)
        tiles = []
        for scene, window in zip(others, places):
            # As readers.views.View is.
            tile = SimpleNamespace(path=Path("scene"), window=window, draw=scene.draw)
            tiles.append(Record(target.id, tile, target.text, None, "", target.size))
        drawn.append((target, place, tiles))
    return drawn


def share(right: Sequence[bool]) -> str:
    """A share with Wilson's 95% interval."""
    n, p, z = len(right), sum(right) / len(right), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return f"{p:.3f} [{max(middle - half, 0):.3f}, {min(middle + half, 1):.3f}]"


def main() -> None:
    parser = FlagParser(description="Likeliest tile or known tile, in scenes of 3 x 3 tiles")
    add = parser.add_argument
    add("ckpt", help="folder of a checkpoint or stage")
    add("--n", type=positive, default=300, help="large scenes")
    add("--split", default="test", help="of synth")
    add("--batch", type=positive, default=36, help="tiles asked at once")
    add("--max-new-tokens", type=positive, default=192, help="of an answer")
    add("--seed", type=natural, default=0, help="of the scenes")
    add("--device", **DEVICE_FLAG)
    args = parser.parse_args()
    stage = find_stages(args.ckpt)[-1]
    model, processor = open_model(stage.folder, torch.device(choose_device(args.device)))
    large = large_scenes(load("synth", None, args.split), args.n, args.seed)
    if len(large) < args.n:
        fail(f"--n {args.n}: the split {args.split} gives {len(large)} scenes")
    asked = [tile for _, _, tiles in large for tile in tiles]
    answers = evaluate(model, processor, asked, max_new_tokens=args.max_new_tokens,
                       batch=args.batch, seed=args.seed, label="tiles")
    known, best, right_tile = [], [], []
    for i, (target, place, tiles) in enumerate(large):
        own = answers[i * len(tiles):(i + 1) * len(tiles)]
        x, y = tiles[place].image.window[:2]
        box = torch.tensor(target.box) + torch.tensor([x, y, x, y])
        chosen = likeliest(tiles, own)
        for line, right in ((likeliest([tiles[place]], [own[place]]), known), (chosen, best)):
            found = line["box"]
            right.append(bool(found) and iou(torch.tensor(found), box).item() > 0.5)
        right_tile.append(tuple(chosen["tile"]) == tiles[place].image.window)
    print(f"{stage.name}, {args.n} scenes of {TILES} x {TILES} tiles, Pr@0.5\n"
          f"| tile known | likeliest | right tile |\n|---|---|---|\n"
          f"| {share(known)} | {share(best)} | {share(right_tile)} |")


if __name__ == "__main__":
    launch(main)
