"""tools.teacher."""
import argparse
import base64
import fcntl
import http.client
import io
import json
import math
import os
import queue
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

import data
import reward
from qwen.answer import EXAMPLE, Frame, format_box, parse_box
from qwen.generate import generate
from qwen.processor import Processor, Prompt, frame_by_coords
from readers import base, images
from readers.base import DataError, Record, Records, UnreadableImage, read_json_lines
from train import checkpoints, dist
from train import run as runtime

Box = tuple[float, float, float, float]          # (x1, y1, x2, y2)
# A teacher's box agrees with the annotation from this IoU on.
MIN_TEACHER_IOU = 0.5
# Four numbers this near to the box's, in units of the model's frame, reveal it.
REVEALING_DISTANCE = 3
# Whole numbers up to this one may count objects; larger ones are taken for coordinates or sizes.
MAX_COUNT = 20
PLAIN_NUMBER = r"\d++(?:\.\d++)?+"
# A point (x, y) or a box [x1, y1, x2, y2], in either kind of brackets.
TWO_NUMBERS = rf"{PLAIN_NUMBER}\s*,\s*{PLAIN_NUMBER}"
COORDINATES = re.compile(rf"[(\[]\s*{TWO_NUMBERS}(?:\s*,\s*{TWO_NUMBERS})?\s*[)\]]")
# "x1 = 12" is a coordinate and "12 pixels" are a size, however small.
BARE_COORDINATE = re.compile(r"\b[xywh]\d?\s*[=:]\s*\d|\d\s*(?:px|pixels?)\b", re.IGNORECASE)
TEACHER_PROMPT = (
    "The object that is described as {text} lies in the box {box}; coordinates are {units}. "
    "Write down how one finds it who does not know the box: what is asked for, which objects of "
    "that kind there are and where in the image they lie, how they lie to each other, and why "
    "this one fits. Write a place as a point (x, y) in the same coordinates; use no other "
    "numbers, but to count objects. Put that into <think> </think> tags and do not write the "
    "box there. Then answer with the box in <answer> </answer> tags, like " + EXAMPLE)
# Why an explanation is refused. The first three are the paper's.
INCOMPLETE = "incomplete chain"
INCONSISTENT = "inconsistent coordinate format"
WRONG_BOX = "wrong box"
GIVEN_AWAY = "box given away"
# How each line of a teacher's file begins.
LINE_START = b'{"id": '
# Seconds before the second try of a request; they double with every further one.
FIRST_BACKOFF = 1.0
MAX_BACKOFF = 60.0
# A server that asks for a longer pause is not waited for so long.
MAX_RETRY_AFTER = 3600.0
# So many records in a row without an answer mean that the server is gone.
GIVE_UP_AFTER = 20
# A shorter key is no secret, but a word such as vLLM's EMPTY, which an explanation may hold too.
MIN_SECRET_LENGTH = 8


def box_area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def box_iou(a: Box, b: Box) -> float:
    """IoU of two boxes, in double precision."""
    tensors = (torch.tensor(box, dtype=torch.float64) for box in (a, b))
    return reward.iou(*tensors).item()


# ---------------------------------------------------------------- a teacher's explanations

@dataclass(frozen=True)
class Explanation:
    """What a teacher says of a record."""

    record: Record
    frame: Frame               # that the teacher's coordinates are in
    text: str | None           # None where no whole answer came
    failure: str = ""          # why not


# What tells teachers apart: how they are asked. Yields explanations in any order.
Ask = Callable[[Sequence[Record]], Iterator[Explanation]]


def teacher_blanks(record: Record, frame: Frame) -> dict[str, str]:
    """What fills in TEACHER_PROMPT; the box is told in the teacher's frame."""
    units = "in thousandths of the image's width and height, from 0 to 1000"
    if frame.convention == "absolute":
        width, height = frame.resized
        units = f"in pixels of the image, which is {width} wide and {height} high"
    return {"text": record.text, "box": format_box(record.box, frame), "units": units}


def teacher_request(record: Record, frame: Frame) -> str:
    """What a teacher is asked."""
    return TEACHER_PROMPT.format(**teacher_blanks(record, frame))


def filter_explanation(text: str, record: Record, frame: Frame) -> tuple[str | None, str | None]:
    """A teacher's completion -> its reasoning and None, or None and why it is refused.

    incomplete chain: not one closed think block with something in it, then an answer.
    inconsistent coordinate format: no box that can be parsed, or one that is right in another
        convention than the teacher's; or reasoning whose numbers can't be converted.
    wrong box: its IoU with the annotation is below MIN_TEACHER_IOU.
    box given away: the reasoning already writes it.
    """
    think = complete_reasoning(text)
    if think is None:
        return None, INCOMPLETE
    box = parse_box(text)
    if box is None:
        return None, INCONSISTENT
    if box_iou(frame.to_image(box), record.box) < MIN_TEACHER_IOU:
        readings = [box_iou(other, record.box) for other in other_readings(box, frame)]
        # A box that is right when it is read otherwise is no mistake about the object.
        return None, INCONSISTENT if max(readings) >= MIN_TEACHER_IOU else WRONG_BOX
    if reveals_box(think, [box, frame.to_model(record.box)]):
        return None, GIVEN_AWAY
    if not is_convertible(think, record.text, frame):
        return None, INCONSISTENT
    return think, None


def complete_reasoning(text: str) -> str | None:
    """The reasoning of a completion, None where it is empty, unclosed, or without an answer."""
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        return None
    blocks = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", text, re.DOTALL)
    think = blocks[1].strip() if blocks else ""
    if not think or "<answer>" in think or "</answer>" in think:
        return None
    return think


def other_readings(box: Box, frame: Frame) -> list[Box]:
    """An answer's box in original pixels, had it been written in other conventions.

    These are pixels of the original image, pixels of the resized one, thousandths and shares of
    the sides.
    """
    shares = [1000 * v for v in box]
    in_thousandths = Frame(frame.original, frame.resized, "1000")
    in_resized = Frame(frame.original, frame.resized, "absolute")
    return [box, in_resized.to_image(box), in_thousandths.to_image(box),
            in_thousandths.to_image(shares)]


def is_convertible(think: str, expression: str, frame: Frame) -> bool:
    """Whether all coordinates in the reasoning can be told from other numbers, and fit the frame.

    Other numbers are counts, percents, and those of the expression.
    """
    for match in COORDINATES.finditer(think):
        values = [float(number) for number in re.findall(PLAIN_NUMBER, match[0])]
        beyond = [value > frame.extent[i % 2] for i, value in enumerate(values)]
        # (0.25, 0.4) are shares of the sides.
        if any(beyond) or ("." in match[0] and max(values) <= 1):
            return False
    rest = COORDINATES.sub(" ", think)
    if BARE_COORDINATE.search(rest):
        return False
    # The reasoning repeats the expression, and its numbers are not coordinates.
    expression_numbers = re.findall(PLAIN_NUMBER, expression)
    # Digits that follow a letter are part of a name: "A380".
    for match in re.finditer(rf"(?<![A-Za-z\d.]){PLAIN_NUMBER}(?!\s*%)", rest):
        is_count = "." not in match[0] and float(match[0]) <= MAX_COUNT
        if not is_count and match[0] not in expression_numbers:
            return False
    return True


def reveals_box(think: str, boxes: Sequence[Box]) -> bool:
    """Whether the reasoning writes one of these boxes, by its corners or corner and size.

    Its four numbers may stand in any order, with up to two other numbers between them.
    """
    # "x1" is a name and no number; "100-150" are two numbers.
    numbers = re.findall(r"(?<![A-Za-z\d.])\d{1,6}(?:\.\d+)?", think)
    values = [float(number) for number in numbers]
    windows = [values[i:i + 6] for i in range(max(1, len(values) - 5))]
    for x1, y1, x2, y2 in boxes:
        for notation in ((x1, y1, x2, y2), (x1, y1, x2 - x1, y2 - y1)):
            if any(contains_all(window, notation) for window in windows):
                return True
    return False


def contains_all(values: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether each of the wanted numbers is near a value of its own, in whatever order."""
    if not wanted:
        return True
    for i, value in enumerate(values):
        is_near = abs(value - wanted[0]) <= REVEALING_DISTANCE
        if is_near and contains_all([*values[:i], *values[i + 1:]], wanted[1:]):
            return True
    return False


# ---------------------------------------------------------------- the file of explanations

@dataclass
class Progress:
    """What a teacher's file holds, and what this call could not get."""

    finished: set[str] = field(default_factory=set)    # ids
    kept: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    undone: list[Explanation] = field(default_factory=list)
    undone_in_a_row: int = 0
    answered: bool = False                             # by the teacher, in this call

    def add(self, identity: str, reason: str | None) -> None:
        """Counts a line; reason: why it is refused, None where it is kept."""
        self.finished.add(identity)
        if reason is None:
            self.kept += 1
        else:
            self.refusals[reason] += 1


def open_explanations(out: Path) -> BinaryIO:
    """Opens a teacher's file to be read and appended to, by this process alone."""
    try:
        file = open(out, "a+b")
    except OSError as error:
        raise DataError(f"{out} can't be written ({error.strerror}); "
                        "name another file with --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DataError(f"{out} is being written by another process; "
                        "wait for it, or name another file with --out") from None
    return file


def read_progress(file: BinaryIO, out: Path) -> Progress:
    """Reads the file so far; what a call that was killed has left of a line is removed."""
    file.seek(0)
    content = file.read()
    whole_lines, _, last_line = content.rpartition(b"\n")
    if is_json(last_line):
        # Only its end is missing.
        whole_lines = content
    progress = Progress()
    for number, line in read_json_lines(out, whole_lines):
        if not isinstance(line, dict) or "id" not in line:
            raise DataError(f'{out}, line {number}: not a JSON object with an "id"; '
                            "name another file with --out")
        progress.add(str(line["id"]), str(line["refused"]) if "refused" in line else None)
    if is_json(last_line):
        file.write(b"\n")
        file.flush()
    elif last_line.startswith(LINE_START) or LINE_START.startswith(last_line):
        file.truncate(len(content) - len(last_line))
    else:
        raise DataError(f"{out}: its last line is not of a teacher's file; "
                        "name another file with --out")
    return progress


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def write_explanation(file: BinaryIO, explanation: Explanation, progress: Progress) -> None:
    """Judges an explanation, appends its line and counts it."""
    record = explanation.record
    think, reason = filter_explanation(explanation.text, record, explanation.frame)
    line = {"id": record.id, "think": think}
    if reason is not None:
        line = {"id": record.id, "refused": reason, "text": explanation.text}
    line["frame"] = asdict(explanation.frame)
    file.write((json.dumps(line) + "\n").encode())
    # At once, so that a call that is killed loses no line.
    file.flush()
    progress.add(record.id, reason)


def run_teacher(args: argparse.Namespace, records: Records, ask: Ask) -> None:
    """Has a teacher explain each record's known box; writes a line for each, kept or refused."""
    out = Path(args.out or f"cot_{args.name.replace('/', '_')}_{args.split}.jsonl")
    dist.check_writable(out.parent)
    with open_explanations(out) as file:
        progress = read_progress(file, out)
        remaining = [r for r in records if r.id not in progress.finished][:args.limit]
        if not is_enough(progress, args):
            collect_explanations(args, remaining, ask, file, progress)
    print_progress(progress, out, len(records))
    if progress.undone and (progress.undone_in_a_row == GIVE_UP_AFTER or not progress.answered):
        dist.fail(f"no answer from {args.teacher} ({progress.undone[-1].failure}); "
                     "the same command goes on when it answers")


def is_enough(progress: Progress, args: argparse.Namespace) -> bool:
    return bool(args.want) and progress.kept >= args.want


def collect_explanations(
        args: argparse.Namespace, records: Sequence[Record], ask: Ask, file: BinaryIO,
        progress: Progress) -> None:
    """Writes the lines of these records until there are enough, or the server is gone."""
    bar = tqdm(total=len(records), desc="teacher")
    with bar, closing(ask(records)) as explanations:
        for explanation in explanations:
            if explanation.text is None:
                progress.undone.append(explanation)
                progress.undone_in_a_row += 1
            else:
                write_explanation(file, explanation, progress)
                progress.undone_in_a_row = 0
                progress.answered = True
            bar.set_postfix_str(
                f"kept {progress.kept} refused {progress.refusals.total()}", refresh=False)
            bar.update()
            if is_enough(progress, args) or progress.undone_in_a_row == GIVE_UP_AFTER:
                break


def print_progress(progress: Progress, out: Path, total: int) -> None:
    """Says what was written, why how many are refused, and what is left. total: of records."""
    done = len(progress.finished)
    print(f"written: {out}; {progress.kept} of {done} records have reasoning, "
          f"{total - done} are still to come")
    for reason, count in sorted(progress.refusals.items()):
        print(f"  refused: {count} {reason}")
    if progress.undone:
        first = progress.undone[0]
        print(f"  left undone: {len(progress.undone)}, the first is {first.record.id!r} "
              f"({first.failure}); the same command asks for them again")


# ---------------------------------------------------------------- a checkpoint as teacher

def record_seed(args: argparse.Namespace, record: Record) -> int:
    """Of a record's sampling: its own, so that it does not depend on where a call began."""
    digest = base.fingerprint(f"{args.seed} {record.id}")
    return int.from_bytes(digest[:4], "big")


def checkpoint_prompt(record: Record, processor: Processor) -> Prompt:
    """The request to a checkpoint; its frame is the one that the checkpoint answers in."""
    image = data.open_image(record)
    pixels, grid, resized = processor.patches(image)
    frame = Frame(image.size, resized, processor.convention)
    image_tokens = int(grid.prod()) // processor.merge ** 2
    ids = processor.turns(TEACHER_PROMPT, image_tokens, **teacher_blanks(record, frame))
    return Prompt(torch.tensor(ids), pixels, grid, frame)


def checkpoint_teacher(args: argparse.Namespace, device: torch.device) -> Ask:
    """A checkpoint that explains --batch records at once."""
    model, processor = checkpoints.open_model(args.teacher, device)

    def ask(records: Sequence[Record]) -> Iterator[Explanation]:
        for i in range(0, len(records), args.batch):
            batch = records[i:i + args.batch]
            readable = []
            prompts = []
            for record in batch:
                try:
                    prompts.append(checkpoint_prompt(record, processor))
                except UnreadableImage as error:
                    frame = Frame(record.size, record.size, "absolute")
                    yield Explanation(record, frame, None, str(error))
                    continue
                readable.append(record)
            if not readable:
                continue
            seeds = torch.tensor([record_seed(args, record) for record in readable])
            tokens, _, lengths = generate(
                model, prompts, 1, args.max_new_tokens, args.temperature, seeds)
            # tokens (Q, 1, L), lengths (Q, 1)
            for record, prompt, ids, n in zip(readable, prompts, tokens[:, 0], lengths[:, 0]):
                yield Explanation(record, prompt.frame, processor.decode(ids[:n]))

    return ask


# ---------------------------------------------------------------- a server as teacher

class Unanswered(Exception):
    """A request without a whole answer; the message says why."""

    def __init__(
            self, message: str, retry: bool = True, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry = retry
        self.retry_after = retry_after             # seconds that the server asks to wait


class ChatServer:
    """A server that speaks OpenAI's chat-completions protocol; its methods run in threads.

    The key stands in the request's header alone. Whatever comes from the server may echo it, so
    `redact` goes over all that leaves this class.
    """

    def __init__(self, args: argparse.Namespace, processor: Processor | None) -> None:
        self.args = args
        self.processor = processor                 # that resizes as the teacher's, or None
        self.url = urlsplit(args.teacher)
        self.key = read_key(args.key_env)
        # Set when no more answers are wanted: who waits to try again then does not.
        self.stopped = threading.Event()

    def explain(self, record: Record) -> Explanation:
        """Asks until a whole answer has come, --tries times at most."""
        frame = self.teacher_frame(record)
        try:
            request = self.request_of(record, frame)
        except UnreadableImage as error:
            return Explanation(record, frame, None, str(error))
        reason = ""
        for attempt in range(self.args.tries):
            if self.stopped.is_set():
                break
            # Each try has its own seed, because the same one would be cut at the same place.
            request["seed"] = (record_seed(self.args, record) + attempt) % 2 ** 31
            try:
                content = self.post(json.dumps(request).encode())
                return Explanation(record, frame, self.redact(read_completion(content)))
            except Unanswered as error:
                reason = one_line(self.redact(str(error)))
                if not error.retry:
                    break
                if attempt + 1 < self.args.tries:
                    self.stopped.wait(backoff(attempt, error.retry_after))
        return Explanation(record, frame, None, reason)

    def teacher_frame(self, record: Record) -> Frame:
        """The frame that --coords names."""
        return frame_by_coords(record.size, self.args.coords, self.processor)

    def request_of(self, record: Record, frame: Frame) -> dict[str, Any]:
        """The body of a request, but for its seed."""
        # A lone surrogate in an expression has no bytes to send.
        text = teacher_request(record, frame).encode("utf-8", "replace").decode()
        content = [
            {"type": "image_url", "image_url": {"url": image_data_url(record)}},
            {"type": "text", "text": text},
        ]
        return {
            "model": self.args.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.args.max_new_tokens,
            "temperature": self.args.temperature,
        }

    def post(self, body: bytes) -> bytes:
        """Sends one request -> the body of its answer. Redirects are not followed.

        Unanswered where the server fails, DataError where the flags must be wrong.
        """
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        path = self.url.path.rstrip("/") + "/chat/completions"
        deadline = time.monotonic() + self.args.timeout
        secure = self.url.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = connect(self.url.hostname, self.url.port, timeout=self.args.timeout)
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            content = read_body(response, deadline)
        except TimeoutError:
            raise Unanswered(f"no whole answer within {self.args.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        self.check_status(response, content)
        return content

    def check_status(self, response: http.client.HTTPResponse, content: bytes) -> None:
        """Raises what an HTTP status other than 200 means."""
        status = response.status
        if status == 200:
            return
        if status in (408, 429) or status >= 500:
            wait = retry_after(response.getheader("Retry-After"))
            raise Unanswered(f"{status}: {error_message(content)}", retry_after=wait)
        # A server may quote the key, or parts of it, when it refuses it: that is not repeated.
        if status in (401, 403):
            raise DataError(
                f"{self.args.teacher} answers {status}: it refuses the key in the environment "
                f"variable {self.args.key_env}, or its absence")
        if status == 404 or status < 400:
            message = one_line(self.redact(error_message(content)))
            raise DataError(f"{self.args.teacher} answers {status} ({message}); "
                            "check --teacher and --model")
        raise Unanswered(f"{status}: {error_message(content)}", retry=False)

    def redact(self, text: str) -> str:
        """A text without the key."""
        if len(self.key) < MIN_SECRET_LENGTH:
            return text
        return text.replace(self.key, "[key]")


def read_key(name: str) -> str:
    """The key in this environment variable, "" where there is none: not every server asks."""
    key = os.environ.get(name, "").strip()
    if not all("!" <= character <= "~" for character in key):
        dist.fail(f"the key in the environment variable {name} holds characters that no "
                     "HTTP header can carry; set it again")
    return key


def image_data_url(record: Record) -> str:
    """A record's image as a data URL: its file as it is where that is JPEG or PNG, else as PNG."""
    image = data.open_image(record)
    content = b""
    # A server may turn an image as its EXIF orientation says, show it on black or cut its bits.
    if not hasattr(record.image, "draw") and images.is_plain(record.image):
        content = Path(record.image).read_bytes()
    if content.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    else:
        kind = "png"
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            buffer = io.BytesIO()
            # Without what the file says beside its pixels.
            image.info = {}
            image.save(buffer, "PNG")
            content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def read_body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Reads an answer to its end, piece by piece, so that a slow one is given up in time."""
    pieces = []
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError
    # Bytes that the header promised and that never came.
    if response.length:
        raise Unanswered("the answer was cut")
    return b"".join(pieces)


def read_completion(content: bytes) -> str:
    """The text of a chat completion. Unanswered where it is none, or was cut at its length."""
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["message"]["content"]
        finish_reason = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Unanswered("the answer is no chat completion") from None
    if not isinstance(text, str):
        raise Unanswered("the answer holds no text")
    if finish_reason == "length":
        raise Unanswered("the explanation was cut at --max-new-tokens")
    # A lone surrogate has no bytes to train on.
    return text.encode("utf-8", "replace").decode()


def error_message(content: bytes) -> str:
    """What the body of an error says: OpenAI's {"error": {"message": ...}}, or all of it."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content.decode("utf-8", "replace")
    if isinstance(value, dict) and isinstance(value.get("error"), dict):
        value = value["error"].get("message", value)
    return value if isinstance(value, str) else json.dumps(value)


def one_line(text: str) -> str:
    """The beginning of a text, without line ends and what no terminal should get."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())[:200]


def retry_after(header: str | None) -> float | None:
    """A Retry-After header, seconds or an HTTP date -> seconds, None where it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            moment = parsedate_to_datetime(header)
            # RFC 9110: a date without a zone is in universal time.
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            seconds = (moment - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return None
    return min(seconds, MAX_RETRY_AFTER) if seconds >= 0 else None


def backoff(attempt: int, wanted: float | None) -> float:
    """Seconds to wait behind try 0, 1, ...: twice as long each time, spread at random.

    The spread keeps requests that failed together from coming again together. wanted: what the
    server asks for; that is not gone below.
    """
    delay = min(MAX_BACKOFF, FIRST_BACKOFF * 2 ** attempt) * random.uniform(0.5, 1.0)
    if wanted is None:
        return delay
    return max(delay, wanted * random.uniform(1.0, 1.1))


def server_teacher(args: argparse.Namespace) -> Ask:
    """A server that is asked for --parallel records at once, each in a thread."""
    processor = Processor.from_pretrained(args.init) if args.coords == "resized" else None
    server = ChatServer(args, processor)

    def ask(records: Sequence[Record]) -> Iterator[Explanation]:
        waiting: queue.SimpleQueue[Record] = queue.SimpleQueue()
        results: queue.SimpleQueue[Explanation | Exception] = queue.SimpleQueue()
        for record in records:
            waiting.put(record)

        def work() -> None:
            while not server.stopped.is_set() and not waiting.empty():
                try:
                    results.put(server.explain(waiting.get_nowait()))
                except queue.Empty:                # another thread has taken the last one
                    return
                except Exception as error:         # raised below, where the results are read
                    server.stopped.set()
                    results.put(error)

        # Daemons: a call that has enough does not wait for the answers under way.
        for _ in range(min(args.parallel, len(records))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in records:
                result = results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            # Also where the caller has enough and reads no further.
            server.stopped.set()

    return ask


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", metavar="CKPT or URL",
        help="have this checkpoint explain the known boxes, or the server behind this address "
        "of OpenAI's protocol: http://host:port/v1")
    add("--limit", type=runtime.positive,
        help="records in this call; default: all that are left")
    add("--want", type=runtime.positive,
        help="stop when so many explanations are kept, those of earlier calls among them")
    add("--max-new-tokens", type=runtime.positive, default=400,
        help="tokens of an explanation at most")
    add("--temperature", type=float, default=0.7, help="of sampling; 0 is greedy")
    add = parser.add_argument_group("teacher, a checkpoint").add_argument
    add("--batch", type=runtime.positive, default=16, help="records at once")
    runtime.add_device_flag(add)
    add = parser.add_argument_group("teacher, a server").add_argument
    add("--model", help="name of the model there")
    add("--coords", choices=("original", "resized", "1000"),
        help="coordinates that the model knows: pixels of the original image, pixels of the "
        "image as it is resized (needs --init), thousandths of its sides")
    add("--parallel", type=runtime.positive, default=8, help="requests at once")
    add("--tries", type=runtime.positive, default=8,
        help="of a request that gets no whole answer; then the record is left undone")
    add("--timeout", type=runtime.above_zero, default=120.0, help="seconds for an answer")
    add("--key-env", metavar="NAME", default="OPENAI_API_KEY",
        help="environment variable with the server's key; none is sent where it is not set")


def is_server(teacher: str | None) -> bool:
    return teacher is not None and teacher.startswith(("http://", "https://"))


def check_teacher_flags(args: argparse.Namespace) -> None:
    """Ends the script where flags do not fit together."""
    if not 0 <= args.temperature < math.inf:
        dist.fail(f"--temperature {args.temperature} is not a number from 0 up; 0 is greedy")
    if not is_server(args.teacher):
        if args.teacher and args.init:
            dist.fail("--init is for the check; a --teacher speaks in its own frame")
        if args.model or args.coords:
            dist.fail("--model and --coords are about a server: --teacher http://host:port/v1")
        return
    if not args.model or not args.coords:
        dist.fail("a server as --teacher needs --model, the name of the model there, and "
                     "--coords original, resized or 1000, the coordinates that it knows")
    if args.coords == "resized" and not args.init:
        dist.fail("--coords resized needs --init, a checkpoint whose processor resizes images "
                     "as the teacher's does")
    url = urlsplit(args.teacher)
    # What stands there would be shown wherever the address is.
    if url.username or url.password or url.query:
        dist.fail("the address of --teacher holds a user, a password or a query; it is to "
                     "end in /v1, and a key belongs into the environment variable of --key-env")
    try:
        fits = bool(url.hostname) and url.port != 0
    except ValueError:
        fits = False
    if not fits:
        dist.fail(f"--teacher {args.teacher} is no address like http://host:port/v1")
