"""The end of speedrun.sh (study/story.py, picture.py) against cases worked by hand; speedrun.sh."""
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import eval as evaluation
import rft
from data import load
from readers.base import Record
from report import metrics
from study import ablate, picture, story
from toy import scenes

ROOT = Path(__file__).parents[1]
FRAME = {"original": [scenes.SIDE] * 2, "resized": [scenes.SIDE] * 2, "convention": "absolute"}
TEST = load("synth", None, "test")
RECORDS = list(TEST)[:60]
PLACES = [r for r in RECORDS if r.kind not in ("category", "attribute")]
NAMES = [r for r in RECORDS if r.kind in ("category", "attribute")]
# What speedrun.sh leaves for story.py.
FILES = {
    **{stage: f"eval/predictions_{stage}.jsonl" for stage in picture.STAGES},
    "blind": "eval_blind/predictions_rft_blind.jsonl",
    "sft sampled": "eval_samples_sft/predictions_sft_T1.jsonl",
    "rft sampled": "eval_samples_rft/predictions_rft_T1.jsonl"}


def text_of(record: Record, hit: bool | None) -> str:
    """An answer with the true box, with a box in the corner, or with none (None)."""
    if hit is None:
        return "nothing"
    box = list(record.box) if hit else [0, 0, 1, 1]
    x, y = ((a + b) / 2 for a, b in zip(record.box[:2], record.box[2:]))
    return (f"<think>{record.text}. a thing near (5, 95). one near ({x:.0f}, {y:.0f}).</think>"
            f'<answer>{{"bbox_2d": {box}}}</answer>')


def write_run(folder: Path, records: Sequence[Record],
              hit: Callable[[str, int, int], bool | None], sampled: int) -> None:
    """A run of speedrun.sh. hit(name, i, k): about answer k of record i in the file of FILES.

    sampled: records with eight samples."""
    for name, file in FILES.items():
        k = 8 if "sampled" in name else 1
        lines = []
        for i, record in enumerate(records[:sampled] if k > 1 else records):
            texts = [text_of(record, hit(name, i, j)) for j in range(k)]
            line = {"id": record.id, "text": texts[0], "frame": FRAME}
            lines.append(json.dumps(line | ({"samples": texts} if k > 1 else {})) + "\n")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("".join(lines))
    row = {"data": "synth", "split": "test", "n": len(records)}
    (folder / "eval/eval.json").write_text(json.dumps({"rows": [row]}))


def tell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["story.py", str(folder)])
    # Drawing all scenes' objects anew takes seconds.
    monkeypatch.setattr(story, "load", lambda *_: TEST)
    story.main()


# ---------------------------------------------------------------- the table and the last line

def test_the_table_counts_places_and_names() -> None:
    records = [*PLACES[:4], *NAMES[:2]]
    boxes, _ = metrics.targets(records)
    # One place missed, one without a box, and one answer that is 0.4 times as wide as its target.
    boxes[0] = torch.tensor([0, 0, 1, 1])
    boxes[1] = math.nan
    boxes[2, 2] = 0.6 * boxes[2, 0] + 0.4 * boxes[2, 2]
    lines = story.table(records, {"a stage": boxes}).splitlines()
    assert lines[0] == ("| 6 test scenes | Pr@0.5 on places (4) | on names (2) | on all "
                        "| mIoU of all | no box |")
    # 1 of 4, 2 of 2, 3 of 6; (3 + 0.4) / 6; 1 of 6.
    assert lines[2] == "| a stage | 0.250 | 1.000 | 0.500 | 0.567 | 0.167 |"
    guess = metrics.centre_box(records)["mIoU"]
    assert lines[3].startswith("| a box of the median size in the middle | ")
    assert lines[3].endswith(f" | {guess:.3f} | 0.000 |") and len(lines) == 4
    # Without names there is nothing to average.
    assert " | - | 0.250 | " in story.table(records[:4], {"a stage": boxes[:4]})


def test_the_last_line_is_about_places_and_warns_about_seeds() -> None:
    records = [*PLACES[:4], *NAMES[:2]]
    direct = torch.tensor([0.0, 0.0, 0.9, 0.4, 0.0, 0.0])
    rft_iou = torch.tensor([0.6, 0.9, 0.9, 0.49, 0.0, 0.0])
    line = story.gain(records, {"direct": direct, "rft": rft_iou})
    # Two of four places are gained; the last one is a miss before and after.
    assert line.startswith(
        "RSGround-R1 - GRPO from the base, Pr@0.5 on the same 4 places: +0.500, 95% interval")
    low, high = metrics.paired(records[:4], direct[:4], rft_iou[:4])["Pr@0.5"]["ci"]
    assert f" over scenes {low:+.3f} to {high:+.3f}. One seed is one seed" in line
    assert low < 0.5 < high
    # Names do not count.
    rft_iou[4:] = 1
    assert story.gain(records, {"direct": direct, "rft": rft_iou}) == line
    one = {"direct": direct[:1], "rft": rft_iou[:1]}
    assert "1 places: +1.000, no interval over one scene. One seed" in story.gain(records[:1], one)
    assert "none of the 2 scenes" in story.gain(
        NAMES[:2], {"direct": direct[:2], "rft": rft_iou[:2]})


# ---------------------------------------------------------------- which scenes are shown

def thing(category: str, color: str, x: float) -> scenes.Object:
    return scenes.Object(category, color, (x, 10.0, x + 8, 20.0), 0.0, 8.0)


def test_candidates_have_the_category_and_a_named_colour() -> None:
    things = (thing("car", "red", 10), thing("car", "red", 30), thing("car", "blue", 50),
              thing("ship", "red", 70))
    scene = scenes.Scene(0, "grass", scenes.Strip("", 0.0, 0.0), things)

    def record(text: str, target: scenes.Object) -> Record:
        return Record("a", scene, text, target.box, target.category, scene.size, "extreme")

    assert picture.candidates(record("the leftmost car", things[0])) == 3
    assert picture.candidates(record("the leftmost red car", things[0])) == 2
    assert picture.candidates(record("the car left of the red ship", things[0])) == 3
    assert picture.candidates(record("the ship", things[3])) == 1


def test_the_explaining_scene_is_the_first_that_fits_the_rule() -> None:
    # Scenes 0 to 2 break the rule in their expression: a name, too few candidates.
    many = [r for r in PLACES if picture.candidates(r) >= 3]
    few = [r for r in PLACES if picture.candidates(r) < 3]
    records = [NAMES[0], few[0], few[1], *many[:6]]
    n = len(records)
    ious = {"base": torch.zeros(n), "rft": torch.full((n,), 0.8)}
    mixed = torch.tensor([0.9, 0.0]).repeat(n, 1)
    assert picture.explaining_scene(records, ious, mixed) == 3
    # Only the first scenes were sampled.
    assert picture.explaining_scene(records, ious, mixed[:3]) is None
    ious["base"][3] = 0.6
    ious["rft"][4] = 0.5          # a miss
    mixed[5] = 0.9
    mixed[6] = 0.1
    assert picture.explaining_scene(records, ious, mixed) == 7
    assert records[7] == many[4]


def ious_of(patterns: Sequence[str]) -> dict[str, torch.Tensor]:
    columns = zip(*[map(float, pattern) for pattern in patterns])
    return {stage: torch.tensor(column) for stage, column in zip(picture.STAGES, columns)}


def test_scenes_below_are_the_first_of_each_pattern() -> None:
    patterns = ["1111", "0001", "0000", "1110", "0001", "0010", "1100", "0111", "0011", "0001"]
    chosen = picture.contrasting_scenes(ious_of(patterns), taken=1)
    assert [i for i, _ in chosen] == [4, 8, 7, 3, 6, 5]
    assert chosen[0][1] == "only RSGround-R1 hits, as in 3 of 10 scenes"
    # Gains as well as losses: RSGround-R1 misses in three of them.
    assert sum(patterns[i][-1] == "0" for i, _ in chosen) == 3


def test_missing_patterns_are_replaced_and_named() -> None:
    # Scene 1 is a gain that no pattern of the list has, scene 3 such a loss.
    patterns = ["1111", "1001", "0000", "0100", "0011", "1111"]
    chosen = picture.contrasting_scenes(ious_of(patterns), taken=0)
    assert [i for i, _ in chosen] == [1, 4, 3, 2, 5]
    assert chosen[0][1] == 'no scene with "only RSGround-R1 hits"; this is another one'
    assert chosen[1][1].startswith("CoT-SFT and RSGround-R1 hit, as in 1 of 6")
    assert picture.contrasting_scenes(ious_of(["0000"]), taken=0) == []


# ---------------------------------------------------------------- what is drawn

def test_points_are_numbered_as_the_thought_names_them() -> None:
    text = ("<think>the left car. a car near (40, 60), leftmost so far. a car near (80, 20). "
            "so it is the one near (40, 60).</think><answer>(1, 2)</answer>")
    frame = {"original": [50, 50], "resized": [100, 100], "convention": "absolute"}
    pieces, points = picture.split_thought({"id": "a", "text": text, "frame": frame})
    assert points == [(20, 30), (40, 10)]
    assert [number for _, number in pieces] == [1, 2, 1, 0]
    assert pieces[0][0] == "the left car. a car near (40, 60)" and pieces[3][0] == "."
    assert picture.split_thought(None) == ([("", 0)], [])


def test_points_are_joined_in_order_and_the_last_one_is_orange() -> None:
    panel = picture.Panel(Image.new("RGB", (100, 100), (90, 90, 90)), 400)
    panel.numbers([(20, 50), (80, 50), (50, 90)], [2, 1, 2])

    def pixel(x: float, y: float) -> tuple[int, ...]:
        return panel.image.getpixel((4 * x, 4 * y))

    assert pixel(80, 50) == picture.HIT and pixel(20, 50) == picture.TRUTH
    assert pixel(50, 50) == picture.TRUTH         # between the first two
    assert pixel(65, 70) == pixel(35, 70) == (90, 90, 90)             # the third is not named
    panel.numbers([], [])


def test_rewards_are_the_papers() -> None:
    record = PLACES[0]
    x1, y1, x2, y2 = record.box
    # Three true boxes side by side: the middle one, one that is a width away, and no box.
    boxes = torch.tensor([record.box, record.box, (x2, y1, 2 * x2 - x1, y2), [math.nan] * 4],
                         dtype=torch.float64)
    texts = [text_of(record, True), text_of(record, True).replace("<think>", ""),
             text_of(record, True), "nothing"]
    exact, no_format, beside, none = picture.rewards(record, boxes, texts)
    # P of a perfect box is 0.9486; a width to the side, the mean of K from 0.5 to 1.5 widths.
    assert exact == pytest.approx(2 + 0.1 * 0.9486, abs=1e-5)
    assert no_format == pytest.approx(exact - 1) and none == 0
    steps = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    along = torch.exp(-(steps - 0.5).square() / (2 * 1.25 ** 2)).mean()
    across = torch.exp(-(steps + 0.5).square() / (2 * 1.25 ** 2)).mean()
    assert beside == pytest.approx(1 + 0.1 * float(along * across), abs=1e-5)


def test_colours_run_from_a_miss_to_a_hit() -> None:
    colours = [picture.reward_colour(v) for v in (0, 1, 1.55, 2.1, 3)]
    assert colours == [picture.MISS, picture.MISS, picture.MIDDLE, picture.HIT, picture.HIT]
    between = [(a + b) / 2 for a, b in zip(picture.MISS, picture.MIDDLE)]
    assert picture.reward_colour(1.275) == pytest.approx(between, abs=1)


def test_contours_lie_where_the_kernel_has_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    rings = []
    monkeypatch.setattr(picture.Panel, "line", lambda self, points, *_: rings.append(points))
    picture.Panel(Image.new("RGB", (100, 100)), 400).contours((40, 40, 60, 50))
    assert len(rings) == 3
    for level, ring in zip((0.8, 0.5, 0.2), rings):
        for x, y in ring:
            u, v = (x - 50) / (1.25 * 20), (y - 45) / (1.25 * 10)
            assert math.exp(-(u * u + v * v) / 2) == pytest.approx(level)


class Texts(list):
    """(text, box) of all that ImageDraw writes; no text may leave its image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        write = ImageDraw.ImageDraw.text

        def text(pen: Any, xy: Any, words: str, fill: Any, font: Any, anchor: str = "la",
                 **rest: Any) -> None:
            box = pen.textbbox(xy, words, font, anchor)
            width, height = pen._image.size
            assert 0 <= box[0] and box[2] <= width and 0 <= box[1] and box[3] <= height, words
            self.append((words, box))
            write(pen, xy, words, fill, font, anchor, **rest)

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)


def hit_by_pattern(name: str, i: int, k: int) -> bool:
    """Scene i has the pattern i of the list, over and over; samples are right by turns."""
    patterns = list(picture.PATTERNS)
    if "sampled" in name:
        return k < (3 if name.startswith("sft") else 7)
    return name in picture.STAGES and patterns[i % 6][list(picture.STAGES).index(name)] == "1"


def test_a_run_becomes_a_table_a_picture_and_a_last_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path, RECORDS, hit_by_pattern, sampled=40)
    texts = Texts(monkeypatch)
    tell(tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:8]] == [
        "| base", "| GRPO from the base", "| CoT-SFT", "| RSGround-R1",
        "| RSGround-R1 without the image", "| a box of the median size in the middle"]
    # RSGround-R1 hits the first half of the patterns. Blind answers have a box that misses.
    assert " | 0.500 | " in lines[5] and lines[6].endswith(" | 0.000 | 0.000 | 0.000 |")
    assert (tmp_path / "table.md").read_text().splitlines() == lines[:8]
    assert lines[-1].startswith("RSGround-R1 - GRPO from the base, Pr@0.5 on the same")

    with Image.open(tmp_path / "story.png") as drawn:
        assert drawn.width == 1400
    words = [text for text, _ in texts]
    # The scene that the rule chooses, its rollouts, and a legend.
    fitting = next(i for i, r in enumerate(RECORDS[:40])
                   if r in PLACES and picture.candidates(r) >= 3 and i % 6 < 3)
    assert words[0] == f'Question: "{RECORDS[fitting].text}"'
    assert "3 of 8 hit, mean reward " in " ".join(words) and words.count("2.09") == 10
    assert any(text.startswith("7 of 8 hit") for text in words)
    legend = ("true box", "answer: hit (IoU above 0.5) or miss",
              "points of the thought in order; orange: the last",
              "kernel K around the true box at 0.8, 0.5, 0.2")
    assert set(legend) <= set(words)
    # Points are numbered in the scene, in the text and in the legend.
    assert words.count("1") >= 3 and words.count("2") == 3
    assert "only RSGround-R1 hits, as in 10" in " ".join(words)


def test_a_look_without_fitting_scenes_still_has_a_picture(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path, RECORDS[:3], lambda *_: None, sampled=2)
    texts = Texts(monkeypatch)
    tell(tmp_path, monkeypatch)
    words = [text for text, _ in texts]
    assert words[0] == f'Question: "{RECORDS[0].text}"'
    assert any("the first of all, for none of the 2 that" in text for text in words)
    assert "Answer: no box" in words and "2 other scenes" in words
    assert "none of the 3 scenes has an expression of a place" in capsys.readouterr().out


def test_an_unfinished_run_is_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path, RECORDS[:3], lambda *_: True, sampled=2)
    for name in (FILES["rft sampled"], "eval/eval.json"):
        (tmp_path / name).unlink()
        with pytest.raises(SystemExit) as leaving:
            tell(tmp_path, monkeypatch)
        message = capsys.readouterr().err
        assert leaving.value.code == 2 and message.count("\n") == 1
        assert "run speedrun.sh" in message


# ---------------------------------------------------------------- speedrun.sh

# Writes its arguments to a file and trains nothing, but leaves a run.json as a stage does that took
# all its steps; half of them if STOP says so.
STAND_IN = """#!/bin/bash
echo "$@" >>"$COMMANDS"
out=$(echo "$@" | sed -n 's/.*--out \\([^ ]*\\).*/\\1/p')
steps=$(echo "$@" | sed -n 's/.*--steps \\([0-9]*\\).*/\\1/p')
case $1 in
  eval.py) mkdir -p "$out" ;;
  sft.py | rft.py)
    mkdir -p "$out/step_1"
    ln -sfn step_1 "$out/latest"
    printf '{\\n  "step": %s,\\n  "steps": %s\\n}' $((steps / ${STOP:-1})) $steps \\
      >"$out/latest/run.json" ;;
esac
"""
LOOK = {"SFT": "60", "DIRECT": "4", "RFT": "6", "TEST": "40"}


def speedrun(folder: Path, **settings: str) -> tuple[int, str, list[str]]:
    """speedrun.sh with the stand-in for Python -> exit status, output, commands."""
    stand_in, commands = folder / "python", folder / "commands"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    commands.write_text("")
    environment = {key: value for key, value in os.environ.items() if key not in LOOK}
    environment |= {"PY": str(stand_in), "CKPT": str(folder / "ckpt"), "COMMANDS": str(commands)}
    script = subprocess.run(["bash", "speedrun.sh"], capture_output=True, text=True, cwd=ROOT,
                            env=environment | settings)
    return script.returncode, script.stdout, commands.read_text().splitlines()


def test_the_speedrun_resumes(tmp_path: Path) -> None:
    status, _, stopped = speedrun(tmp_path, STOP="2")
    assert status == 130 and [line.split()[0] for line in stopped] == ["rft.py"]
    status, output, whole = speedrun(tmp_path)
    assert status == 0
    assert [line.split()[0] for line in whole] == [
        "rft.py", "sft.py", "rft.py", *["eval.py"] * 4, "study/story.py"]
    assert whole[0].endswith("--resume") and "--init toy/base" in whole[0]
    assert not any("--resume" in line for line in whole[1:])
    assert (tmp_path / "ckpt/base").resolve() == ROOT / "toy/base"
    status, _, again = speedrun(tmp_path)
    assert status == 0 and [line.split()[0] for line in again] == ["study/story.py"]
    # An evaluation that was stopped before its end is done anew.
    (tmp_path / "ckpt/eval/done").unlink()
    status, _, again = speedrun(tmp_path)
    assert [line.split()[0] for line in again] == ["eval.py", "study/story.py"]
    assert (tmp_path / "ckpt/eval/done").exists()


def test_both_runs_of_grpo_have_the_same_settings(tmp_path: Path) -> None:
    _, _, commands = speedrun(tmp_path)
    direct, rsground = (vars(rft.flags().parse_args(line.split()[1:]))
                        for line in commands if line.startswith("rft.py"))
    different = {key for key in direct if direct[key] != rsground[key]}
    assert different == {"init", "out", "reward", "weighting"}
    assert direct["reward"] == {"iou": 1.0, "format": 1.0} and direct["weighting"] == "off"
    assert direct["init"] == "toy/base" and rsground["init"].endswith("ckpt/sft")
    # As in the study, apart from what neither teaches nor scores.
    script, *words = ablate.ARMS["paper"].command.split()
    study = vars(rft.flags().parse_args([*words, "--steps", str(ablate.STEPS[script])]))
    different = {key for key in study if study[key] != rsground[key]}
    assert different == {"init", "out", "every", "keep", "keep_weights"}
    # The paper's reward and weights are the defaults.
    default = rft.flags().parse_args([])
    assert (rsground["reward"], rsground["weighting"]) == (default.reward, default.weighting)


def test_the_speedrun_leaves_the_files_that_the_story_reads(tmp_path: Path) -> None:
    _, _, commands = speedrun(tmp_path, **LOOK)
    files = set()
    for command in commands:
        if not command.startswith("eval.py"):
            continue
        args = evaluation.flags().parse_args(command.split()[1:])
        assert (args.data, args.split, args.limit) == ("synth", "test", 40)
        sampled = args.temperature == [1.0]
        assert args.samples == (8 if sampled else 1)
        suffix = "_T1" * sampled + "_blind" * args.blind
        stage = Path(args.ckpt[0]).name
        for name in picture.STAGES if stage == "ckpt" else [stage]:
            files.add(f"{Path(args.out).name}/predictions_{name}{suffix}.jsonl")
    assert files == set(FILES.values())


def test_a_quick_look_says_so(tmp_path: Path) -> None:
    _, output, commands = speedrun(tmp_path, **LOOK)
    assert output.splitlines()[-1] == (
        "This was a quick look (SFT=60 DIRECT=4 RFT=6 TEST=40, less than the default): "
        "its figures mean nothing.")
    assert "--steps 60 " in commands[1] and "--limit 40 " in commands[3]
    _, output, _ = speedrun(tmp_path, RFT="39")
    assert "(RFT=39, less than" in output
    for settings in ({}, {"SFT": "4000", "TEST": "2000"}):
        assert "look" not in speedrun(tmp_path, **settings)[1]
