"""One request to a server with OpenAI's chat-completions protocol -> the text of its answer.

Reads what servers make of the protocol: reasoning apart from the answer, content in parts, errors
with status 200. Proxies are the environment's.
"""
import base64
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from http.client import HTTPException
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.error import URLError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, Request, getproxies

from qwen.answer import ANSWER, THINK
from qwen.hub import MALFORMED

STOPS = ("stop", "eos", "end_turn")      # the last two are Together AI's and xAI's
OPENER = OpenerDirector()     # follows no redirect, and takes no proxy but find_proxy's
OPENER.addheaders = []
for handler in HTTPHandler(), HTTPSHandler():
    OPENER.add_handler(handler)


@dataclass(eq=False)
class Unanswered(Exception):
    reason: str
    status: int = 500             # of HTTP; 500 is asked again; 0: an answer without reasoning
    wait: float = 0.0             # seconds, as the server asks


def find_proxy(address: str) -> SplitResult | None:
    """The environment's proxy for an address, chosen as OpenAI's client does (httpx)."""
    url, proxies = urlsplit(address), getproxies()
    host, port = url.hostname, url.port or (443 if url.scheme == "https" else 80)
    for entry in proxies.get("no", "").lower().split(","):
        name = entry.strip().removeprefix(f"{url.scheme}://")
        name = name.removesuffix(f":{port}").strip("[]")
        domain = name.removeprefix("*").removeprefix(".")          # .a.org: b.a.org, but not a.org
        if name in ("*", host) or host.endswith(f".{domain}"):
            return None
        with suppress(ValueError):
            if ip_address(host) in ip_network(name, strict=False):
                return None
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None


def post(address: str, key: str, body: dict[str, Any], timeout: float) -> str:
    """Sends one request -> the text of the answer. Raises Unanswered."""
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    url = address.rstrip("/") + "/chat/completions"
    request = Request(url, json.dumps(body).encode(), headers)
    if proxy := find_proxy(url):
        request.set_proxy(proxy.netloc.rpartition("@")[2] + ("" if proxy.port else ":80"), "http")
        if proxy.username:
            login = unquote(f"{proxy.username}:{proxy.password or ''}").encode()
            request.add_header("Proxy-Authorization", f"Basic {base64.b64encode(login).decode()}")
    content = b""
    deadline = time.monotonic() + timeout
    try:
        with OPENER.open(request, timeout=timeout) as response:
            # The socket's own timeout begins again with each byte.
            while piece := response.read1(1 << 16):
                content += piece
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {timeout:g} s")
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        raise Unanswered(f"{type(cause).__name__}: {cause}") from None
    if response.length:           # bytes that the server announced but did not send
        raise Unanswered("the answer was cut")
    status, words = response.status, content.decode("utf-8", "replace")
    with suppress(*MALFORMED):
        value = json.loads(content)
        if status == 200:
            with suppress(*MALFORMED):
                return completion_text(value)
        words = server_words(value)
        # Some gateways send their errors with status 200.
        code = int((value.get("error") or value)["code"]) if status == 200 else 0
        status = code if 400 <= code < 600 else status
    wait = 0.0
    with suppress(ValueError, TypeError, OverflowError):
        retry_after = response.getheader("Retry-After", "")
        date = parsedate_tz(retry_after)               # or seconds
        wait = mktime_tz(date) - time.time() if date else float(retry_after)
    # The message of a server that refuses a key may quote the key in part.
    raise Unanswered("401" if status == 401 else f"{status}: {words}", status, wait)


def server_words(value: Any) -> str:
    """The message of an error; else all of it, without escapes, which could hide the key."""
    if isinstance(value, dict):
        for inner in filter(None, map(value.get, ("error", "message", "detail"))):
            return server_words(inner)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def completion_text(completion: Any) -> str:
    """Reasoning and answer of a chat completion, as one text. Raises Unanswered."""
    choice = completion["choices"][0]
    finish = choice.get("finish_reason")
    if error := completion.get("error") or choice.get("error"):
        raise Unanswered(f"200: {server_words(error)}")
    if finish not in STOPS:
        raise Unanswered("the explanation was cut at --max-new-tokens" if finish == "length"
                         else f"the answer ended with finish_reason {finish!r}")
    message = choice["message"]
    reasoning = joined(message.get("reasoning_content") or message.get("reasoning")).strip()
    content = joined(message.get("content")).strip()
    if not content:           # a parser that finds no </think> takes all for reasoning
        content, reasoning = reasoning, ""
        if ANSWER[0] not in content:
            raise Unanswered(f"an empty answer: {server_words(message)}", 0 if content else 500)
    reasoning = reasoning.removeprefix(THINK[0]).removesuffix(THINK[1])
    text = f"<think>{reasoning}</think>{content}" if reasoning else content
    return text.encode("utf-8", "replace").decode()       # lone surrogates can't be written


def joined(content: Any) -> str:
    """Text in one piece or in parts, which may include Mistral's reasoning; None: no text."""
    if isinstance(content, dict):
        thinking = joined(content.get("thinking"))
        return f"<think>{thinking}</think>" if thinking else joined(content.get("text"))
    return "".join(map(joined, content)) if isinstance(content, list) else content or ""
