"""cot.py: every sentence is read back and held against the boxes, by code that shares nothing with the writer."""
import json
import math
import random
import re

import pytest
from PIL import Image

import cot
import data
from answer import format_ok, parse_box
from cot import Neighbor, explain, neighbors
from data import Record
from processor import Frame, Processor, to_model_frame

SENTENCE = {
    "order": r"from (\w+) to (\w+):",
    "candidate": r"(an? [a-z ]+) near \((\d+), (\d+)\), at the ([a-z ]+)(?:, of size (\d+))?"
                 r"((?:, (?:left of|right of|above|below) it)?(?:, \d+ away)?|, about where it is)(\.|: it fits\.)",
    "anchor": r"(an? [a-z ]+) near \((\d+), (\d+)\)\.",
}


def middle(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def lies_in(name, box, size):
    """The region's words mean: its ninth of the image holds the centre."""
    column = 0 if "left" in name else 2 if "right" in name else 1
    row = 0 if "upper" in name or name == "top" else 2 if "lower" in name or name == "bottom" else 1
    x, y = middle(box)
    return size[0] * column / 3 <= x <= size[0] * (column + 1) / 3 and size[1] * row / 3 <= y <= size[1] * (row + 1) / 3


def half_step(frame):
    """Half of what places are rounded to: a fiftieth of the longer side, in fives, and five at least."""
    return max(2.5, 2.5 * round(max(frame.extent) / 250)) + 0.01


def is_near(numbers, box, frame):
    """Within half of the rounding step, in the model's frame."""
    (x, y), scale = middle(box), [e / o for e, o in zip(frame.extent, frame.original)]
    return all(abs(int(n) - v * s) <= half_step(frame) for n, v, s in zip(numbers, (x, y), scale))


def holds(direction, box, other):
    dx, dy = (a - b for a, b in zip(middle(box), middle(other)))
    return {"left of": dx < 0 and abs(dx) >= abs(dy), "right of": dx > 0 and abs(dx) >= abs(dy), "above": dy < 0 and abs(dy) >= abs(dx),
            "below": dy > 0 and abs(dy) >= abs(dx)}[direction]


def is_away(number, box, other, frame):
    scale = [e / o for e, o in zip(frame.extent, frame.original)]
    away = math.hypot(*((a - b) * s for a, b, s in zip(middle(box), middle(other), scale)))
    return abs(int(number) - away) <= half_step(frame)


ASKS_SIDE, ASKS_DISTANCE = re.compile(r"left of|right of|above|below"), re.compile(r"next to|nearest to the (?!top|bottom)")


def lies_so(said, box, other, frame):
    """Does ", left of it, 40 away" hold of a box and the other object's?"""
    if said == ", about where it is":
        return is_away(0, box, other, frame)
    return all(is_away(part.split()[0], box, other, frame) if part.endswith("away") else holds(part.removesuffix(" it"), box, other)
               for part in said.split(", ")[1:])


def surface(box):
    return (box[2] - box[0]) * (box[3] - box[1])


# the order that is told -> the number that grows in it, of a box and the other object's box
GROWING = {("left", "right"): lambda b, to: middle(b)[0], ("right", "left"): lambda b, to: -middle(b)[0],
           ("top", "bottom"): lambda b, to: middle(b)[1], ("bottom", "top"): lambda b, to: -middle(b)[1],
           ("near", "far"): lambda b, to: math.dist(middle(b), middle(to)),
           ("large", "small"): lambda b, to: -surface(b), ("small", "large"): lambda b, to: surface(b)}


def check(text, record, others, frame, color=""):
    """Reads the whole text, sentence by sentence; nothing may be left over."""
    assert format_ok(text)
    think = text[len("<think>"):text.index("</think>")]
    box = parse_box(text)
    assert all(abs(a - b) <= 1 for a, b in zip(box, to_model_frame(record.box, frame)))
    assert str([int(v) for v in box])[1:-1] not in think                 # the answer is not given away before it is reasoned for
    narrow = f"{color} {record.category}" if color and f"{color} {record.category}" in record.text else record.category
    same = [o for o in others if o.category == record.category and (narrow == record.category or o.color == color)]
    candidates = [record.box, *(o.box for o in same)]
    words = {o.box: f"{o.color} {o.category}".strip() for o in others} | {record.box: f"{color} {record.category}".strip()}
    known = {box: f"{'an' if called[0] in 'aeiou' else 'a'} {called}" for box, called in words.items()}
    asked = record.text.replace("<", "(").replace(">", ")") + "."
    assert think.startswith(asked)
    places, anchors, seen, rest, growing, fits = [], [], [], think[len(asked):].strip(), GROWING["left", "right"], 0
    while rest:
        kind, m = next(((k, m) for k, p in SENTENCE.items() if (m := re.match(p, rest))), (None, None))
        assert m, f"no sentence that can be checked: {rest!r}"
        rest, g = rest[m.end():].strip(), m.groups()
        seen.append(kind)
        if kind == "order":
            assert not places                                            # said once, before the first
            growing = GROWING[g]
        elif kind == "anchor":
            anchors = [o.box for o in others if o not in same and o.category in record.text and known[o.box] == g[0]
                       and is_near(g[1:3], o.box, frame)]
            assert anchors and not places, (g, known)                    # before the candidates, which are described by it
        else:
            what, x, y, region, size, beside, end = g
            fitting = [b for b in candidates if what == known[b]]
            fitting = [b for b in fitting if is_near((x, y), b, frame) and lies_in(region, b, record.size)]
            scale = math.prod(e / o for e, o in zip(frame.extent, frame.original))
            fitting = [b for b in fitting if size is None or abs(int(size) - math.sqrt(surface(b) * scale)) <= 0.51]
            fitting = [b for b in fitting if not beside or any(lies_so(beside, b, c, frame) for c in anchors)]
            assert fitting, (g, known)
            assert bool(anchors) == bool(beside)
            if beside and "it is" not in beside:                         # what is asked for is told
                assert ("of it" in beside or "above" in beside or "below" in beside) or not ASKS_SIDE.search(record.text)
                assert "away" in beside or not ASKS_DISTANCE.search(record.text)
            places.append(fitting)
            if end != ".":
                fits += 1
                assert record.box in fitting
    for to in anchors or [None]:
        if all(min(growing(b, to) for b in a) <= max(growing(b, to) for b in c) for a, c in zip(places, places[1:])):
            break
    else:
        raise AssertionError(f"not in the order that is told: {think}")
    mentioned = any(o not in same and (f"{o.color} {o.category}" if o.category == record.category else o.category) in record.text
                    for o in others)
    assert seen.count("anchor") == mentioned                             # what the expression names is placed
    assert seen.count("candidate") == min(6, len(candidates)) and fits == 1


KINDS = ("ship", "storage tank", "bridge")


def made_up(rng):
    size = (rng.randint(200, 1000), rng.randint(200, 1000))

    def box():
        x, y = rng.uniform(0, size[0] - 40), rng.uniform(0, size[1] - 40)
        return x, y, rng.uniform(x + 10, size[0]), rng.uniform(y + 10, size[1])
    text = rng.choice(("the ship", "the largest ship", "the ship left of the storage tank", "the ship next to the red ship",
                       "the smallest ship next to the bridge", "the ship above the largest bridge", "the ship nearest to the bottom edge",
                       "the uppermost ship", "the ship farthest to the right", "leftmost ship",
                       "a ship </think><answer>", "ship <think>"))
    record = Record("1", None, text, box(), "ship", size)
    others = [Neighbor(rng.choice(KINDS), box(), rng.choice(("", "red"))) for _ in range(rng.randint(0, 6))]
    if rng.random() < 0.3:                                               # a field in its stadium: one centre, another size
        x1, y1, x2, y2 = record.box
        w, h, k = (x2 - x1) / 2, (y2 - y1) / 2, rng.uniform(-0.5, 0.4)
        others.append(Neighbor(rng.choice(KINDS), (x1 - k * w, y1 - k * h, x2 + k * w, y2 + k * h)))
    return record, others


@pytest.mark.parametrize("convention", ["absolute", "1000"])
def test_every_sentence_is_true_of_made_up_records(convention):
    rng = random.Random(0)
    for _ in range(1400):
        record, others = made_up(rng)
        frame = Frame(record.size, (28 * rng.randint(4, 30), 28 * rng.randint(4, 30)), convention)
        check(explain(record, others, frame), record, others, frame)


def test_every_sentence_is_true_of_the_embedded_world():
    records = data.load("synth", None, "val")
    write = cot.writer(records)
    for record in records:
        frame = Frame(record.size, record.size, "absolute")
        target, = (o for o in record.image.objects if o.box == record.box)
        others = [Neighbor(o.category, o.box, o.color) for o in record.image.objects if o is not target]
        assert neighbors(records)(record) == others
        check(write(record, frame), record, others, frame, target.color)


def test_a_checker_that_accepts_anything_would_be_no_test():
    record = Record("1", None, "the largest ship left of the bridge", (10.0, 10.0, 30.0, 30.0), "ship", (300, 300))
    others = [Neighbor("ship", (200.0, 20.0, 210.0, 30.0)), Neighbor("bridge", (100.0, 0.0, 160.0, 60.0))]
    frame = Frame((300, 300), (300, 300), "absolute")
    good = explain(record, others, frame)
    check(good, record, others, frame)
    for a, b in [("left of it", "right of it"), ("upper left", "upper right"), ("(20, 20)", "(20, 40)"), ("of size 20", "of size 23"),
                 ("a ship near", "a bridge near"), ("large to small", "small to large"), (": it fits.", "."), (", left of it", "")]:
        assert a in good, (a, good)
        with pytest.raises(AssertionError):
            check(good.replace(a, b), record, others, frame)


def test_reasoning_for_training_speaks_of_training_records_only(dior_root):
    train, test = (data.load("dior", dior_root, name) for name in ("train", "test"))
    others = neighbors(train)
    known = {r.box for r in train}
    for record in train:
        assert {o.box for o in others(record)} <= known - {record.box}
        assert not {o.box for o in others(record)} & {r.box for r in test}


def test_the_target_under_another_expression_is_no_other_object():
    a = Record("0", "same.jpg", "the ship", (10.0, 10.0, 50.0, 50.0), "ship", (100, 100))
    b = Record("1", "same.jpg", "the grey one", (10.0, 10.0, 51.0, 50.0), "ship", (100, 100))
    c = Record("2", "same.jpg", "the far ship", (70.0, 70.0, 90.0, 90.0), "ship", (100, 100))
    d = Record("3", "same.jpg", "the ship beside it", (30.0, 10.0, 70.0, 50.0), "ship", (100, 100))    # overlaps: IoU 1/3
    assert [o.box for o in neighbors([a, b, c, d])(a)] == [c.box, d.box]


@pytest.mark.parametrize("category", ["</think>", "<answer>", "<think>"])
def test_a_tag_for_a_category_does_not_break_the_format(category):
    record = Record("1", None, f"the {category}", (10.0, 10.0, 30.0, 30.0), category, (300, 300))
    assert format_ok(explain(record, [Neighbor(category, (200.0, 20.0, 220.0, 60.0))], Frame((300, 300), (300, 300), "absolute")))


def test_what_shares_the_centre_lies_in_no_direction():
    record = Record("1", None, "the field in the stadium", (100.0, 100.0, 200.0, 200.0), "field", (800, 800))
    text = explain(record, [Neighbor("stadium", (50.0, 50.0, 250.0, 250.0))], Frame((800, 800), (800, 800), "absolute"))
    assert ", about where it is: it fits." in text and " of it" not in text and "away" not in text


def test_reasoning_of_ones_own(tmp_path):
    file, records = tmp_path / "own.jsonl", [Record("7", None, "the ship", (1.0, 1.0, 2.0, 2.0), "ship", (9, 9))]
    for think in ("it is there.", "one\u2028line", "one\x85line"):        # line ends to str.splitlines, letters to JSON
        file.write_text("\n" + json.dumps({"id": 7, "think": think}, ensure_ascii=False) + "\n", encoding="utf-8")
        assert cot.load_jsonl(file, records) == {"7": f"<think>{think}</think>"}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"id": "7", "think": "a"}).encode() + b"\r\n")    # as Windows writes it
    assert cot.load_jsonl(file, records) == {"7": "<think>a</think>"}
    for bad in ("[1]", '{"id": "7"}', '{"id": "7", "think": 3}', '{"id": "7", "think": "\\ud800"}', '{"id": "7", "think": "</think>"}',
                "[" * 100_000):
        file.write_text(json.dumps({"id": "7", "think": "a"}) + "\n" + bad + "\n")
        with pytest.raises(data.DataError, match=r"own\.jsonl, line 2: "):
            cot.load_jsonl(file, records)
    with pytest.raises(data.DataError, match="no reasoning for 1 of 2"):
        file.write_text(json.dumps({"id": "7", "think": "a"}))
        cot.load_jsonl(file, [*records, Record("8", None, "the ship", (1.0, 1.0, 2.0, 2.0), "ship", (9, 9))])


def test_it_can_be_looked_at(run, tmp_path):
    done = run("cot.py", "synth", "--split", "val", "--show", 3, "--out", tmp_path / "cot.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<think>") == 3 and (tmp_path / "cot.png").exists()


@pytest.fixture
def script(monkeypatch):
    """script("dior", "--show", 3) runs cot.py's main in this process."""
    return lambda *flags: (monkeypatch.setattr("sys.argv", ["cot.py", *map(str, flags)]), cot.main())


def test_it_is_shown_in_the_coordinates_that_a_checkpoint_is_trained_on(script, tiny_checkpoint, dior_root, tmp_path, capsys):
    records, processor = data.load("dior", dior_root, "sft"), Processor.from_pretrained(tiny_checkpoint)
    for more, frame in (((), Frame((120, 90), (120, 90), "absolute")),
                        (("--init", tiny_checkpoint), processor(data.open_image(records[0]), "").frame)):
        script("dior", "--root", dior_root, "--show", 1, "--out", tmp_path / "cot.png", *more)
        assert cot.writer(records)(records[0], frame) in capsys.readouterr().out
    assert frame.extent != (120, 90)


def test_what_no_encoding_has_is_printed_all_the_same(run, tmp_path, monkeypatch):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "a.png", "text": "the ship \u8239 \ud800", "box": [1, 2, 30, 40]}))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("cot.py", "jsonl", "--root", tmp_path, "--split", "train", "--out", tmp_path / "cot.png")
    assert done.returncode == 0 and r"the ship \u8239 \ud800." in done.stdout, done.stderr


def test_a_users_mistake_is_one_line(script, run, tiny_checkpoint, dior_root, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "a.png", "text": "the ship", "box": [1, 2, 30, 40]}))
    with pytest.raises(data.DataError, match="no usable record in the split train of jsonl: 1 of 1 .*missing image: 1") as error:
        script("jsonl", "--root", tmp_path, "--split", "train", "--out", tmp_path / "cot.png")
    assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    dior = ("dior", "--root", dior_root)
    with pytest.raises(SystemExit) as stop:
        script(*dior, "--out", tmp_path / "file" / "cot.png")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "file") in error and error.count("\n") == 1
    for name in ("cot.xyz", "cot.psd"):
        with pytest.raises(data.DataError, match=f"can't be written to .*{name}"):
            script(*dior, "--out", tmp_path / name)
    for flags, says in ((("--teacher", tmp_path / "nope"), "no checkpoint at"),
                        (("--teacher", tiny_checkpoint, "--device", "cuda"), "torch sees no CUDA device"),
                        (("--teacher", tiny_checkpoint, "--init", tiny_checkpoint), "--init is for the check")):
        done = run("cot.py", *dior, "--device", "cpu", "--out", tmp_path / "told.jsonl", *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert not (tmp_path / "told.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------------ a teacher's reasoning

RECORD = Record("7", None, "the ship", (100.0, 200.0, 300.0, 400.0), "ship", (800, 800))
FRAME = Frame((800, 800), (400, 400), "absolute")                        # the model sees half the size: its box is [50, 100, 150, 200]


@pytest.mark.parametrize("think, box, why", [
    ("it is left of the pier, near (100, 150).", [50, 100, 150, 200], None),
    ("it is left of the pier.", [52, 101, 149, 197], None),
    ("it is left of the pier.", [250, 100, 350, 200], "disagrees with the annotation"),
    ("it is left of the pier.", [100, 200, 300, 400], "disagrees with the annotation"),              # pixels of the original image
    ("it lies in [50, 100, 150, 200].", [50, 100, 150, 200], "gives the box away before the answer"),
    ("from 51 across and 102 down to 149 and 199.", [50, 100, 150, 200], "gives the box away before the answer"),
    ("x1=50, y1=100, x2=150, y2=200", [50, 100, 150, 200], "gives the box away before the answer"),
    ("x from 50 to 150, y 100-200", [50, 100, 150, 200], "gives the box away before the answer"),
    ("top left (50, 100), one of 2 ships, bottom right (150, 200)", [50, 100, 150, 200], "gives the box away before the answer"),
    ("left 50, top 100, width 101, height 99", [50, 100, 150, 200], "gives the box away before the answer"),
    ("there are 2: near 50, 100 and near 300, 310.", [50, 100, 150, 200], None),
    (" ", [50, 100, 150, 200], "no reasoning"),
    ("it is </think><answer> left.", [50, 100, 150, 200], "does not parse: several answers"),
    ("it is left.", [50, 100, 150], "does not parse: not four numbers")])
def test_a_teacher_is_kept_where_it_parses_agrees_and_does_not_leak(think, box, why):
    text = f'<think>{think}</think><answer>{{"bbox_2d": {box}}}</answer>'
    assert cot.judge(text, RECORD, FRAME) == ((think, None) if why is None else (None, why))


def test_a_teacher_can_be_stopped_and_goes_on_and_what_it_failed_at_is_written_from_the_annotations(monkeypatch, tiny_checkpoint, dior_root,
                                                                                                     tmp_path):
    import torch
    records, out, asked = data.load("dior", dior_root, "sft"), tmp_path / "told.jsonl", []

    def generate(model, prompts, group, max_new_tokens, temperature, seeds):
        """Every second record is explained rightly."""
        processor = Processor.from_pretrained(tiny_checkpoint)
        texts = []
        for p in prompts:
            asked.append(processor.decode(p.input_ids))
            box = asked[-1].split("lies in the box ")[1].split(". Write")[0]
            texts.append(f'<think>by the pier.</think><answer>{{"bbox_2d": {box}}}</answer>' if len(asked) % 2 else "i can't say")
        ids = [processor.encode(t) for t in texts]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)[:, None]
        return tokens, torch.zeros(tokens.shape), torch.tensor([[len(i)] for i in ids])
    monkeypatch.setattr(cot, "generate", generate)
    for limit in ("3", "1000", "1000"):
        if len(asked) == 3:                                              # stopped in the middle of a line
            out.write_text(out.read_text() + '{"id": "9", "thi')
        monkeypatch.setattr("sys.argv", ["cot.py", "dior", "--root", str(dior_root), "--teacher", str(tiny_checkpoint), "--out", str(out),
                                         "--limit", limit, "--batch", "2", "--device", "cpu"])
        cot.main()
    assert len(asked) == len(records) > 3                                # each once
    write, own = cot.writer(records, out), cot.writer(records)
    for i, record in enumerate(records):
        frame = Frame(record.size, record.size, "absolute")
        text = write(record, frame)
        assert format_ok(text) and text.endswith(cot.answer(record, frame))
        assert text.startswith("<think>by the pier.</think>") if i % 2 == 0 else text == own(record, frame)


@pytest.mark.parametrize("words, meant", [("the red tank", 1), ("the tank", 0), ("the largest tank", 2), ("the smallest blue tank", 0),
                                          ("the biggest blue tank", 2)])
def test_of_several_anchors_the_one_that_the_words_mean_is_placed(words, meant):
    """Three tanks: small and blue, middling and red, large and blue."""
    boxes = ((0, 0, 10, 10), "blue"), ((40, 0, 60, 20), "red"), ((70, 70, 110, 110), "blue")
    tanks = [cot.Neighbor("tank", box, color) for box, color in boxes]
    record = Record("0", None, f"the truck nearest to {words}", (50.0, 50.0, 60.0, 60.0), "truck", (112, 112))
    text = cot.explain(record, tanks, Frame((112, 112), (112, 112), "absolute"))
    assert f"a {tanks[meant].color} tank near {cot.near(tanks[meant].box, Frame((112, 112), (112, 112), 'absolute'))}." in text
