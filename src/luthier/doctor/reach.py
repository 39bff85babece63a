"""Which hubs answer from here, asked as the hub's library would ask: with its client, its proxies, its certificates.

`python -m luthier.doctor.reach EACH BOUND URL…` asks all at once, in a process that can be left behind: a dead name
server holds a thread for half a minute. It prints an answer a line, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from luthier.doctor.finding import Finding, reason

EACH, BOUND = 5.0, 6.0
"""Seconds to connect, and to wait for an answer; and for all of them together."""
START = 60.0
"""Seconds for the library's import before that, on a slow disk."""
HUB, MIRROR, MODELSCOPE = "https://huggingface.co", "https://hf-mirror.com", "https://modelscope.cn"
FOLDERS = "models come from folders: model.name: /path"
ADDRESS = r"https?://[^/\s]+(/\S*)?"
"""What HF_ENDPOINT may be."""
BLOCKED = (403, 407, 451)
"""Statuses of a filter or a proxy on the way. A hub answers other errors of ours itself."""

Kind = Literal["well", "dns", "refused", "timeout", "tls", "407", "status", "proxy", "error"]


class Answer(NamedTuple):
    """found: what came of it, in words. proxy: the variable that sends the request through one, "" for none."""

    url: str
    kind: Kind
    found: str
    proxy: str = ""

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.rpartition("@")[2] or self.url


def to_ask() -> list[str]:
    """The hub in use first (HF_ENDPOINT, where that is an address), then what could stand in for it."""
    given = os.environ.get("HF_ENDPOINT", "")
    endpoint = given.rstrip("/") if re.fullmatch(ADDRESS, given) else HUB
    return [endpoint, *(url for url in (HUB, MIRROR, MODELSCOPE) if url != endpoint)]


def ask(urls: Sequence[str], each: float = EACH, bound: float = BOUND) -> Callable[[], list[Answer]]:
    """Begin to ask; calling what is given back waits for the answers, `bound` seconds and the library's import long."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "luthier.doctor.reach", str(each), str(bound), *urls]
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )

    def answers() -> list[Answer]:
        try:
            told, _ = process.communicate(timeout=bound + START)
        except subprocess.TimeoutExpired:
            process.kill()
            told, _ = process.communicate()
        found = {answer.url: answer for answer in (Answer(*json.loads(line)) for line in told.splitlines())}
        return [
            found.get(url, Answer(url, "error", "could not be asked: huggingface_hub does not start")) for url in urls
        ]

    return answers


def findings(answers: Sequence[Answer]) -> Iterator[Finding]:
    """Lines about the hubs: with the setting to change where the first, the hub in use, does not answer."""
    hub, *others = answers
    is_own = hub.url != HUB
    if is_own:
        yield _endpoint(hub, others)
    rest = others if is_own else answers
    if hub.kind == "well":
        for answer in rest:
            needed = "modelscope: names need it" if answer.url == MODELSCOPE else f"not needed while {hub.host} answers"
            yield Finding("✓", answer.host, answer.found + ("" if answer.kind == "well" else f"; {needed}"))
        return
    instead = next((answer for answer in others if answer.kind == "well"), None)
    if instead is not None:
        if not is_own:
            yield Finding("!", hub.host, hub.found, _instead(instead))
        for answer in others:
            yield Finding("✓", answer.host, answer.found + ("" if answer.kind == "well" else "; not needed"))
        return
    for found in dict.fromkeys(answer.found for answer in rest):
        alike = [answer for answer in rest if answer.found == found]
        yield Finding("!", "hubs", f"{', '.join(answer.host for answer in alike)}: {found}", _remedy(alike[0]))


def _endpoint(hub: Answer, others: Sequence[Answer]) -> Finding:
    """The line about the address in HF_ENDPOINT: its mark is that of the answer."""
    found = f"{masked(hub.url)}: {hub.found}"
    if hub.kind == "well":
        return Finding("✓", "HF_ENDPOINT", found)
    well = {answer.url: answer for answer in others if answer.kind == "well"}
    fix = "unset HF_ENDPOINT" + (f"  (or: export HF_ENDPOINT={MIRROR})" if MIRROR in well else "")
    if not well:
        fix = _on_the_way(hub) or fix
    elif HUB not in well:
        fix = _instead(next(iter(well.values())))
    return Finding("!", "HF_ENDPOINT", found, fix)


def _instead(answer: Answer) -> str:
    if answer.url == MODELSCOPE:
        return "model.name: modelscope:owner/name  (needs: pip install 'luthier[modelscope]')"
    return f"export HF_ENDPOINT={answer.url}"


def _remedy(answer: Answer) -> str:
    """What to change where no hub answers at all."""
    return _on_the_way(answer) or FOLDERS


def _on_the_way(answer: Answer) -> str:
    """What to change between here and a hub; empty where nothing is known of it."""
    if answer.kind == "407":
        return f"export {answer.proxy or 'HTTPS_PROXY'}=http://USER:PASSWORD@HOST:PORT"
    if answer.kind == "tls":
        return "export SSL_CERT_FILE=FILE  (your network's own certificates; and is the clock right?)"
    if answer.kind == "proxy":
        return "pip install socksio" if "socksio" in answer.found else f"unset {answer.proxy}"
    if answer.proxy:
        return f"unset {answer.proxy}  (or start the proxy that it names); else {FOLDERS}"
    return ""


def masked(text: str) -> str:
    """Addresses without their user and password, with a scheme or none."""
    return re.sub(r"(^|//)[^/@\s]*@", r"\1***@", text)


# ---- the process that asks


def main(each: float, bound: float, urls: Sequence[str]) -> None:
    """Ask all at once and print the answers that have come in `bound` seconds."""
    answers = {url: Answer(url, "timeout", f"no answer in {bound:g} s", _proxy(url)) for url in urls}
    try:
        from huggingface_hub import get_session

        client = get_session()
    except Exception as error:  # a proxy that its client does not know, or lacks a package for
        odd = (
            name for name, value in os.environ.items() if re.match(r"(?i)\w+_proxy=(?!https?:)\w+:", f"{name}={value}")
        )
        found, proxy = masked(f"the library refuses the proxy ({reason(error)})"), next(odd, "")
        answers = {url: Answer(url, "proxy" if proxy else "error", found, proxy) for url in urls}
    else:

        def put(url: str) -> None:
            answers[url] = _answer(client, url, each)

        threads = [threading.Thread(target=put, args=(url,), daemon=True) for url in urls]
        deadline = time.monotonic() + bound
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    for url in urls:
        print(json.dumps(answers[url]), flush=True)
    os._exit(0)  # not waiting for the threads that hang


def _answer(client: object, url: str, each: float) -> Answer:
    began = time.monotonic()
    try:
        status = client.head(url, timeout=each, follow_redirects=False).status_code  # type: ignore[attr-defined]
    except Exception as error:  # of httpx or httpx2, by the hub's version
        kind, found = _problem(error, each)
        proxy = _proxy(url)
        return Answer(url, kind, masked(found) + (f", through {proxy}" if proxy else ""), proxy)
    if status == 407:
        return Answer(url, "407", "the proxy asks for a password (407)", _proxy(url))
    if status in BLOCKED or status >= 500:
        return Answer(url, "status", f"status {status}", _proxy(url))
    return Answer(url, "well", f"{status} in {time.monotonic() - began:.1f} s")


def _problem(error: BaseException, each: float) -> tuple[Kind, str]:
    chain = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    for one in chain:
        if isinstance(one, socket.gaierror):
            return "dns", "DNS fails"
        if isinstance(one, ConnectionRefusedError):
            return "refused", "refused"
        if isinstance(one, ssl.SSLError):
            return "tls", f"TLS error ({getattr(one, 'verify_message', '') or one.reason or one})"
    said = str(error)
    if "407" in said:
        return "407", "the proxy asks for a password (407)"
    if "Timeout" in type(error).__name__:
        return "timeout", f"no answer in {each:g} s"
    return "error", reason(error)


def _proxy(url: str) -> str:
    """The variable that names the proxy for an address."""
    parts = urlsplit(url)
    proxies = getproxies()
    scheme = next((one for one in (parts.scheme, "all") if proxies.get(one)), None)
    if scheme is None or (parts.hostname and proxy_bypass(parts.hostname)):
        return ""
    return next((name for name in os.environ if name.lower() == f"{scheme}_proxy"), "the system's proxy")


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
