"""A teacher gets the image, the expression and the true box, and explains how to find the object.

It is a checkpoint, or a server with OpenAI's chat-completions protocol: docs/running.md has the
commands, cot.py the form of the file. Like the paper (second-hand), this refuses incomplete chains,
inconsistent coordinates and wrong boxes, and also reasoning that contains the box (ours).
"""
import base64
import fcntl
import io
import itertools
import json
import os
import random
import re
import threading
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

import data
import reward
from eval import sample_texts
from model import QwenVL
from qwen.answer import ANSWER, EXAMPLE, TAGS, THINK, WHOLE, Frame, format_box, parse_box
from qwen.hub import MALFORMED
from qwen.processor import Processor, Prompt, frame_by_coords
from readers.base import DataError, Record, Records, UnreadableImage, sha256
from readers.images import is_plain
from tools.chat import Unanswered, find_proxy, post
from train.checkpoints import open_model
from train.dist import check_writable, choose_device, fail, start

TEACHER_PROMPT = (
    "The object that is described as {text} lies in the box {box}; coordinates are {units}. "
    "Write down how one finds it who does not know the box: what is asked for, which objects of "
    "that kind there are and where in the image they lie, how they lie to each other, and why "
    "this one fits. Write a place as a point (x, y) in the same coordinates; use no other "
    "numbers, but to count objects. Put that into <think> </think> tags and do not write the "
    "box there. Then answer with the box in <answer> </answer> tags, like " + EXAMPLE)
INCOMPLETE = "incomplete chain"
INCONSISTENT = "inconsistent coordinate format"
MIN_TEACHER_IOU = 0.5         # of the teacher's box with the annotation
REVEALING_DISTANCE = 3        # in units of the model's frame
MAX_COUNT = 20                # a larger number is a coordinate or a size
PLAIN_NUMBER = r"\d++(?:\.\d++)?+"
TWO_NUMBERS = rf"{PLAIN_NUMBER}\s*,\s*{PLAIN_NUMBER}"
# A point (x, y) or a box [x1, y1, x2, y2], in either kind of brackets.
COORDINATES = re.compile(rf"[(\[]\s*{TWO_NUMBERS}(?:\s*,\s*{TWO_NUMBERS})?\s*[)\]]")
# "x1 = 12", "12 pixels": not counts, even if the number is small.
BARE_COORDINATE = re.compile(r"\b[xywh]\d?\s*[=:]\s*\d|\d\s*(?:px|pixels?)\b", re.IGNORECASE)
# Numbers, but not percentages or the digits of a name such as "A380".
OTHER_NUMBER = re.compile(rf"(?<![A-Za-z\d.]){PLAIN_NUMBER}(?!\s*%)")
LINE_START = b'{"id": '
FIRST_BACKOFF = 1.0           # seconds before the second try; doubled for each later try
MAX_BACKOFF = 60.0
MAX_RETRY_AFTER = 3600.0      # seconds; a server may ask for more
GIVE_UP_AFTER = 20            # records in a row without an answer
UNREAD = 3                    # tries of a record, if no answer has had its reasoning
MIN_SECRET_LENGTH = 8         # a shorter key is no secret, such as vLLM's EMPTY


@dataclass
class Explanation:
    record: Record
    seed: int                     # of the sampling
    frame: Frame | None = None    # of the teacher's coordinates
    text: str | None = None       # None if there is no whole answer
    failure: str = ""             # why there is no answer


def prompt_blanks(record: Record, frame: Frame) -> dict[str, str]:
    units = "in thousandths of the image's width and height, from 0 to 1000"
    if frame.convention == "absolute":
        units = "in pixels of the image, which is {} wide and {} high".format(*frame.resized)
    return {"text": record.text, "box": format_box(record.box, frame), "units": units}


def last_block(text: str) -> str:
    """Drops a model's own thoughts before the last think block that an answer follows. If the
    chat template has opened that block, the text contains only its end."""
    head, _, answer = text.rpartition(ANSWER[0])
    think, closing, between = head.rpartition(THINK[1])
    think = re.split("</?think>", think)[-1]
    return f"<think>{think}</think>{between}<answer>{answer}" if closing else text


def filter_explanation(text: str, record: Record, frame: Frame) -> tuple[str | None, str | None]:
    """A teacher's text -> (reasoning, None), or (None, why it is refused)."""
    # 1. There is one think block with some text, then an answer.
    once = text.count("<think>") == text.count("</think>") == 1
    blocks = once and WHOLE.fullmatch(text)
    think = blocks[1].strip() if blocks else ""
    if not think or any(tag in think for tag in TAGS):
        return None, INCOMPLETE

    # 2. The box is right. If it is right only in other coordinates, the format is inconsistent.
    box = parse_box(text)
    if box is None:
        return None, INCONSISTENT
    pixels, thousandths = (replace(frame, convention=c) for c in ("absolute", "1000"))
    readings = (frame.to_image(box), box, pixels.to_image(box), thousandths.to_image(box),
                thousandths.to_image([1000 * v for v in box]))
    truth = torch.tensor(record.box, dtype=torch.float64)
    iou = reward.iou(torch.tensor(readings, dtype=torch.float64), truth)           # (5,)
    if iou[0] < MIN_TEACHER_IOU:
        return None, INCONSISTENT if iou.max() >= MIN_TEACHER_IOU else "wrong box"

    # 3. The reasoning does not contain the box as corners, or as corner and size, in any order and
    #    with up to two other numbers in between. "x1" is no number; "100-150" is two numbers.
    numbers = [float(n) for n in re.findall(r"(?<![A-Za-z\d.])\d{1,6}(?:\.\d+)?", think)]
    windows = [sorted(numbers[i:i + 6]) for i in range(max(1, len(numbers) - 5))]
    for (x1, y1, x2, y2), window in itertools.product((box, frame.to_model(record.box)), windows):
        for notation in sorted((x1, y1, x2, y2)), sorted((x1, y1, x2 - x1, y2 - y1)):
            for four in itertools.combinations(window, 4):
                if all(abs(a - b) <= REVEALING_DISTANCE for a, b in zip(four, notation)):
                    return None, "box given away"

    # 4. sft.py can convert the coordinates: they are points and boxes within the frame, not
    #    fractions of the sides. All other numbers are counts, or part of the expression.
    rest = COORDINATES.sub(" ", think)
    consistent = not BARE_COORDINATE.search(rest)
    for match in COORDINATES.finditer(think):
        values = [float(n) for n in re.findall(PLAIN_NUMBER, match[0])]
        inside = all(value <= frame.extent[i % 2] for i, value in enumerate(values))
        consistent &= inside and ("." not in match[0] or max(values) > 1)
    for number in OTHER_NUMBER.findall(rest):
        is_count = "." not in number and float(number) <= MAX_COUNT
        consistent &= is_count or number in re.findall(PLAIN_NUMBER, record.text)
    return (think, None) if consistent else (None, INCONSISTENT)


@contextmanager
def open_explanations(out: Path) -> Iterator[tuple[BinaryIO, dict[str, str | None]]]:
    """Opens and locks a teacher's file -> file, {id: why it is refused, or None if it is kept}."""
    advice = "name another file with --out"
    try:
        file = open(out, "a+b")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        busy = isinstance(error, BlockingIOError)
        reason = "it is being written by another process" if busy else error.strerror
        if busy or error.filename:         # open() names the file; flock() does not
            raise DataError(f"{out} can't be written ({reason}); {advice}") from None
        print(f"warning: {out} can't be locked ({reason}); start only one teacher for it")
    with file:
        file.seek(0)
        finished = {}
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                finished[str(row["id"])] = row.get("refused")
            except MALFORMED:
                # A killed call may leave the start of a line; remove it.
                if line.endswith(b"\n") or not LINE_START.startswith(line[:len(LINE_START)]):
                    raise DataError(f"{out}, line {number}: not written by a teacher; "
                                    f"{advice}") from None
                file.truncate(file.tell() - len(line))
                break
            if not line.endswith(b"\n"):
                file.write(b"\n")
        yield file, finished


def run_teacher(args: Namespace, records: Records) -> None:
    """Writes lines until all records are done, --want are kept, or no more answers come."""
    model, processor = None, None
    if not args.model:
        model, processor = open_model(args.teacher, start(args.device))
    elif args.coords == "resized":
        processor = Processor.from_pretrained(args.init)
    out = Path(args.out or f"cot_{args.name.replace('/', '_')}_{args.split}.jsonl")
    check_writable(out.parent, append=True)
    with open_explanations(out) as (file, finished):
        counts = Counter(finished.values())        # reason -> lines; None: kept
        done_before = len(finished)
        limit = 0 if args.want and counts[None] >= args.want else args.limit
        requests = [
            Explanation(r, int.from_bytes(sha256(f"{args.seed} {r.id}")[:4], "big"))
            for r in records if r.id not in finished][:limit]
        readable = any(reason != INCOMPLETE for reason in counts)
        answers = (ask_server(args, processor, requests, readable) if args.model
                   else ask_checkpoint(args, model, processor, requests))
        undone, in_a_row = [], 0
        with closing(answers), tqdm(total=len(requests), desc="teacher") as bar:
            for answer in answers:
                if answer.text is None:
                    undone.append(answer)
                    in_a_row += 1
                else:
                    record, text = answer.record, answer.text
                    think, reason = filter_explanation(text, record, answer.frame)
                    result = {"refused": reason, "text": text} if reason else {"think": think}
                    line = {"id": record.id, **result, "frame": asdict(answer.frame)}
                    file.write((json.dumps(line) + "\n").encode())
                    file.flush()
                    finished[record.id] = reason
                    counts[reason] += 1
                    in_a_row = 0
                kept = counts[None]
                bar.set_postfix_str(f"kept {kept} refused {counts.total() - kept}", refresh=False)
                bar.update()
                if kept == args.want or in_a_row == GIVE_UP_AFTER:
                    break
    print(f"written: {out}; {counts.pop(None, 0)} of {len(finished)} records have reasoning, "
          f"{len(records) - len(finished)} are still to come")
    for reason, count in sorted(counts.items()):
        print(f"  refused: {count} {reason}")
    if undone:
        print(f"  left undone: {len(undone)}, the first is {undone[0].record.id!r} "
              f"({undone[0].failure}); the same command asks for them again")
        if in_a_row == GIVE_UP_AFTER or len(finished) == done_before:
            proxy = args.model and find_proxy(args.teacher)
            by = f" by the proxy {proxy.hostname} (see NO_PROXY)" if proxy else ""
            fail(f"no answer from {args.teacher}{by} ({undone[-1].failure}); "
                 "the same command continues when it answers")


def ask_checkpoint(args: Namespace, model: QwenVL, processor: Processor,
                   requests: Sequence[Explanation]) -> Iterator[Explanation]:
    """Yields the requests with their answers, --batch at once."""
    for i in range(0, len(requests), args.batch):
        batch, prompts = [], []
        for request in requests[i:i + args.batch]:
            try:
                pixels, grid, resized = processor.patches(data.open_image(request.record))
            except UnreadableImage as error:
                request.failure = str(error)
                yield request
                continue
            request.frame = Frame(request.record.size, resized, processor.convention)
            blanks = prompt_blanks(request.record, request.frame)
            tokens = int(grid.prod()) // processor.merge ** 2
            ids = processor.turns(TEACHER_PROMPT, tokens, **blanks)
            prompts.append(Prompt(torch.tensor(ids), pixels, grid, request.frame))
            batch.append(request)
        texts, _ = sample_texts(model, processor, prompts, [request.seed for request in batch], 1,
                                args.max_new_tokens, args.temperature)
        for request, [text] in zip(batch, texts):
            request.text = last_block(text)
            yield request


def ask_server(args: Namespace, processor: Processor | None, requests: Sequence[Explanation],
               readable: bool) -> Iterator[Explanation]:
    """Yields the requests with their answers in any order, --parallel at once; DataError if no
    request can succeed. processor: for --coords resized. readable: an earlier call found
    reasoning in this teacher's answers."""
    key = os.environ.get(args.key_env, "").strip()
    # A server may send the key back, so it is replaced in everything that is printed or written.
    secret = re.compile(re.escape(key) if len(key) >= MIN_SECRET_LENGTH else "(?!)")
    stopped = threading.Event()
    limit = "max_tokens"
    remedies = dict.fromkeys((*range(300, 400), 404), "check --teacher and --model") | {
        0: "start the server without a reasoning parser, or use a model that does not think first",
        401: f"it refuses the key in the environment variable {args.key_env}, or its absence",
        403: f"check the key in the environment variable {args.key_env}"}

    def ask(request: Explanation) -> Explanation:
        nonlocal limit, readable
        request.frame = frame_by_coords(request.record.size, args.coords, processor)
        try:
            url = image_data_url(request.record)
        except UnreadableImage as error:
            request.failure = str(error)
            return request
        prompt = TEACHER_PROMPT.format(**prompt_blanks(request.record, request.frame))
        picture = {"type": "image_url", "image_url": {"url": url}}
        message = {"role": "user", "content": [picture, {"type": "text", "text": prompt}]}
        body = {"model": args.model, "messages": [message],
                limit: args.max_new_tokens, "temperature": args.temperature}
        for attempt in range(args.tries):
            if stopped.is_set():
                break
            # Another seed for each try, because the same one gives an answer cut at the same token.
            body["seed"] = (request.seed + attempt) % 2 ** 31
            try:
                text = last_block(secret.sub("[key]", post(args.teacher, key, body, args.timeout)))
                readable |= re.search(r"</think>\s*<answer>", text) is not None
                if not readable:
                    raise Unanswered(f"no reasoning in <think> tags, then <answer>: {text}", 0)
                request.text = text
                break
            except Unanswered as error:
                refuses_name = re.search("max_(completion_)?tokens", error.reason)
                if refuses_name and error.status in (200, 400, 422) and "max_tokens" in body:
                    limit = "max_completion_tokens"        # as OpenAI's newer models want it
                    return ask(request)
                reason = secret.sub("[key]", error.reason)
                reason = "".join(c if c.isprintable() else " " for c in reason)
                request.failure = " ".join(reason.split())[:200]
                if error.status in remedies:
                    request.failure += f"; {remedies[error.status]}"
                # If no answer has reasoning, the server removes it: no record is at fault.
                unread = error.status == 0 and not readable and attempt >= UNREAD - 1
                if unread or error.status == 401 or 300 <= error.status < 400:
                    stopped.set()
                    raise DataError(f"{args.teacher}: {request.failure}") from None
                again = error.status in (0, 200, 408, 429) or error.status >= 500
                if not again or attempt + 1 == args.tries:
                    break
                # Random, so that requests that failed together are not repeated together.
                backoff = min(MAX_BACKOFF, FIRST_BACKOFF * 2 ** attempt) * random.uniform(0.5, 1)
                wait = min(MAX_RETRY_AFTER, error.wait) * random.uniform(1, 1.1)
                stopped.wait(max(backoff, wait))
        return request

    # Unlike those of ThreadPoolExecutor, these threads do not keep a finished process alive.
    with ThreadPool(args.parallel) as pool:
        try:
            yield from pool.imap_unordered(ask, requests)
        finally:
            stopped.set()


def image_data_url(record: Record) -> str:
    """The image's JPEG or PNG file as a data URL; or a PNG of its pixels, if other programs may
    show the file differently (turned by EXIF, or transparent parts in black)."""
    image = data.open_image(record)
    plain = isinstance(record.image, Path) and is_plain(record.image)
    content = record.image.read_bytes() if plain else b""
    kind = "jpeg" if content.startswith(b"\xff\xd8\xff") else "png"
    if kind == "png" and not content.startswith(b"\x89PNG\r\n\x1a\n"):
        buffer = io.BytesIO()
        image.info = {}                            # saves no metadata
        image.save(buffer, "PNG")
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def check_teacher_flags(args: Namespace) -> None:
    """Exits if flags do not fit together, or the device or the key cannot be used."""
    if not (args.teacher or "").startswith(("http://", "https://")):
        if args.model or args.coords:
            fail("--model and --coords are about a server: --teacher http://host:port/v1")
        if args.teacher and args.init:
            fail("--init is for the check, or a server; a checkpoint has its own coordinates")
        args.device = choose_device(args.device) if args.teacher else None
        return
    if not args.model or not args.coords:
        fail("a server needs --model, the model's name there, and --coords")
    if args.coords == "resized" and not args.init:
        fail("--coords resized needs --init, a checkpoint that resizes images as the teacher does")
    fits = usable = False
    with suppress(ValueError):
        url = urlsplit(args.teacher)
        fits = (url.hostname and url.port != 0 and "@" not in url.netloc
                and not re.search(r"[?#\s]", args.teacher))
        proxy = find_proxy(args.teacher)
        usable = proxy is None or (proxy.scheme == "http" and proxy.hostname and proxy.port != 0)
    if not fits:              # the address may contain a password, so it is not shown
        fail("the address of --teacher must be like http://host:port/v1, without a user, a "
             "password or a query; put a key into the environment variable of --key-env")
    if not usable:
        fail("the proxy in the environment must be like http://host:port; without a proxy: "
             f"NO_PROXY={url.hostname}")
    if not re.fullmatch("[!-~]*", os.environ.get(args.key_env, "").strip()):
        fail(f"the key in the environment variable {args.key_env} holds characters that no "
             "HTTP header can carry; set it again")
