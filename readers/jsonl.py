"""readers.jsonl."""
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readers.base import SPLITS, DataError, NoSplit, Records, read_objects
from readers.collect import (
    Annotation,
    Collector,
    bracketed_numbers,
    hold_out,
    numbers,
    visible_files,
)


def read_jsonl(root: Path, split: str) -> Records:
    """Your own data: SPLIT.jsonl, one object a line.

    {"image": path from root, "text": ..., "box": [x1, y1, x2, y2] in pixels} and optional "id",
    "category", "split". Or one file of any name, whose lines are "train" unless they say
    otherwise; root may be that file.
    """
    rows = jsonl_rows(root)
    if split not in rows and split in ("sft", "rft", "val") and "train" in rows:
        train = read_jsonl(root, "train")
        return train if "val" in rows else hold_out(train, split, root)
    if split not in rows:
        raise NoSplit(
            f"{root} has no records of a split {split!r}; it has {', '.join(rows) or 'none'}: "
            f'name a file {split}.jsonl, or give its lines "split": "{split}"')
    folder = root if root.is_dir() else root.parent
    collector = Collector(folder, exact=True, refuse_swapped=True)
    for file, number, row in rows[split]:
        where = f"{file}, line {number}"
        if row is None:
            collector.refuse("no JSON object", where)
            continue
        image = row.get("image") or row.get("images")
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        asked = expression_and_box(row)
        if asked.problem:
            collector.refuse(asked.problem, where)
            continue
        identity = f"{file.stem}-{number}" if row.get("id") is None else str(row["id"])
        collector.add(Annotation(
            where, identity, image if isinstance(image, str) else asked.image, asked.text,
            asked.box, row.get("category"), asked.parts, file=file))
    return collector.records


Row = tuple[Path, int, dict[str, Any] | None]


def jsonl_rows(root: Path) -> dict[str, list[Row]]:
    """Split -> its lines, as (file, line number, object or None)."""
    files = [root] if root.is_file() else visible_files(root, "*.jsonl")
    if not files:
        raise DataError(
            f"no *.jsonl in {root}; --root must name a folder with train.jsonl, val.jsonl, "
            "test.jsonl, or one JSONL file")
    rows: dict[str, list[Row]] = {}
    for file in files:
        named = len(files) > 1 or file.stem in (*SPLITS, "sft", "rft")
        split_of_file = file.stem if named else "train"
        for number, row in read_objects(file):
            split = str((row or {}).get("split") or split_of_file)
            rows.setdefault(split, []).append((file, number, row))
    return rows


@dataclass
class Asked:
    """What a JSONL line asks for and answers, or why it can't be told."""

    text: Any = None
    box: Sequence[float] = ()
    parts: int | None = None      # as in Annotation
    image: str = ""               # named within the question, as Qwen-VL has it
    problem: str = ""


def expression_and_box(row: dict[str, Any]) -> Asked:
    """Expression and box of a JSONL line.

    "text" and "box"; or a request and an answer that holds the box, as VLM-R1 and Qwen train on
    ("problem" and "solution", "conversations", "messages").
    """
    if "text" in row or "box" in row:
        return Asked(row.get("text"), bracketed_numbers(row.get("box")))
    question, answer = question_and_answer(row)
    image = re.search("<img>(.*?)</img>", question)
    question = re.sub(r"(?:Picture \d+:\s*)?<img>.*?</img>|<image>", "", question).strip()
    text, told = expression_in(question, str(answer))
    if not told:
        return Asked(problem="request whose expression can't be told from its instruction")
    box, parts = box_in(answer)
    return Asked(text, box, parts, image[1] if image else "")


def question_and_answer(row: dict[str, Any]) -> tuple[str, Any]:
    """A request and its answer: of their own keys, or of a conversation's one turn each."""
    turns = {}
    conversation = row.get("conversations") or row.get("messages")
    if isinstance(conversation, list):
        speakers = {"user": "human", "assistant": "gpt", "model": "gpt"}
        said = [turn for turn in conversation if isinstance(turn, dict)]
        said = [turn for turn in said if turn.get("from", turn.get("role")) != "system"]
        for turn in said if len(said) == 2 else ():
            speaker = str(turn.get("from", turn.get("role")))
            turns[speakers.get(speaker, speaker)] = turn.get("value", turn.get("content"))
    question = row.get("problem") or row.get("question") or turns.get("human") or ""
    return str(question), row.get("solution") or row.get("ground_truth") or turns.get("gpt")


IN_IMAGE = "(?:,? in (?:this|the) (?:image|picture))?"
# Requests whose expression stands where the brackets are: VLM-R1's, and kinds of Qwen's.
REQUESTS = [re.compile(pattern, re.DOTALL | re.IGNORECASE) for pattern in (
    "Please provide the bounding box coordinates? of the region this sentence describes: "
    r"(.*?)\.?",
    rf"(?:Locate|Detect|Find|Ground) (.+?){IN_IMAGE},?"
    r"(?: and|\.|;) (?:please )?(?:output|report|return|give|provide) .*",
    r"Outline the position of (.+?) and output all the coordinates in JSON format\.?",
    r"(?:please )?(?:output|report|return|give|provide)(?: me)? the (?:bbox|bounding box|location)"
    rf"(?: coordinates?)? of (.+?){IN_IMAGE}(?:,? (?:in|as) JSON(?: format)?)?\.?",
    rf"Locate (.+?){IN_IMAGE}\.?")]
# What marks an expression: Qwen-VL's and Qwen2-VL's tags, and those of VRSBench.
REFERENCE = re.compile(
    r"<ref>(.*?)</ref>|<\|object_ref_start\|>(.*?)<\|object_ref_end\|>|<p>(.*?)</p>", re.DOTALL)
# What no description of an object says, but an instruction does.
INSTRUCTION = re.compile(
    r"\bbbox|bounding[- ]box|\bcoordinates?\b|\bjson\b|<box>|<\|box_|<\|?object_ref|<ref>",
    re.IGNORECASE)


def expression_in(question: str, answer: str) -> tuple[str, bool]:
    """The expression of a request, and whether it could be told from the instruction around it.

    It is marked in the question, else in the answer; or stands in a known request; or is all
    that is said.
    """
    for text in (question, answer):
        marked = ["".join(groups).strip() for groups in REFERENCE.findall(text)]
        if len(marked) == 1:
            return marked[0], True
    for request in REQUESTS:
        match = request.fullmatch(question)
        if match and not INSTRUCTION.search(match[1]):
            return match[1], True
    return question, not INSTRUCTION.search(question)


# Qwen's way to write a box, in thousandths of the image's sides.
POINTS = re.compile(
    r"(?:<box>|<\|box_start\|>)\s*\((.*?)\)\s*,\s*\((.*?)\)\s*(?:</box>|<\|box_end\|>)")


def box_in(answer: Any) -> tuple[list[float], int | None]:
    """The one box of an answer, and its parts as in Annotation; no numbers where it has none."""
    points = POINTS.findall(answer) if isinstance(answer, str) else []
    if points:
        return (numbers(",".join(points[0])) if len(points) == 1 else []), 1000
    return bracketed_numbers(answer), None
