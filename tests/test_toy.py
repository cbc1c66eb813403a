"""The embedded world and its base.

Boxes are compared with drawn pixels, expressions with a resolver that reads the text; splits and
determinism.
"""
import argparse
import collections
import hashlib
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data
from conftest import Run
from model import QwenVL
from qwen.answer import PROMPT, format_ok, parse_box
from qwen.processor import Processor
from toy import pretrain, scenes
from toy.scenes import CATEGORIES, COLORS, SMALL, SPLITS, Object, Split, make_scene

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------- what expressions mean

NINTHS = {
    "upper left": (0, 0), "top": (1, 0), "upper right": (2, 0),
    "left": (0, 1), "center": (1, 1), "right": (2, 1),
    "lower left": (0, 2), "bottom": (1, 2), "lower right": (2, 2),
}
SIZES = {"largest": -1, "biggest": -1, "smallest": 1, "tiniest": 1}
EXTREMES = {
    "leftmost": (0, 1), "farthest to the left": (0, 1),
    "rightmost": (0, -1), "farthest to the right": (0, -1),
    "topmost": (1, 1), "nearest to the top edge": (1, 1),
    "lowest": (1, -1), "nearest to the bottom edge": (1, -1),
}
SIDES = {
    "left of": (-1, 0), "to the left of": (-1, 0),
    "right of": (1, 0), "to the right of": (1, 0),
    "above": (0, -1), "higher up than": (0, -1),
    "below": (0, 1), "further down than": (0, 1),
}
THING = rf"(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(CATEGORIES)})"
EXPRESSION = re.compile(
    rf"the (?:(leftmost|rightmost|topmost|lowest) )?{THING}(?: ({'|'.join(EXTREMES)})"
    rf"| (?:at|in) the ({'|'.join(NINTHS)})(?: part)?(?: of the image)?"
    rf"| ({'|'.join(SIDES)}|nearest to|next to) the {THING})?")


def middle(o: Object) -> tuple[float, float]:
    return (o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2


def surface(o: Object) -> float:
    return (o.box[2] - o.box[0]) * (o.box[3] - o.box[1])


def resolve(text: str, objects: Sequence[Object]) -> list[Object]:
    """All objects that an expression fits, read word by word."""
    before, *thing, after, region, relation, size, color, category = (
        EXPRESSION.fullmatch(text).groups())
    pool = things(objects, *thing)
    if region:
        pool = [o for o in pool if ninth(o) == NINTHS[region]]
    if before or after:
        axis, sign = EXTREMES[before or after]
        pool = [min(pool, key=lambda o: sign * middle(o)[axis])]
    if relation:
        anchor, = things(objects, size, color, category)
        pool = [o for o in pool if o is not anchor]
        if relation in SIDES:
            return [o for o in pool if is_on_side(o, anchor, SIDES[relation])]
        return [min(pool, key=lambda o: math.dist(middle(o), middle(anchor)))]
    return pool


def things(
        objects: Sequence[Object], size: str | None, color: str | None, category: str,
) -> list[Object]:
    """The objects of a category, of this color if given; the largest or smallest of them."""
    pool = [o for o in objects if o.category == category and color in (None, o.color)]
    if size is None:
        return pool
    return sorted(pool, key=lambda o: SIZES[size] * surface(o))[:1]


def ninth(o: Object) -> tuple[int, int]:
    x, y = middle(o)
    third = scenes.SIDE / 3
    return min(2, int(x // third)), min(2, int(y // third))


def is_on_side(o: Object, anchor: Object, side: tuple[int, int]) -> bool:
    """Whether an object lies further to this side of the anchor than to either side of it."""
    dx, dy = (a - b for a, b in zip(middle(o), middle(anchor)))
    along = dx * side[0] + dy * side[1]
    aside = abs(dy if side[0] else dx)
    return along > 0 and along >= aside


# ---------------------------------------------------------------- the embedded world

ALL_SPLITS = {**SPLITS, **{f"small {name}": split for name, split in SMALL.items()}}
for world, splits in (("one", scenes.ONE), ("tiny", scenes.TINY)):
    ALL_SPLITS |= {f"{world} {name}": split for name, split in splits.items()}
# Splits that have their own hashes, because they are newer than the others.
TRAINED = {"pretrain": "4b3c518825363776", "sft": "811cc699e6093909"}
FINAL = {"final": "5bfe550b31f0b001", "small final": "b480d142de3ea601"}
ALONE = {"one": "6d48abb0d4a6d037", "tiny": "c907e52b9f7da3a3"}
KINDS = {"category", "attribute", "position", "extreme", "relation", "two-step"}


@pytest.mark.parametrize("name", ["sft", "test", "novel", "small test", "final"])
def test_every_expression_fits_exactly_one_object(name: str) -> None:
    records = scenes.records(replace(ALL_SPLITS[name], scenes=700))
    for r in records:
        fitting = resolve(r.text, r.scene.objects)
        assert [o.box for o in fitting] == [r.box] and fitting[0].category == r.category, r.text
    kinds = collections.Counter(r.kind for r in records)
    assert set(kinds) == KINDS and min(kinds.values()) > 10


def test_many_targets_are_small_and_scenes_differ_in_crowding() -> None:
    for name in ("synth", "synth-small"):
        assert len(data.load(name, None, "test")) >= 2000
    records = scenes.records(replace(SPLITS["test"], scenes=700))
    areas = np.array([(r.box[2] - r.box[0]) * (r.box[3] - r.box[1]) for r in records])
    shares = areas / scenes.SIDE ** 2
    assert np.mean(shares < 0.01) >= 0.25 and shares.max() ** 0.5 > 0.25
    counts = [len(r.scene.objects) for r in records]
    assert min(counts) == 2 and max(counts) == 12
    with_distractors = 0
    for r in records:
        with_distractors += [o.category for o in r.scene.objects].count(r.category) > 1
    assert with_distractors / len(records) > 0.6
    assert len({r.category for r in records}) == len(CATEGORIES) >= 12


@pytest.mark.parametrize("name", ["sft", "sft-1", "sft-9"])
def test_a_fifth_of_the_sft_records_are_names(name: str) -> None:
    records = data.load("synth", None, name)
    assert len(records) >= 4000
    kinds = collections.Counter(r.kind for r in records)
    names = kinds["category"] + kinds["attribute"]
    assert abs(names - 0.2 * len(records)) <= 1
    assert set(kinds) == KINDS and max(len(r.image.objects) for r in records) == 8


def test_the_novel_split_shows_what_sft_and_rft_never_see() -> None:
    for name, split in ALL_SPLITS.items():
        split_scenes = [make_scene(split.first_seed + i, split) for i in range(300)]
        terrains = {s.terrain for s in split_scenes}
        if split.novel:
            assert terrains == {scenes.HELD_OUT_TERRAIN}
            continue
        if split.everything:           # the base
            assert terrains == set(scenes.TERRAINS)
            objects = [o for s in split_scenes for o in s.objects]
            assert any(scenes.unseen(o.category, o.color) for o in objects)
            continue
        assert scenes.HELD_OUT_TERRAIN not in terrains
        for s in split_scenes:
            assert not any(scenes.unseen(o.category, o.color) for o in s.objects), name
    for r in scenes.records(replace(SPLITS["novel"], scenes=300)):
        target, = (o for o in r.scene.objects if o.box == r.box)
        assert scenes.unseen(target.category, target.color)


def world_hash(names: Sequence[str]) -> str:
    """16 hex characters that change with any of the first 150 records of these splits."""
    digest = hashlib.sha256()
    for name in names:
        for r in scenes.records(replace(ALL_SPLITS[name], scenes=150)):
            line = (r.number, r.scene.terrain, r.text, r.box, r.category, r.kind)
            digest.update(repr(line).encode())
    return digest.hexdigest()[:16]


def test_the_world_has_not_changed() -> None:
    """Scores in LOG.md and the README are from these scenes.

    Records of every split, and roughly the pixels of a few: libraries may round differently.
    """
    others = ["novel", "rft", "small rft", "small test", "small val", "test", "val"]
    assert world_hash(others) == "edebf963646e19e9"
    for name, expected in {**TRAINED, **FINAL}.items():
        assert world_hash([name]) == expected, name
    for world, expected in ALONE.items():
        assert world_hash([n for n in sorted(ALL_SPLITS) if n.split()[0] == world]) == expected
    images = [make_scene(40_000_000 + i, SPLITS["test"]).draw() for i in range(20)]
    pixels = np.stack([np.asarray(image, float) for image in images])      # (20, H, W, 3)
    assert pixels.mean((0, 1, 2)).round() == pytest.approx([126, 128, 106], abs=1)


@pytest.mark.parametrize("name", ["synth", "synth-small"])
def test_the_final_split_has_2000_scenes_that_no_other_has(name: str) -> None:
    """No other split has a scene with the same objects, either."""
    final = data.load(name, None, "final")
    assert len(final) == 2000 and {r.id.split("-")[0] for r in final} == {"final"}
    seeds = {r.image.seed for r in final}
    things = {r.image.objects for r in final}
    assert len(things) == 2000
    for other in ("val", "test"):
        records = data.load(name, None, other)
        assert not things & {r.image.objects for r in records}
    for split in ALL_SPLITS.values():
        if split not in (SPLITS["final"], SMALL["final"]):
            assert not any(0 <= seed - split.first_seed < split.scenes for seed in seeds)


@pytest.mark.parametrize("name, largest", [("synth-one", 14.5), ("synth-tiny", 5.1)])
def test_scenes_of_one_object_leave_nothing_to_choose(name: str, largest: float) -> None:
    records = data.load(name, None, "final")
    assert len(records) > 1900 and all(len(r.image.objects) == 1 for r in records)
    assert {r.kind for r in records} == {"category", "attribute"}
    assert np.median([r.image.objects[0].size for r in records]) <= largest
    seen = data.load(name, None, "sft")
    assert len(seen) > 9000 and seen[0].id.startswith("rft")


def test_a_box_is_the_extent_of_what_is_drawn() -> None:
    """An object's pixels are those that differ from the same scene without it.

    Its shadow is up to two pixels to the lower right.
    """
    for seed in range(40_000_000, 40_000_060):
        s = make_scene(seed, Split(0, 0, 1, 3))
        pixels = np.asarray(s.draw(), int)
        for o in s.objects:
            others = tuple(p for p in s.objects if p != o)
            without = np.asarray(replace(s, objects=others).draw(), int)
            y, x = np.nonzero(np.abs(pixels - without).max(2) > 12)
            assert abs(x.min() - o.box[0]) <= 1.5 and abs(y.min() - o.box[1]) <= 1.5
            assert -1.5 <= x.max() + 1 - o.box[2] <= 3 and -1.5 <= y.max() + 1 - o.box[3] <= 3


def test_objects_lie_in_the_image_and_apart() -> None:
    for seed in range(30_000_000, 30_000_300):
        s = make_scene(seed, SPLITS["test"])
        for o in s.objects:
            assert 0 <= o.box[0] < o.box[2] <= scenes.SIDE
            assert 0 <= o.box[1] < o.box[3] <= scenes.SIDE
        for a, b in itertools.combinations(s.objects, 2):
            apart_across = a.box[2] < b.box[0] or b.box[2] < a.box[0]
            apart_down = a.box[3] < b.box[1] or b.box[3] < a.box[1]
            assert apart_across or apart_down


def test_a_seed_gives_one_world_and_splits_share_no_seed() -> None:
    first, again = (scenes.records(replace(SPLITS["val"], scenes=20)) for _ in range(2))
    assert first == again
    assert np.array_equal(first[0].scene.draw(), again[0].scene.draw())
    spans = sorted((s.first_seed, s.first_seed + s.scenes) for s in ALL_SPLITS.values())
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    assert len({r.number for r in first}) == len(first)


# ---------------------------------------------------------------- the base

def test_digits_aim_at_the_bump_about_a_number() -> None:
    targets = pretrain.digit_targets()                                  # (113, 3, 10)
    bumps = pretrain.soft_numbers(torch.arange(scenes.SIDE + 1))        # (113, 113)
    forties_and_fifties = torch.tensor([bumps[52, 40:50].sum(), bumps[52, 50:60].sum()])
    assert torch.allclose(targets[52, 0, [4, 5]], forties_and_fifties, atol=1e-5)
    fifties = bumps[52, 50:60]
    assert torch.allclose(targets[52, 1], fifties / fifties.sum(), atol=1e-5)
    assert targets[52, 2].sum() == 0
    # 10 begins with a 1.
    assert targets[9, 0, [9, 8, 7, 1]].sum() > 0.99 and targets[9, 0, 1] > 0.2
    assert targets[100, 0].argmax() == 1 and targets[100, 1].argmax() == 0
    assert targets[100, 2, 0] > targets[100, 2, 1] > 0
    for number in range(scenes.SIDE + 1):
        for place, digit in enumerate(str(number)):
            assert targets[number, place, int(digit)] > 0.1


def test_training_answers_of_the_base_are_true_and_end_their_turn(tmp_path: Path) -> None:
    pretrain.write_shape(tmp_path, 0)
    processor = Processor.from_pretrained(tmp_path)
    assert [len(processor.words(n)) for n in ("7", "52", "112")] == [1, 2, 3]
    for seed in range(30):
        s = make_scene(seed, SPLITS["pretrain"])
        pairs = pretrain.question_answer_pairs(s, random.Random(seed))
        # The request for a box in the answer format is one more.
        most = pretrain.MAX_LISTS + pretrain.MAX_OTHERS + pretrain.MAX_PLACES + 1
        assert 0 < len(pairs) <= most
        encoded = pretrain.encode_answers(processor, pairs, pretrain.digit_targets(), 1024)
        for (_, answer), (ids, targets) in zip(pairs, encoded):
            assert_true_of(answer, s)
            assert targets[-1].argmax() == ids[-1] == processor.end_id
            assert torch.allclose(targets.sum(1), torch.ones(len(targets)))
            assert processor.decode(ids[-len(targets):]) == answer


def test_answers_about_places_are_true() -> None:
    """Each is read word by word; none has the answer format or a list."""
    kinds: collections.Counter[str] = collections.Counter()
    for seed in range(200):
        s = make_scene(seed, SPLITS["pretrain"])
        pairs = pretrain.place_pairs(s, random.Random(seed))
        assert len(pairs) <= pretrain.MAX_PLACES
        for question, answer in pairs:
            words = re.fullmatch(r"(in which part of the image is|how does|which is (.+), "
                                 r"|point to|about where is) ?(.+?)[.?]", question)
            asked = words[1].split(",")[0]
            kinds[asked] += 1
            assert "<answer>" not in answer and answer.count("near (") <= 1
            if asked.startswith("in which"):
                [o] = resolve(words[3], s.objects)
                assert NINTHS[answer.removeprefix("at the ")] == ninth(o)
            elif asked == "how does":
                [a], [b] = (resolve(name, s.objects) for name in words[3].split(" lie to "))
                assert is_on_side(a, b, SIDES[answer.removesuffix(" it")])
            elif asked.startswith("which is"):
                names = words[3].split(" or ")
                values = [compared(words[2], resolve(name, s.objects)[0]) for name in names]
                assert answer == names[values.index(max(values))]
            else:
                [o] = resolve(words[3], s.objects)
                x, y = map(int, re.search(r"near \((\d+), (\d+)\)", answer).groups())
                assert math.dist((x, y), middle(o)) < 4 and answer.startswith(words[3])
    assert len(kinds) == 10 and min(kinds.values()) > 5, kinds


def compared(word: str, o: Object) -> float:
    """The larger, the more the word applies to the object."""
    x, y = middle(o)
    return {"farther left": -x, "farther right": x, "farther up": -y, "farther down": y,
            "larger": surface(o), "smaller": -surface(o)}[word]


def test_the_base_is_asked_for_a_box_only_if_one_object_has_the_name(tmp_path: Path) -> None:
    pretrain.write_shape(tmp_path, 0)
    processor = Processor.from_pretrained(tmp_path)
    asked = 0
    for seed in range(30):
        s = make_scene(seed, SPLITS["pretrain"])
        pairs = pretrain.grounding_pairs(s, random.Random(seed))
        named = dict(pretrain.unique_names(s))
        assert len(pairs) == bool(named)
        for question, answer in pairs:
            asked += 1
            [name] = [n for n in named if question == PROMPT.format(text=n)]
            assert format_ok(answer)
            assert parse_box(answer) == tuple(round(v) for v in named[name].box)
            [(ids, targets)] = pretrain.encode_answers(
                processor, pairs, pretrain.digit_targets(), 1024)
            # The 2 of "bbox_2d" is spelling: no other digit will do.
            tokens = [processor.decode([i]) for i in ids[-len(targets):].tolist()]
            spelling = tokens.index("_") + 1
            assert tokens[spelling] == "2" and targets[spelling].max() == 1
    assert asked > 10


def assert_true_of(answer: str, scene: scenes.Scene) -> None:
    """Every box in an answer belongs to an object of that category and color."""
    for color, category, box in re.findall(r"(?:a|the) (?:(\w+) )?(\w+) \[([\d, ]+)\]", answer):
        values = [int(v) for v in box.split(",")]
        boxes = []
        for o in scene.objects:
            if o.category == category and color in ("", o.color):
                boxes.append([round(v) for v in o.box])
        assert values in boxes, answer


def test_pretraining_resumes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: Path, resume: bool = False) -> tuple[dict[str, torch.Tensor], str]:
        args = argparse.Namespace(
            steps=4, warm=2, batch=2, lr=1e-3, seed=0, every=2, resume=resume)
        if not resume:
            pretrain.write_shape(out, 0)
        model = pretrain.fresh_model(out, 0)
        pretrain.train(model, Processor.from_pretrained(out), args, out)
        return model.state_dict(), (out / "metrics.jsonl").read_text()

    append_line = pretrain.append_line

    def crash(path: Path, line: dict[str, Any]) -> None:
        append_line(path, line)
        if line["step"] == 3:
            raise KeyboardInterrupt

    whole, log = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "append_line", crash)
        run(tmp_path / "cut")
    resumed, log_again = run(tmp_path / "cut", resume=True)
    assert log == log_again
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_base_in_the_repository() -> None:
    """Small, bfloat16, single digits, and it knows things: the card's figures on fewer scenes."""
    base = ROOT / "toy" / "base"
    assert sum(f.stat().st_size for f in base.iterdir()) < 8e6
    model = QwenVL.from_pretrained(base, torch.float32)
    processor = Processor.from_pretrained(base)
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 3.5e6
    assert model.stored_dtype == torch.bfloat16
    assert [len(processor.words(n)) for n in ("7", "52", "112")] == [1, 2, 3]
    scores = pretrain.scores(model, processor, 60)
    card = (base / "README.md").read_text(encoding="utf-8")
    miou = float(re.search(r"mean IoU of the box (\d\.\d+)", card)[1])
    named = float(re.search(r"right for (\d\.\d+)", card)[1])
    assert abs(scores["pointing_mIoU"] - miou) < 0.1 and abs(scores["named"] - named) < 0.15
    # It answers the request of the stages, and the best of eight answers leaves room for RFT.
    zero_shot = pretrain.zero_shot_scores(model, processor, 60)
    greedy = float(re.search(r"greedy mean IoU (\d\.\d+)", card)[1])
    best = float(re.search(r"has IoU above 0\.5 for (\d\.\d+)", card)[1])
    assert abs(zero_shot["zero_shot_mIoU"] - greedy) < 0.15
    assert abs(zero_shot["pass_8"] - best) < 0.2
    assert zero_shot["pass_8"] > zero_shot["zero_shot_Pr50"] + 0.05
    # The card's tables: shares of all kinds and numbers of objects, whose records add up.
    for name in ("kind", "objects in the scene"):
        rows = re.search(rf"\| {name} \|.*\n\|---.*\n((?:\|.*\n)+)", card)[1]
        cells = [row.split("|") for row in rows.splitlines()]
        assert sum(int(row[2]) for row in cells) == 500
        assert all(0 <= float(row[3]) <= 1 for row in cells) and len(cells) >= 6


def test_a_missing_base_leaves_the_output_unchanged(
        run: Run, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    done = run("toy/pretrain.py", "--init", tmp_path / "nowhere", "--out", tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "no checkpoint at" in done.stderr and (tmp_path / "kept").exists()
