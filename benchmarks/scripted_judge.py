"""A judge without a model: an OpenAI-compatible server that answers RAGAS's prompts by a rule, and misbehaves as told.

It takes a text apart at its full stops, and finds a claim supported when its words stand in the passage. So its scores
are the same every time, whoever asks, and what differs between two runs is the runner. Used by `evaluation.py` here and
by the tests.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_WORD = re.compile(r"\w+")


@dataclass
class Reply:
    """How one request is answered. `content` None: by the rule; `drop`: the connection is closed without an answer."""

    content: str | None = None
    status: int = 200
    finish: str = "stop"
    pause_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "made to fail"
    drop: bool = False


Plan = Callable[[str, int], Reply]
"""`plan(prompt, times)`: what to do; `times` counts how often this very prompt came, from 1."""


@dataclass
class ScriptedJudge:
    """A running judge, and what it saw."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    prompts: Counter[str] = field(default_factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    statuses: Counter[int] = field(default_factory=Counter)


@contextmanager
def scripted_judge(plan: Plan = lambda _, __: Reply(), *, slots: int = 10_000) -> Iterator[ScriptedJudge]:
    """Serve on a free port from a thread. More than `slots` requests at once wait for each other, as in vLLM."""
    state = ScriptedJudge()
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def serve() -> None:
        gate = asyncio.Semaphore(slots)
        server = await asyncio.start_server(lambda r, w: _connection(r, w, plan, state, gate), "127.0.0.1", 0)
        state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        try:
            await server.serve_forever()
        except asyncio.CancelledError:
            server.close()

    task = loop.create_task(serve())

    def run() -> None:
        loop.run_until_complete(task)
        for one in asyncio.all_tasks(loop):
            one.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield state
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)


async def _connection(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    plan: Plan,
    state: ScriptedJudge,
    gate: asyncio.Semaphore,
) -> None:
    try:
        while (head := await reader.readuntil(b"\r\n\r\n")) is not None:
            length = int((re.search(rb"content-length: *(\d+)", head, re.IGNORECASE) or [b"", b"0"])[1])
            body = json.loads(await reader.readexactly(length)) if length else {}
            if head.startswith(b"GET"):
                _send(writer, 200, {"object": "list", "data": [{"id": "judge", "object": "model"}]}, {})
                await writer.drain()
                continue
            prompt = body["messages"][-1]["content"]
            state.requests.append(body)
            state.prompts[prompt] += 1
            reply = plan(prompt, state.prompts[prompt])
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                async with gate:
                    await asyncio.sleep(reply.pause_s)
            finally:
                state.at_once -= 1
            if reply.drop:
                break
            state.statuses[reply.status] += 1
            if reply.status != 200:
                _send(writer, reply.status, {"error": {"message": reply.message}}, reply.headers)
            else:
                content = json.dumps(answer_by_rule(prompt)) if reply.content is None else reply.content
                _send(writer, 200, _completion(body["model"], content, reply.finish), reply.headers)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


def _completion(model: str, content: str, finish: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def _send(writer: asyncio.StreamWriter, status: int, content: dict[str, Any], headers: dict[str, str]) -> None:
    data = json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(data)}"]
    writer.write("\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items()), "", ""]).encode() + data)


def answer_by_rule(prompt: str) -> dict[str, Any]:
    """What the rule answers to one of RAGAS's prompts (of its collections or its older metrics), or to a comparison."""
    start = prompt.rindex("input: ") + len("input: ")
    given = json.JSONDecoder().raw_decode(prompt[start:])[0]
    if "answer_1" in given:
        first, second = (_overlap(given[name], given["question"]) for name in ("answer_1", "answer_2"))
        return {"reason": "by the rule", "better": 1 if first >= second else 2}
    if "statements" in given:
        return {"statements": [_verdict(one, given["context"], "verdict") for one in given["statements"]]}
    if set(given) == {"question", "answer"}:
        return {"statements": sentences(given["answer"])}
    if "atomicity" in given or ("response" in given and "claims" in prompt):
        return {"claims": sentences(given["response"])}
    if "response" in given:
        return {"question": f"What about {given['response']}?", "noncommittal": int("depends" in given["response"])}
    if "verdict" in prompt:
        useful = _overlap(given["answer"], given["context"]) >= 0.5
        return {"reason": "by the rule", "verdict": int(useful)}
    return {"classifications": [_verdict(one, given["context"], "attributed") for one in sentences(given["answer"])]}


def sentences(text: str) -> list[str]:
    """The parts of a text between full stops that hold a word."""
    return [part.strip() for part in re.split(r"[.!?](?:\s|$)", text) if _WORD.search(part)]


def _verdict(statement: str, context: str, name: str) -> dict[str, Any]:
    return {"statement": statement, "reason": "by the rule", name: int(_overlap(statement, context) >= 0.8)}


def _overlap(text: str, other: str) -> float:
    words = _WORD.findall(text.lower())
    return sum(word in set(_WORD.findall(other.lower())) for word in words) / max(1, len(words))
