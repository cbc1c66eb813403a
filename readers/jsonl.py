"""Your own data, also in the formats of VLM-R1 and Qwen-VL: one JSON object per line."""
import itertools
import re
from pathlib import Path
from typing import Any

from readers.base import SPLITS, DataError, NoSplit, Records, Refused, read_json_lines
from readers.collect import Collector, numbers, visible_files

ASKING, ANSWERING = ("human", "user"), ("gpt", "assistant", "model")
# Other names of a file, or values of "split", for the split val.
VALIDATION = ("val", "valid", "validation", "dev")
IN_IMAGE = "(?:,? in (?:this|the) (?:image|picture))?"
# Requests of VLM-R1 and several of Qwen. The group is the expression.
REQUESTS = [re.compile(pattern, re.DOTALL | re.IGNORECASE) for pattern in (
    "Please provide the bounding box coordinates? of the region this sentence describes: "
    r"(.*?)\.?",
    rf"(?:please )?(?:Locate|Detect|Find|Ground|Outline the position of) (.+?){IN_IMAGE}"
    # "Find the sign, give way" is no such request.
    r"(?:,? and|[.;]|[,:，\n](?=.*(?:box|coordinate|json)))\s*(?:then )?(?:please )?"
    r"(?:output|report|return|give|provide)\b.*",
    r"(?:please )?(?:output|report|return|give|provide)(?: me)? the (?:bbox|bounding box|location)"
    rf"(?: coordinates?)? of (.+?){IN_IMAGE}(?:,? (?:in|as) JSON(?: format)?)?\.?",
    rf"Locate (.+?){IN_IMAGE}\.?")]
# Tags around an expression, in Qwen-VL, Qwen2-VL and VRSBench.
REFERENCE = re.compile(
    r"<ref>(.*?)</ref>|<\|object_ref_start\|>(.*?)<\|object_ref_end\|>|<p>(.*?)</p>", re.DOTALL)
# Words of an instruction, which do not occur in the description of an object.
INSTRUCTION = re.compile(
    r"(?i)\bbbox|bounding[- ]box|\bcoordinates?\b|\bjson\b|<box>|<\|box_|<\|?object_ref|<ref>")
# Boxes of Qwen-VL and Qwen2-VL, in thousandths of the image's sides.
POINTS = re.compile(
    r"(?:<box>|<\|box_start\|>)\s*\((.*?)\)\s*,\s*\((.*?)\)\s*(?:</box>|<\|box_end\|>)")


def read(root: Path, split: str) -> Records:
    """SPLIT.jsonl; or a single file (root, or in root): "train" unless its lines name a split.
    {"image": path from root, "text": ..., "box": [x1, y1, x2, y2] in pixels}, and optional "id",
    "category", "split"."""
    files = [root] if root.is_file() else visible_files(root, "*.jsonl")
    if not files:
        raise DataError(f"no *.jsonl in {root}; --root must name a folder with train.jsonl, "
                        "val.jsonl, test.jsonl, or one JSONL file")
    rows: dict[str, list[tuple[Path, int, dict[str, Any] | None]]] = {}
    for file in files:
        names_split = len(files) > 1 or file.stem.lower() in (*SPLITS, "sft", "rft", *VALIDATION)
        for number, row in read_json_lines(file):
            row_split = (row or {}).get("split") or (file.stem if names_split else "train")
            rows.setdefault(str(row_split), []).append((file, number, row))
    for name in [name for name in rows if name.lower() in VALIDATION]:
        rows.setdefault("val", rows[name])
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
        named = ""
        for question, answer in requests(row):
            # Qwen-VL names the image in the first request.
            in_question = re.search("<img>(.*?)</img>", question)
            named = in_question[1] if in_question else named
            try:
                text, box, units = row.get("text"), row.get("box"), None
                if "text" not in row and "box" not in row:
                    text, box, units = expression_and_box(question, answer)
                collector.add(
                    where, f"{file.stem}-{number}" if row.get("id") is None else str(row["id"]),
                    image if isinstance(image, str) else named, text, box, row.get("category"),
                    units=units, file=file, size=(row.get("width"), row.get("height")))
            except Refused as reason:
                collector.refuse(str(reason), where)
    known = [rows.get(name) for name in (split, *SPLITS, "sft", "rft")]
    unread = ", ".join(name for name, own in rows.items() if own not in known)
    collector.kept.note = unread and f"of no split that is read by default: {unread}"
    return collector.records


def requests(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Requests and answers of a line: "problem", "solution"; "question", "ground_truth"; or those
    of all turns of "conversations" or "messages". A line without any has one empty request."""
    question = row.get("problem") or row.get("question") or ""
    answer = row.get("solution") or row.get("ground_truth")
    conversation = row.get("conversations") or row.get("messages")
    said = []                     # (speaker, content)
    for turn in conversation if isinstance(conversation, list) else ():
        turn = turn if isinstance(turn, dict) else {}
        content = turn.get("value", turn.get("content"))
        if isinstance(content, list):            # parts of text and images
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(text for text in texts if isinstance(text, str))
        said.append((str(turn.get("from", turn.get("role"))).lower(), content))
    pairs = [(str(request or ""), reply)
             for (first, request), (second, reply) in itertools.pairwise(said)
             if first in ASKING and second in ANSWERING]
    alone = "text" in row or "box" in row or question or answer or not pairs
    return [(str(question), answer)] if alone else pairs


def expression_and_box(question: str, answer: Any) -> tuple[str, Any, int | None]:
    """-> expression, box, units as in Collector.add."""
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
    points = POINTS.findall(answer) if isinstance(answer, str) else []
    if not points:
        return choices[0], answer, None
    return choices[0], numbers(",".join(points[0])) if len(points) == 1 else [], 1000
