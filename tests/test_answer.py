"""answer.py: one case by hand, then the parser on anything a policy may write."""
import doctest
import json
import math
import random
import time
from typing import Any

import pytest

from qwen import answer as answer_format
from qwen.answer import (
    FAILURES,
    Box,
    Frame,
    clamp_box,
    failure,
    form,
    format_box,
    format_ok,
    locate,
    parse_box,
    parse_box_lenient,
    write,
)

NAN = [math.nan] * 4


def answer(content: str) -> str:
    return f"<think>It lies in the upper left.</think><answer>{content}</answer>"


def overlap(a: Box, b: Box) -> float:
    """IoU of two boxes, in floats."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return intersection / (area_a + area_b - intersection)


def test_parse_by_hand() -> None:
    text = '<think>A ship.</think><answer>{"bbox_2d": [10, 20.5, 3e1, 40]}</answer>'
    assert parse_box(text) == (10.0, 20.5, 30.0, 40.0)


def test_write_by_hand() -> None:
    text = '<think>A ship.</think><answer>{"bbox_2d": [1, 2, 3, 4]}</answer>'
    assert write("A ship.", "[1, 2, 3, 4]") == text and format_ok(text)
    assert write(None, "[1, 2, 3, 4]") == '<answer>{"bbox_2d": [1, 2, 3, 4]}</answer>'


def test_the_worked_examples() -> None:
    results = doctest.testmod(answer_format)
    assert results.attempted and not results.failed


@pytest.mark.parametrize("convention", ["absolute", "1000"])
def test_a_taught_box_overlaps_its_target_however_thin_that_is(convention: str) -> None:
    """A large image is shrunk, and a thin target is thinner than a unit of the model's frame.

    Each end rounded by itself, the box that is taught would miss it: [2.55, 2.58] became [3, 4].
    """
    rng = random.Random(0)
    frame = Frame((4000, 3000), (1316, 980), convention)
    for _ in range(2000):
        x = rng.uniform(0, 3990)
        y = rng.uniform(0, 2990)
        target = (x, y, x + rng.uniform(1 / 16, 5), y + rng.uniform(1 / 16, 10))
        written = parse_box(write(None, format_box(target, frame)))
        assert overlap(locate(written, frame), target) > 0


def test_clamp_by_hand() -> None:
    assert clamp_box((-5, 10, 900, 500), (800, 400)) == (0.0, 10.0, 800.0, 400.0)


@pytest.mark.parametrize("text, want", [
    (answer('{"bbox_2d": [1, 2, 3, 4], "label": "ship", "why": [[], {"bbox_2d": 0}]}'),
     (1, 2, 3, 4)),
    (answer('\n{"bbox_2d":[0.5,-2,3e0,4E+0]}\n'), (0.5, -2, 3, 4)),
    ('no reasoning <answer>{"bbox_2d": [1, 2, 3, 4]}</answer> and more words',
     (1, 2, 3, 4)),
    (answer('{"bbox_2d": [1, 2, 3, 4], "n": ' + "9" * 5000 + "}"), (1, 2, 3, 4)),
    (answer('{"label": "\ud800", "bbox_2d": [1, 2, 3, 4]}'), (1, 2, 3, 4)),
    (answer('{"bbox_2d": [1e300, 1e300, 2e300, 2e300]}'),
     (1e300, 1e300, 2e300, 2e300)),
    # Under any key, next to other lists.
    (answer('{"bbox": [1, 2, 3, 4]}'), (1, 2, 3, 4)),
    (answer('{"": [1.5, 2.25, 3.5, 4.75], "point": [2, 3]}'), (1.5, 2.25, 3.5, 4.75)),
    (answer('{"bbox_2d": [1, 2, 3], "bbox_2d": [5, 6, 7, 8]}'), (5, 6, 7, 8)),
    (answer('{"bbox_2d": [1, 2, 3, "4"], "other": [5, 6, 7, 8]}'), (5, 6, 7, 8)),
    # Strings are no lists.
    (answer('{"box": [1, 2, 3, 4], "label": "not [5, 6, 7, 8]"}'), (1, 2, 3, 4)),
])
def test_a_box_is_found(text: str, want: Box) -> None:
    box = parse_box(text)
    assert box == want and all(type(x) is float for x in box)
    assert failure(text) is None and parse_box_lenient(text) == want


GOOD = '{"bbox_2d": [1, 2, 3, 4]}'
WRITTEN = {
    GOOD: "bare",
    f"\n{GOOD} ": "bare",
    '{"label": "[", "box": [1, 2, 3, 4]}': "bare",
    f"```json\n{GOOD}\n```": "fenced",
    f"```{GOOD}```": "fenced",
    f"\n ```\n{GOOD}```\n": "fenced",
    f"[{GOOD}]": "list",
    f" [ {GOOD}\n]\n": "list",
    f"```\n[{GOOD}]\n```": "fenced list",
    # As Qwen2.5-VL writes it.
    '```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "ship"}\n]\n```': "fenced list",
}


@pytest.mark.parametrize("content", WRITTEN)
def test_an_answer_may_be_fenced_or_a_list_of_one_object(content: str) -> None:
    text = answer(content)
    assert parse_box(text) == parse_box_lenient(text) == (1, 2, 3, 4) and failure(text) is None
    assert form(text) == WRITTEN[content] and format_ok(text)
    assert not format_ok(f"```json\n{text}\n```") and not format_ok(f"<answer>{content}</answer>")


@pytest.mark.parametrize("text, why", [
    ("", "no answer"),
    (GOOD, "no answer"),
    (f"<think>cut off <answer>{GOOD}", "no answer"),
    (f"</answer>{GOOD}<answer>", "no answer"),
    (f"<ANSWER>{GOOD}</ANSWER>", "no answer"),
    (answer(GOOD) + f"<answer>{GOOD}</answer>", "several answers"),
    (f"<think>as in <answer></think><answer>{GOOD}</answer>", "several answers"),
    (answer(GOOD) + "</answer>", "several answers"),
    (answer(""), "not JSON"),
    (answer(f"the box is {GOOD}"), "not JSON"),
    (answer(GOOD * 2), "not JSON"),
    (answer(f"```json\n{GOOD}"), "not JSON"),
    (answer(f"{GOOD}\n```"), "not JSON"),
    (answer(f"```python\n{GOOD}\n```"), "not JSON"),
    (answer(f"It is here: ```json\n{GOOD}\n```"), "not JSON"),
    (answer(f"```json\n{GOOD}\n``` or so"), "not JSON"),
    (answer(f"```json\n{GOOD}\n```\n```json\n{GOOD}\n```"), "not JSON"),
    (answer("```"), "not JSON"),
    (answer("``````"), "not JSON"),
    (answer("[one, two, three, four]"), "not JSON"),
    (answer('{"bbox_2d": [1, 2, 3, 4,]}'), "not JSON"),
    (answer('{"bbox_2d": [1, 2, 3, NaN]}'), "not JSON"),
    (answer('{"bbox_2d": [1, 2, 3, 4], "score": -Infinity}'), "not JSON"),
    (answer('{"bbox_2d": [01, 2, 3, 4]}'), "not JSON"),
    (answer('{"bbox_2d": [1, 2, 3, 4], "x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
     "not JSON"),
    (answer("[1, 2, 3, 4]"), "no object"),
    (answer("[[1, 2, 3, 4]]"), "no object"),
    (answer("```json\n[1, 2, 3, 4]\n```"), "no object"),
    (answer(f"[[{GOOD}]]"), "no object"),
    (answer(f'[{GOOD}, {{"label": "ship"}}]'), "no object"),
    (answer("[]"), "no object"),
    (answer('"bbox_2d"'), "no object"),
    (answer(f"[{GOOD}, {GOOD}]"), "several boxes"),
    (answer('{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8]}'), "several boxes"),
    (answer('{"bbox_2d": [1, 2, 3, 4], "bbox": [5, 6, 7, 8]}'), "several boxes"),
    (answer('{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]]}'), "several boxes"),
    (answer('{"bbox_2d": [1, 2, 3, 4], "or": {"maybe": [[5, 6, 7, 8]]}}'), "several boxes"),
    (answer('{"bbox_2d": [1, 2, 3, 4], "or": [8, 7, 6, 5]}'), "several boxes"),
    (answer("{}"), "not four numbers"),
    (answer("[{}]"), "not four numbers"),
    (answer('{"answer": {"bbox_2d": [1, 2, 3, 4]}}'), "not four numbers"),
    (answer('{"bbox_2d": [[1, 2, 3, 4]]}'), "not four numbers"),
    (answer('{"bbox_2d": ["one", "two", "three", "four"]}'), "not four numbers"),
    (answer('{"bbox_2d": [1, 2, 3]}'), "not four numbers"),
    (answer('{"bbox_2d": [1, 2, 3, 4, 5]}'), "not four numbers"),
    (answer('{"bbox_2d": ["1", 2, 3, 4]}'), "not four numbers"),
    (answer('{"bbox_2d": [0, 0, true, 4]}'), "not four numbers"),
    (answer('{"bbox_2d": [null, 2, 3, 4]}'), "not four numbers"),
    (answer('{"bbox_2d": {"x": 1, "y": 2, "z": 3, "w": 4}}'), "not four numbers"),
    (answer('{"bbox_2d": "1234"}'), "not four numbers"),
    (answer('{"bbox_2d": [1, 2, 3, 1e999]}'), "not four numbers"),
    (answer('{"bbox_2d": [1, 2, 3, ' + "9" * 5000 + "]}"), "not four numbers"),
    (answer('{"bbox_2d": [3, 2, 1, 4]}'), "no area"),
    (answer('{"bbox_2d": [1, 2, 1, 4]}'), "no area"),
    (answer('{"bbox_2d": [1, 4, 3, 2]}'), "no area"),
])
def test_no_box_and_why(text: str, why: str) -> None:
    assert parse_box(text) is None and failure(text) == why and why in FAILURES
    assert not format_ok(text)


HOSTILE = {
    "open brackets": "[" * 100_000,
    "brackets": "[" * 100_000 + "]" * 100_000,
    "braces": '{"bbox_2d":' * 100_000,
    "answers": "<answer>" * 100_000,
    "closing answers": "</answer>" * 100_000,
    "thoughts": "<think></think>" * 100_000,
    "half tags": "<answer" * 100_000,
    "spaces": " " * 1_000_000,
    "spaces in a list": ("[" + " " * 1000) * 1000,
    "spaces between tags": "<think></think>" + " " * 1_000_000 + "x<answer></answer>",
    "digits": "9" * 1_000_000,
    "list of long numbers": "[" + ",".join(["9" * 5000] * 100),
    "short numbers": "[" + "1," * 300_000,
    "exponent": "1e" + "9" * 100_000,
    "quotes": '"' * 100_001,
    "backslashes": '"' + "\\" * 100_001,
    "surrogates": "\ud800" * 100_000,
    "nulls": "\0" * 100_000,
    "commas": "[1,2,3," * 50_000,
    "points": "(1,2)," * 50_000,
    "points apart": "(1,2)" + " " * 500_000 + "(1,2)" + " " * 500_000,
    "box markers": "<|box_start|>(" * 50_000,
    "newlines": '{"bbox_2d": [1, 2, 3,' + "\n" * 300_000,
    "backticks": "`" * 300_000,
    "hundredths": "{<1><2><3>" * 50_000,
    "hundredths apart": "<1>" + (" " * 1000 + "<1>") * 500,
    "five hundredths": "<1>" * 100_000,
    "box tags": "<box>[[1,2,3," * 50_000,
    "box tags apart": ("<box>" + " " * 1000) * 1000,
    "y first": '"box_2d": [1,2,3,' * 30_000,
    "fences": "```json\n" * 50_000,
    "fences apart": ("```" + " " * 1000) * 1000,
    "lists of four": "[" + "[1,2,3,4]," * 30_000 + "0]",
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_takes_time_in_proportion_to_its_length(hostile: str) -> None:
    texts = (
        hostile, answer(hostile), answer('{"bbox_2d": [' + hostile),
        answer('{"bbox_2d": [1, 2, 3, ' + hostile + "]}"))
    # CPU time, compared with that of a walk over all characters, does not depend on how busy or
    # slow the machine is. What grows with the square of the length takes thousands of walks.
    start = time.process_time()
    assert sum(1 for text in texts for _ in text) > 0
    walk = time.process_time() - start
    start = time.process_time()
    for text in texts:
        assert parse_box(text) is None and failure(text) in FAILURES and not format_ok(text)
        parse_box_lenient(text)
    assert time.process_time() - start < 100 * walk


def test_any_json_at_all() -> None:
    """The parser agrees with a slow reading: plain json, then the rules one by one."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    number = st.one_of(st.integers(-10**20, 10**20), st.floats(), st.booleans())
    nested = st.recursive(number, lambda v: st.lists(v, max_size=4), max_leaves=4)
    value = st.one_of(st.lists(number, min_size=3, max_size=5), nested)
    objects = st.dictionaries(
        st.sampled_from(["bbox_2d", "bbox", "label"]), value, max_size=3)

    def slow_reading(written: dict[str, Any]) -> Box | None:
        def is_four(value: Any) -> bool:
            four = isinstance(value, list) and len(value) == 4
            return four and all(type(x) in (int, float) for x in value)

        def count(value: Any) -> int:
            if not isinstance(value, list):
                return 0
            return is_four(value) + sum(map(count, value))
        text = json.dumps(written)
        boxes = list(filter(is_four, written.values()))
        if "NaN" in text or "Infinity" in text or len(boxes) != 1:
            return None
        x1, y1, x2, y2 = map(float, boxes[0])
        single = sum(map(count, written.values())) == 1
        return (x1, y1, x2, y2) if single and x2 > x1 and y2 > y1 else None

    @hypothesis.settings(max_examples=1500, deadline=None)
    @hypothesis.given(objects)
    def check(written: dict[str, Any]) -> None:
        assert parse_box(answer(json.dumps(written))) == slow_reading(written)
    check()


@pytest.mark.parametrize("text, want", [
    ('```json\n[\n\t{"bbox_2d": [12, 34, 56, 78], "label": "ship"}\n]\n```',
     (12, 34, 56, 78)),
    ('[{"bbox_2d": [12, 34, 56, 78], "label": "a"}, '
     '{"bbox_2d": [1, 2, 3, 4], "label": "b"}]', (12, 34, 56, 78)),
    ('{"bbox_2d": [12.5, 34, 56, 78]}', (12.5, 34, 56, 78)),
    (answer('```json\n[12, 34, 56, 78]\n```'), (12, 34, 56, 78)),
    (answer("[12, 34, 56, 78]"), (12, 34, 56, 78)),
    ("<think>not [1, 2, 3, 4]</think>[12, 34, 56, 78]", (12, 34, 56, 78)),
    ("<think>[1, 2, 3, 4]</think><answer>[12, 34, 56, 78]", (12, 34, 56, 78)),
    ("<answer>[1, 2, 3, 4]</answer><answer>[12, 34, 56, 78]</answer>", (12, 34, 56, 78)),
    ("It is at [ 12 , 34 , 56 , 78 ].", (12, 34, 56, 78)),
    ("<|box_start|>(12,34),(56,78)<|box_end|>", (12, 34, 56, 78)),
    ("<|box_start|> ( 12.5, 34 ) , (56, 78)<|box_end|><|im_end|>", (12.5, 34, 56, 78)),
    ("<|object_ref_start|>the ship (2, 3)<|object_ref_end|>"
     "<|box_start|>(12,34),(56,78)<|box_end|><|box_start|>(1,2),(3,4)<|box_end|>",
     (12, 34, 56, 78)),
    ("the ship(12,34),(56,78)", (12, 34, 56, 78)),
    (answer("<|box_start|>(12,34),(56,78)<|box_end|>"), (12, 34, 56, 78)),
    ("<think>not (1, 2),(3, 4)</think>(12,34),(56,78)", (12, 34, 56, 78)),
    ("[56, 34, 12, 78]", None),
    ("<|box_start|>(56,34),(12,78)<|box_end|>", None),
    ("<|box_start|>(12,34),(56,1e999)<|box_end|>", None),
    ("<|quad_start|>(12,34),(56,34),(56,78),(12,78)<|quad_end|>", None),
    ("(12,34)", None),
    ("[1, 2, 3, 1e999]", None),
    ("[1, 2, 3, 4, 5]", None),
    ("<answer>a ship</answer>", None),
])
def test_lenient_reading(text: str, want: Box | None) -> None:
    assert parse_box_lenient(text) == want and parse_box(text) is None


@pytest.mark.parametrize("text, want", [
    # In a frame of 200 x 400: hundredths are 2 and 4, thousandths 0.2 and 0.4.
    ("{<25><40><33><60>}", (50, 160, 66, 240)),
    ("The ship is at {<25><40><33><60>|<30>}.", (50, 160, 66, 240)),
    ("{<25><40><33><60>}|<30>", (50, 160, 66, 240)),
    (answer("{<25> <40> <33> <60>}"), (50, 160, 66, 240)),
    ("{<25><40><33><60>}<delim>{<1><2><3><4>}", (50, 160, 66, 240)),
    ("{<1><2><3><2><3><4><1><4>}", None),                        # four corners
    ("{<33><40><25><60>}", None),
    ("<ref>the ship</ref><box>[[250, 400, 335, 600]]</box>", (50, 160, 67, 240)),
    ('```json\n[{"box_2d": [400, 250, 600, 335], "label": "ship"}]\n```', (50, 160, 67, 240)),
    (answer('{"box_2d": [400, 250, 600, 335]}'), (50, 160, 67, 240)),
    # A key or brackets of another kind: the frame's own unit, x first.
    ('[{"bbox_2d": [40, 25, 60, 33]}]', (40, 25, 60, 33)),
    ("<box>[40, 25, 60, 33]</box>", (40, 25, 60, 33)),
    ("[[40, 25, 60, 33]]", (40, 25, 60, 33)),
])
def test_boxes_with_a_unit_of_their_own(text: str, want: Box | None) -> None:
    assert parse_box_lenient(text, (200, 400)) == (want and pytest.approx(want))
    assert parse_box("{<25><40><33><60>}") is None


@pytest.mark.parametrize("text, ok", [
    (f"<think>a</think><answer>{GOOD}</answer>", True),
    (f" \n<think>a\nb</think>\n\n<answer>{GOOD}</answer>\n", True),
    (f"<think></think><answer>{GOOD}</answer>", True),
    (f"<answer>{GOOD}</answer>", False),
    (f"<answer>{GOOD}</answer><think>a</think>", False),
    (f"Well, <think>a</think><answer>{GOOD}</answer>", False),
    (f"<think>a</think> so <answer>{GOOD}</answer>", False),
    (f"<think>a</think><answer>{GOOD}</answer>.", False),
    (f"<think>a</think><think>b</think><answer>{GOOD}</answer>", False),
    (f"<think>a</think></think><answer>{GOOD}</answer>", False),
    (f"<think>a<answer>{GOOD}</answer></think>", False),
    ("<think>a</think><answer>none</answer>", False),
])
def test_format(text: str, ok: bool) -> None:
    assert format_ok(text) is ok


@pytest.mark.parametrize("outside", [
    (-9, 0, 0, 10), (800, 0, 900, 10), (0, 400, 9, 401), (0, -9, 9, -1), tuple(NAN),
    (5, 5, 5, 9)])
def test_what_has_no_area_in_the_image_is_no_box(outside: Box) -> None:
    assert clamp_box(outside, (800, 400)) is None


def test_clamped_floats_do_not_overflow() -> None:
    box = (-1e300, -1e300, 1e300, math.inf)
    assert clamp_box(box, (800, 400)) == (0.0, 0.0, 800.0, 400.0)
