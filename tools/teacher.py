"""A teacher gets image, expression and true box, and explains how to find the object.

    python cot.py dior --teacher CKPT
    python cot.py dior --teacher http://localhost:8000/v1 --model Qwen2.5-VL-72B-Instruct \\
        --coords resized --init Qwen2.5-VL-3B-Instruct/ --parallel 32 --want 30000

A server needs OpenAI's chat-completions protocol, as vLLM and SGLang have it. Each explanation is
a line of a JSONL, kept or refused (cot.py shows the format). The same command continues after a
stop, and asks again for records without a whole answer. The paper, too, refuses incomplete chains,
inconsistent coordinates and wrong boxes (second-hand); refusing a box given away is ours.
"""
import argparse
import base64
import fcntl
import functools
import http.client
import io
import itertools
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from email.utils import mktime_tz, parsedate_tz
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

import data
import reward
from model import QwenVL
from qwen.answer import EXAMPLE, TAGS, Frame, format_box, parse_box
from qwen.generate import generate
from qwen.hub import MALFORMED
from qwen.processor import Processor, Prompt, frame_by_coords
from readers.base import DataError, Record, Records, UnreadableImage, sha256
from readers.images import is_plain
from train.checkpoints import open_model
from train.dist import check_writable, choose_device, fail, start

TEACHER_PROMPT = (
    "The object that is described as {text} lies in the box {box}; coordinates are {units}. "
    "Write down how one finds it who does not know the box: what is asked for, which objects of "
    "that kind there are and where in the image they lie, how they lie to each other, and why "
    "this one fits. Write a place as a point (x, y) in the same coordinates; use no other "
    "numbers, but to count objects. Put that into <think> </think> tags and do not write the "
    "box there. Then answer with the box in <answer> </answer> tags, like " + EXAMPLE)
INCONSISTENT = "inconsistent coordinate format"
MIN_TEACHER_IOU = 0.5         # of the teacher's box with the annotation
REVEALING_DISTANCE = 3        # in units of the model's frame
MAX_COUNT = 20                # larger whole numbers are coordinates or sizes
PLAIN_NUMBER = r"\d++(?:\.\d++)?+"
TWO_NUMBERS = rf"{PLAIN_NUMBER}\s*,\s*{PLAIN_NUMBER}"
# A point (x, y) or a box [x1, y1, x2, y2], in either kind of brackets.
COORDINATES = re.compile(rf"[(\[]\s*{TWO_NUMBERS}(?:\s*,\s*{TWO_NUMBERS})?\s*[)\]]")
# "x1 = 12" is a coordinate and "12 pixels" a size, however small the number is.
BARE_COORDINATE = re.compile(r"\b[xywh]\d?\s*[=:]\s*\d|\d\s*(?:px|pixels?)\b", re.IGNORECASE)
# No percents, and no digits that follow a letter: "A380".
OTHER_NUMBER = re.compile(rf"(?<![A-Za-z\d.]){PLAIN_NUMBER}(?!\s*%)")

LINE_START = b'{"id": '       # of each line in a teacher's file
FIRST_BACKOFF = 1.0           # seconds before the second try, doubled for each further one
MAX_BACKOFF = 60.0
MAX_RETRY_AFTER = 3600.0      # seconds that a server can ask to wait
GIVE_UP_AFTER = 20            # records in a row without an answer: the server is gone
MIN_SECRET_LENGTH = 8         # shorter keys are words, such as vLLM's EMPTY


@dataclass
class Explanation:
    """A request about a record, and its answer."""

    record: Record
    seed: int                     # of the sampling; it depends on the record, not on the order
    frame: Frame | None = None    # of the teacher's coordinates
    text: str | None = None       # the answer; None: no whole one
    failure: str = ""             # why not


def prompt_blanks(record: Record, frame: Frame) -> dict[str, str]:
    """What fills in TEACHER_PROMPT."""
    units = "in thousandths of the image's width and height, from 0 to 1000"
    if frame.convention == "absolute":
        width, height = frame.resized
        units = f"in pixels of the image, which is {width} wide and {height} high"
    return {"text": record.text, "box": format_box(record.box, frame), "units": units}


def filter_explanation(text: str, record: Record, frame: Frame) -> tuple[str | None, str | None]:
    """A teacher's text -> (reasoning, None), or (None, why it is refused)."""
    # 1. One closed think block that is not empty, then an answer.
    once = text.count("<think>") == text.count("</think>") == 1
    blocks = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", text, re.DOTALL)
    think = blocks[1].strip() if once and blocks else ""
    if not think or any(tag in think for tag in TAGS):
        return None, "incomplete chain"

    # 2. The right box. One that is right in another convention is not a wrong object.
    box = parse_box(text)
    if box is None:
        return None, INCONSISTENT
    pixels = Frame(frame.original, frame.resized, "absolute")
    thousandths = Frame(frame.original, frame.resized, "1000")
    readings = torch.tensor(
        [frame.to_image(box), box, pixels.to_image(box), thousandths.to_image(box),
         thousandths.to_image([1000 * v for v in box])], dtype=torch.float64)
    iou = reward.iou(readings, torch.tensor(record.box, dtype=torch.float64))      # (5,)
    if iou[0] < MIN_TEACHER_IOU:
        return None, INCONSISTENT if iou.max() >= MIN_TEACHER_IOU else "wrong box"

    # 3. The reasoning does not write the box, as corners or as corner and size, in any order
    #    and with up to two numbers in between. "x1" is a name, "100-150" are two numbers.
    numbers = [float(n) for n in re.findall(r"(?<![A-Za-z\d.])\d{1,6}(?:\.\d+)?", think)]
    windows = [sorted(numbers[i:i + 6]) for i in range(max(1, len(numbers) - 5))]
    for (x1, y1, x2, y2), window in itertools.product((box, frame.to_model(record.box)), windows):
        for notation in sorted((x1, y1, x2, y2)), sorted((x1, y1, x2 - x1, y2 - y1)):
            for four in itertools.combinations(window, 4):
                if all(abs(a - b) <= REVEALING_DISTANCE for a, b in zip(four, notation)):
                    return None, "box given away"

    # 4. Coordinates can be converted: they are points and boxes within the frame, not shares of
    #    the sides. Other numbers are counts, or the expression's.
    for match in COORDINATES.finditer(think):
        values = [float(n) for n in re.findall(PLAIN_NUMBER, match[0])]
        beyond = any(value > frame.extent[i % 2] for i, value in enumerate(values))
        if beyond or ("." in match[0] and max(values) <= 1):
            return None, INCONSISTENT
    rest = COORDINATES.sub(" ", think)
    for number in OTHER_NUMBER.findall(rest):
        is_count = "." not in number and float(number) <= MAX_COUNT
        if not is_count and number not in re.findall(PLAIN_NUMBER, record.text):
            return None, INCONSISTENT
    return (None, INCONSISTENT) if BARE_COORDINATE.search(rest) else (think, None)


@contextmanager
def open_explanations(out: Path) -> Iterator[tuple[BinaryIO, dict[str, str | None]]]:
    """Opens a teacher's file for this process alone -> file, {id: why refused, None if kept}."""
    advice = "name another file with --out"
    try:
        file = open(out, "a+b")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DataError(f"{out} is being written by another process; wait, or {advice}") from None
    except OSError as error:
        raise DataError(f"{out} can't be written ({error.strerror}); {advice}") from None
    with file:
        file.seek(0)
        finished = {}
        end = 0                       # of the whole lines, in bytes
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                finished[str(row["id"])] = row.get("refused")
            except MALFORMED:
                # A killed call may leave the start of a line, which is removed.
                is_start = line.startswith(LINE_START) or LINE_START.startswith(line)
                if line.endswith(b"\n") or not is_start:
                    raise DataError(
                        f"{out}, line {number}: not a line of a teacher's file; {advice}") from None
                file.truncate(end)
                break
            end += len(line)
            if not line.endswith(b"\n"):
                file.write(b"\n")
        yield file, finished


def run_teacher(args: argparse.Namespace, records: Records) -> None:
    """Writes a line per record until all are done, --want are kept, or the teacher is gone."""
    if args.model:
        processor = Processor.from_pretrained(args.init) if args.coords == "resized" else None
        ask = functools.partial(ask_server, args, processor)
    else:
        model, processor = open_model(args.teacher, start(args.device))
        ask = functools.partial(ask_checkpoint, args, model, processor)
    out = Path(args.out or f"cot_{args.name.replace('/', '_')}_{args.split}.jsonl")
    check_writable(out.parent)
    with open_explanations(out) as (file, finished):
        counts = Counter(finished.values())        # reason -> lines; None: kept
        done_before = len(finished)
        requests = [
            Explanation(r, int.from_bytes(sha256(f"{args.seed} {r.id}")[:4], "big"))
            for r in records if r.id not in finished]
        enough = args.want is not None and counts[None] >= args.want
        requests = [] if enough else requests[:args.limit]
        undone = []
        in_a_row = 0
        bar = tqdm(total=len(requests), desc="teacher")
        with bar, closing(ask(requests)) as explanations:
            for explanation in explanations:
                if explanation.text is None:
                    undone.append(explanation)
                    in_a_row += 1
                else:
                    record, frame, text = explanation.record, explanation.frame, explanation.text
                    think, reason = filter_explanation(text, record, frame)
                    answer = {"refused": reason, "text": text} if reason else {"think": think}
                    line = {"id": record.id, **answer, "frame": asdict(frame)}
                    file.write((json.dumps(line) + "\n").encode())
                    file.flush()                   # a killed call loses no line
                    finished[record.id] = reason
                    counts[reason] += 1
                    in_a_row = 0
                refused = counts.total() - counts[None]
                bar.set_postfix_str(f"kept {counts[None]} refused {refused}", refresh=False)
                bar.update()
                if counts[None] == args.want or in_a_row == GIVE_UP_AFTER:
                    break
    print(f"written: {out}; {counts.pop(None, 0)} of {len(finished)} records have reasoning, "
          f"{len(records) - len(finished)} are still to come")
    for reason, count in sorted(counts.items()):
        print(f"  refused: {count} {reason}")
    if undone:
        print(f"  left undone: {len(undone)}, the first is {undone[0].record.id!r} "
              f"({undone[0].failure}); the same command asks for them again")
        if in_a_row == GIVE_UP_AFTER or len(finished) == done_before:
            fail(f"no answer from {args.teacher} ({undone[-1].failure}); "
                 "the same command continues when it answers")


def ask_checkpoint(
        args: argparse.Namespace, model: QwenVL, processor: Processor,
        requests: Sequence[Explanation]) -> Iterator[Explanation]:
    """Yields the requests with a checkpoint's answers, --batch at once."""
    for i in range(0, len(requests), args.batch):
        batch = []
        prompts = []
        for request in requests[i:i + args.batch]:
            try:
                image = data.open_image(request.record)
            except UnreadableImage as error:
                request.failure = str(error)
                yield request
                continue
            pixels, grid, resized = processor.patches(image)
            request.frame = Frame(image.size, resized, processor.convention)
            blanks = prompt_blanks(request.record, request.frame)
            image_tokens = int(grid.prod()) // processor.merge ** 2
            ids = processor.turns(TEACHER_PROMPT, image_tokens, **blanks)
            prompts.append(Prompt(torch.tensor(ids), pixels, grid, request.frame))
            batch.append(request)
        if batch:
            seeds = torch.tensor([request.seed for request in batch])
            tokens, _, lengths = generate(          # tokens (Q, 1, L), lengths (Q, 1)
                model, prompts, 1, args.max_new_tokens, args.temperature, seeds)
            for request, ids, length in zip(batch, tokens[:, 0], lengths[:, 0]):
                request.text = processor.decode(ids[:length])
                yield request


@dataclass(eq=False)
class Unanswered(Exception):
    """A request to a server without a whole answer."""

    reason: str
    retry: bool = True
    wait: float = 0.0             # seconds that the server asks to wait
    remedy: str = ""              # what to change, if no request can succeed


def ask_server(
        args: argparse.Namespace, processor: Processor | None,
        requests: Sequence[Explanation]) -> Iterator[Explanation]:
    """Yields the requests with a server's answers in any order, --parallel at once.

    processor: resizes images as the teacher's does. DataError if no request can succeed."""
    key = os.environ.get(args.key_env, "").strip()
    # The server may repeat the key. It is replaced in all that is printed or written.
    secret = re.compile(re.escape(key) if len(key) >= MIN_SECRET_LENGTH else "(?!)")
    stopped = threading.Event()

    def ask(request: Explanation) -> Explanation:
        request.frame = frame_by_coords(request.record.size, args.coords, processor)
        try:
            url = image_data_url(request.record)
        except UnreadableImage as error:
            request.failure = str(error)
            return request
        prompt = TEACHER_PROMPT.format(**prompt_blanks(request.record, request.frame))
        content = [{"type": "image_url", "image_url": {"url": url}},
                   {"type": "text", "text": prompt}]
        body = {"model": args.model, "messages": [{"role": "user", "content": content}],
                "max_tokens": args.max_new_tokens, "temperature": args.temperature}
        for attempt in range(args.tries):
            if stopped.is_set():
                break
            # With the same seed, the next answer would be cut at the same place.
            body["seed"] = (request.seed + attempt) % 2 ** 31
            try:
                request.text = secret.sub("[key]", post(args, key, json.dumps(body).encode()))
                break
            except Unanswered as error:
                reason = secret.sub("[key]", error.reason)
                printable = "".join(c if c.isprintable() else " " for c in reason)
                request.failure = " ".join(printable.split())[:200]
                if error.remedy:
                    stopped.set()
                    raise DataError(
                        f"{args.teacher} answers {request.failure}; {error.remedy}") from None
                if not error.retry or attempt + 1 == args.tries:
                    break
                # Random, so that requests that failed together do not come back together.
                backoff = min(MAX_BACKOFF, FIRST_BACKOFF * 2 ** attempt) * random.uniform(0.5, 1)
                wait = min(MAX_RETRY_AFTER, error.wait) * random.uniform(1, 1.1)
                stopped.wait(max(backoff, wait))
        return request

    # These threads are daemons, unlike ThreadPoolExecutor's: once enough explanations are kept,
    # or after Ctrl-C, the process ends without waiting for the requests under way.
    pool = ThreadPool(args.parallel)
    try:
        yield from pool.imap_unordered(ask, requests)
    finally:
        stopped.set()
        pool.terminate()


def post(args: argparse.Namespace, key: str, body: bytes) -> str:
    """Sends one request -> the text of the answer, or Unanswered. Follows no redirects."""
    url = urlsplit(args.teacher)
    connect = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[url.scheme]
    connection = connect(url.hostname, url.port, timeout=args.timeout)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    deadline = time.monotonic() + args.timeout
    content = b""
    try:
        connection.request("POST", url.path.rstrip("/") + "/chat/completions", body, headers)
        response = connection.getresponse()
        # A socket's timeout never runs out if a byte comes now and then.
        while piece := response.read1(1 << 16):
            content += piece
            if time.monotonic() > deadline:
                raise TimeoutError
    except TimeoutError:
        raise Unanswered(f"no whole answer within {args.timeout:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(f"{type(error).__name__}: {error}") from None
    finally:
        connection.close()
    if response.length:
        raise Unanswered("the answer was cut")
    status = response.status
    if status == 200:
        try:
            choice = json.loads(content)["choices"][0]
            # A lone surrogate has no bytes to train on.
            text = choice["message"]["content"].encode("utf-8", "replace").decode()
        except MALFORMED:
            raise Unanswered("the answer is no chat completion with a text") from None
        if choice.get("finish_reason") == "length":
            raise Unanswered("the explanation was cut at --max-new-tokens")
        return text
    # A server that refuses a key may quote parts of it, so its words are not shown.
    if status in (401, 403):
        remedy = f"it refuses the key in the environment variable {args.key_env}, or its absence"
        raise Unanswered(str(status), remedy=remedy)
    message = content.decode("utf-8", "replace")
    with suppress(*MALFORMED):
        value = json.loads(content)
        message = json.dumps(value)
        message = str(value["error"]["message"])       # as OpenAI's servers put it
    wait = 0.0
    retry_after = response.getheader("Retry-After", "")
    with suppress(ValueError, TypeError, OverflowError):
        if re.fullmatch(PLAIN_NUMBER, retry_after):
            wait = float(retry_after)
        else:
            wait = mktime_tz(parsedate_tz(retry_after)) - time.time()
    retry = status in (408, 429) or status >= 500
    remedy = "check --teacher and --model" if status == 404 or status < 400 else ""
    raise Unanswered(f"{status}: {message}", retry, wait, remedy)


def image_data_url(record: Record) -> str:
    """A record's image as a data URL: its JPEG or PNG file, or a PNG of its pixels if other
    programs may show the file differently (turned as EXIF says, transparency on black)."""
    image = data.open_image(record)
    content = b""
    if isinstance(record.image, Path) and is_plain(record.image):
        content = record.image.read_bytes()
    kind = "jpeg" if content.startswith(b"\xff\xd8\xff") else "png"
    if kind == "png" and not content.startswith(b"\x89PNG\r\n\x1a\n"):
        buffer = io.BytesIO()
        image.info = {}                            # metadata of the file
        image.save(buffer, "PNG")
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def check_teacher_flags(args: argparse.Namespace) -> None:
    """Ends the script if flags do not fit together, or the device or the key can't be used."""
    if not (args.teacher or "").startswith(("http://", "https://")):
        if args.model or args.coords:
            fail("--model and --coords are about a server: --teacher http://host:port/v1")
        if args.teacher and args.init:
            fail("--init is for the check, or for a server; a checkpoint has its own coordinates")
        args.device = choose_device(args.device) if args.teacher else None
        return
    if not args.model or not args.coords:
        fail("a server as --teacher needs --model, the name of the model there, and --coords")
    if args.coords == "resized" and not args.init:
        fail("--coords resized needs --init, a checkpoint that resizes images as the teacher does")
    fits = False
    with suppress(ValueError):
        url = urlsplit(args.teacher)
        fits = url.hostname and url.port != 0 and not (url.username or url.password or url.query)
    if not fits:
        # The address is not shown: it may hold a password.
        fail("the address of --teacher must be like http://host:port/v1, without a user, a "
             "password or a query; put a key into the environment variable of --key-env")
    if not re.fullmatch("[!-~]*", os.environ.get(args.key_env, "").strip()):
        fail(f"the key in the environment variable {args.key_env} holds characters that no "
             "HTTP header can carry; set it again")
