"""answer.py: one case by hand, then the parser on whatever a policy may write."""
import json
import math
import time

import pytest

from answer import FAILURES, clamp_box, failure, format_ok, parse_box, parse_box_lenient

NAN = [math.nan] * 4


def answer(inside):
    return f"<think>It lies in the upper left.</think><answer>{inside}</answer>"


def test_parse_by_hand():
    assert parse_box('<think>A ship.</think><answer>{"bbox_2d": [10, 20.5, 3e1, 40]}</answer>') == (10.0, 20.5, 30.0, 40.0)


def test_clamp_by_hand():
    assert clamp_box((-5, 10, 900, 500), (800, 400)) == (0.0, 10.0, 800.0, 400.0)


@pytest.mark.parametrize("text, want", [
    (answer('{"bbox_2d": [1, 2, 3, 4], "label": "ship", "why": [[], {"bbox_2d": 0}]}'), (1, 2, 3, 4)),
    (answer('\n{"bbox_2d":[0.5,-2,3e0,4E+0]}\n'), (0.5, -2, 3, 4)),
    ('no reasoning <answer>{"bbox_2d": [1, 2, 3, 4]}</answer> and more words', (1, 2, 3, 4)),
    (answer('{"bbox_2d": [1, 2, 3, 4], "n": ' + "9" * 5000 + "}"), (1, 2, 3, 4)),
    (answer('{"label": "\ud800", "bbox_2d": [1, 2, 3, 4]}'), (1, 2, 3, 4)),
    (answer('{"bbox_2d": [1e300, 1e300, 2e300, 2e300]}'), (1e300, 1e300, 2e300, 2e300)),
])
def test_a_box_is_found(text, want):
    assert parse_box(text) == want and all(type(x) is float for x in parse_box(text))
    assert failure(text) is None and parse_box_lenient(text) == want


GOOD = '{"bbox_2d": [1, 2, 3, 4]}'


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
    (answer(f"```json\n{GOOD}\n```"), "not JSON"),
    (answer(GOOD * 2), "not JSON"),
    (answer('{"bbox_2d": [1, 2, 3, 4,]}'), "not JSON"),
    (answer('{"bbox_2d": [1, 2, 3, NaN]}'), "not JSON"),
    (answer('{"bbox_2d": [1, 2, 3, 4], "score": -Infinity}'), "not JSON"),
    (answer('{"bbox_2d": [01, 2, 3, 4]}'), "not JSON"),
    (answer('{"bbox_2d": [1, 2, 3, 4], "x": ' + "[" * 100_000 + "]" * 100_000 + "}"), "not JSON"),
    (answer("[1, 2, 3, 4]"), "no bbox_2d"),
    (answer(f"[{GOOD}]"), "no bbox_2d"),
    (answer("{}"), "no bbox_2d"),
    (answer('"bbox_2d"'), "no bbox_2d"),
    (answer('{"answer": {"bbox_2d": [1, 2, 3, 4]}}'), "no bbox_2d"),
    (answer('{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8]}'), "no bbox_2d"),
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
def test_no_box_and_why(text, why):
    assert parse_box(text) is None and failure(text) == why and why in FAILURES and not format_ok(text)


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
    "newlines": '{"bbox_2d": [1, 2, 3,' + "\n" * 300_000,
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_takes_no_time(hostile):
    start = time.process_time()
    for text in (hostile, answer(hostile), answer('{"bbox_2d": [' + hostile), answer('{"bbox_2d": [1, 2, 3, ' + hostile + "]}")):
        assert parse_box(text) is None and failure(text) in FAILURES and not format_ok(text)
        parse_box_lenient(text)
    assert time.process_time() - start < 1.0                             # sixteen calls; CPU time: a busy machine is no failure


def test_any_text_at_all():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    pieces = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", '{"bbox_2d": [', "1, 2, 3, 4", "]}", "[", "{", '"', ",",
                              "NaN", "1e999", "true", " ", "\ud800", "```json\n", GOOD])
    words = st.lists(st.one_of(pieces, st.text(max_size=5), st.floats().map(repr), st.integers().map(str)), max_size=20).map("".join)

    @hypothesis.settings(max_examples=1500, deadline=None)
    @hypothesis.given(words)
    def check(text):
        for t in (text, answer(text)):
            found = parse_box(t)
            assert (found is None) == (failure(t) is not None)
            assert found is None or (all(map(math.isfinite, found)) and found[2] > found[0] and found[3] > found[1])
            assert found is None or parse_box_lenient(t) == found
            assert not format_ok(t) or found is not None
    check()


def test_any_json_at_all():
    """The parser beside a slow reading of its contract: json without our hooks, then the rules one after the other."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    number = st.one_of(st.integers(-10**20, 10**20), st.floats(), st.booleans())
    value = st.one_of(st.lists(number, min_size=3, max_size=5), st.recursive(number, lambda v: st.lists(v, max_size=4), max_leaves=4))
    objects = st.dictionaries(st.sampled_from(["bbox_2d", "bbox", "label"]), value, max_size=3)

    @hypothesis.settings(max_examples=1500, deadline=None)
    @hypothesis.given(objects)
    def check(written):
        text = json.dumps(written)
        box = written.get("bbox_2d")
        ok = "NaN" not in text and "Infinity" not in text and isinstance(box, list) and len(box) == 4
        ok = ok and all(type(x) in (int, float) for x in box) and float(box[2]) > float(box[0]) and float(box[3]) > float(box[1])
        assert parse_box(answer(text)) == (tuple(map(float, box)) if ok else None)
    check()


@pytest.mark.parametrize("text, want", [
    ('```json\n[\n\t{"bbox_2d": [12, 34, 56, 78], "label": "ship"}\n]\n```', (12, 34, 56, 78)),
    ('[{"bbox_2d": [12, 34, 56, 78], "label": "a"}, {"bbox_2d": [1, 2, 3, 4], "label": "b"}]', (12, 34, 56, 78)),
    ('{"bbox_2d": [12.5, 34, 56, 78]}', (12.5, 34, 56, 78)),
    (answer('```json\n{"bbox_2d": [12, 34, 56, 78]}\n```'), (12, 34, 56, 78)),
    ("<think>not [1, 2, 3, 4]</think>[12, 34, 56, 78]", (12, 34, 56, 78)),
    ("<think>[1, 2, 3, 4]</think><answer>[12, 34, 56, 78]", (12, 34, 56, 78)),
    ("<answer>[1, 2, 3, 4]</answer><answer>[12, 34, 56, 78]</answer>", (12, 34, 56, 78)),
    ("It is at [ 12 , 34 , 56 , 78 ].", (12, 34, 56, 78)),
    ("[56, 34, 12, 78]", None),
    ("[1, 2, 3, 1e999]", None),
    ("[1, 2, 3, 4, 5]", None),
    ("<answer>a ship</answer>", None),
])
def test_lenient_reading(text, want):
    assert parse_box_lenient(text) == want and parse_box(text) is None


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
def test_format(text, ok):
    assert format_ok(text) is ok


@pytest.mark.parametrize("outside", [(-9, 0, 0, 10), (800, 0, 900, 10), (0, 400, 9, 401), (0, -9, 9, -1), tuple(NAN), (5, 5, 5, 9)])
def test_what_has_no_area_in_the_image_is_no_box(outside):
    assert clamp_box(outside, (800, 400)) is None


def test_clamped_floats_do_not_overflow():
    assert clamp_box((-1e300, -1e300, 1e300, math.inf), (800, 400)) == (0.0, 0.0, 800.0, 400.0)
