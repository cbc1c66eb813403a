"""Your own data, also in the formats of VLM-R1 and Qwen-VL: one JSON object per line."""
import re
from pathlib import Path
from typing import Any

from readers.base import SPLITS, DataError, NoSplit, Records, Refused, read_json_lines
from readers.collect import Collector, numbers, visible_files

SPEAKERS = {"user": "human", "assistant": "gpt", "model": "gpt"}
IN_IMAGE = "(?:,? in (?:this|the) (?:image|picture))?"
# Requests of VLM-R1 and several of Qwen. The group is the expression.
REQUESTS = [re.compile(pattern, re.DOTALL | re.IGNORECASE) for pattern in (
    "Please provide the bounding box coordinates? of the region this sentence describes: "
    r"(.*?)\.?",
    rf"(?:Locate|Detect|Find|Ground) (.+?){IN_IMAGE},?"
    r"(?: and|\.|;) (?:please )?(?:output|report|return|give|provide) .*",
    r"Outline the position of (.+?) and output all the coordinates in JSON format\.?",
    r"(?:please )?(?:output|report|return|give|provide)(?: me)? the (?:bbox|bounding box|location)"
    rf"(?: coordinates?)? of (.+?){IN_IMAGE}(?:,? (?:in|as) JSON(?: format)?)?\.?",
    rf"Locate (.+?){IN_IMAGE}\.?")]
# Tags around an expression, in Qwen-VL, Qwen2-VL and VRSBench.
REFERENCE = re.compile(
    r"<ref>(.*?)</ref>|<\|object_ref_start\|>(.*?)<\|object_ref_end\|>|<p>(.*?)</p>", re.DOTALL)
# Words of an instruction, which do not occur in the description of an object.
INSTRUCTION = re.compile(
    r"\bbbox|bounding[- ]box|\bcoordinates?\b|\bjson\b|<box>|<\|box_|<\|?object_ref|<ref>",
    re.IGNORECASE)
# Boxes of Qwen-VL and Qwen2-VL, in thousandths of the image's sides.
POINTS = re.compile(
    r"(?:<box>|<\|box_start\|>)\s*\((.*?)\)\s*,\s*\((.*?)\)\s*(?:</box>|<\|box_end\|>)")


def read(root: Path, split: str) -> Records:
    """SPLIT.jsonl; or a single file (root, or in root): "train" unless its lines name a split.

    {"image": path from root, "text": ..., "box": [x1, y1, x2, y2] in pixels}, and optional "id",
    "category", "split"."""
    files = [root] if root.is_file() else visible_files(root, "*.jsonl")
    if not files:
        raise DataError(
            f"no *.jsonl in {root}; --root must name a folder with train.jsonl, val.jsonl, "
            "test.jsonl, or one JSONL file")
    rows: dict[str, list[tuple[Path, int, dict[str, Any] | None]]] = {}
    for file in files:
        names_split = len(files) > 1 or file.stem in (*SPLITS, "sft", "rft")
        for number, row in read_json_lines(file):
            row_split = (row or {}).get("split") or (file.stem if names_split else "train")
            rows.setdefault(str(row_split), []).append((file, number, row))
    if split not in rows:
        raise NoSplit(
            f"{root} has no records of a split {split!r}; it has {', '.join(rows) or 'none'}: "
            f'name a file {split}.jsonl, or give its lines "split": "{split}"')
    folder = root if root.is_dir() else root.parent
    collector = Collector(folder, exact=True, refuse_swapped=True)
    for file, number, row in rows[split]:
        where = f"{file}, line {number}"
        try:
            if row is None:
                raise Refused("no JSON object")
            text, box, units, image_in_question = expression_and_box(row)
        except Refused as reason:
            collector.refuse(str(reason), where)
            continue
        image = row.get("image") or row.get("images")
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        collector.add(
            where, f"{file.stem}-{number}" if row.get("id") is None else str(row["id"]),
            image if isinstance(image, str) else image_in_question, text, box,
            row.get("category"), units=units, file=file)
    return collector.records


def expression_and_box(row: dict[str, Any]) -> tuple[Any, Any, int | None, str]:
    """-> expression, box, units as in Collector.add, image named in the question.

    A line has "text" and "box"; or a request and an answer with the box: "problem", "solution";
    "question", "ground_truth"; or one turn each of "conversations" or "messages"."""
    if "text" in row or "box" in row:
        return row.get("text"), row.get("box"), None, ""
    turns = {}
    conversation = row.get("conversations") or row.get("messages")
    if isinstance(conversation, list):
        said = [turn for turn in conversation if isinstance(turn, dict)]
        said = [turn for turn in said if turn.get("from", turn.get("role")) != "system"]
        for turn in said if len(said) == 2 else ():
            speaker = str(turn.get("from", turn.get("role")))
            turns[SPEAKERS.get(speaker, speaker)] = turn.get("value", turn.get("content"))
    question = str(row.get("problem") or row.get("question") or turns.get("human") or "")
    answer = row.get("solution") or row.get("ground_truth") or turns.get("gpt")
    image = re.search("<img>(.*?)</img>", question)
    question = re.sub(r"(?:Picture \d+:\s*)?<img>.*?</img>|<image>", "", question).strip()
    # The expression is marked in the question or the answer; else it is part of a known request,
    # or the whole question.
    choices = []
    for text in (question, str(answer)):
        marked = ["".join(groups).strip() for groups in REFERENCE.findall(text)]
        choices += marked if len(marked) == 1 else []
    if not choices:
        matches = [request.fullmatch(question) for request in REQUESTS]
        choices = [match[1] for match in matches if match] + [question]
        choices = [text for text in choices if not INSTRUCTION.search(text)]
    if not choices:
        raise Refused("request with no clear expression within its instruction")
    box, units = answer, None
    points = POINTS.findall(answer) if isinstance(answer, str) else []
    if points:
        box, units = numbers(",".join(points[0])) if len(points) == 1 else [], 1000
    return choices[0], box, units, image[1] if image else ""
