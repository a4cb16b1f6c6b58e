"""The application: an assistant that answers questions about building in Sweden from retrieved passages.

It is what a team's own application would be: the OpenAI client against the gateway, retrieval from Milvus, one trace a
request with the release that answered.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sluice.components.holdout import PASSAGES
from sluice.components.index_alias import vectors_uri
from sluice.components.workspace import Workspace
from sluice.curation.emission import ChatSpan, ChatTracer, otlp_target
from sluice.curation.records import Context, Message
from sluice.infra.errors import SluiceError, UnavailableError
from sluice.rag.milvus import alias_name
from sluice.rag.prompt import PROMPT_VERSION, build_messages
from sluice.rag.retrieve import Retriever

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam

MAX_TOKENS = 80
RELEASE_HEADER = "x-sluice-release"
ADAPTER_HEADER = "x-sluice-adapter"


@dataclass(frozen=True)
class Reply:
    """What a user got. `release` is the digest of what answered; `error` is a sentence, or empty."""

    trace_id: str
    text: str
    release: str
    seconds: float
    error: str = ""


class Assistant:
    """Safe to share between threads. Close it, so that the last traces are sent."""

    def __init__(self, workspace: Workspace) -> None:
        settings = workspace.settings
        if not settings.serving.gateway_url:
            raise UnavailableError("The gateway has no address.", hint="Start the parts: `sluice up`.")
        self._application = settings.application
        self._gateway = f"{settings.serving.gateway_url}/v1"
        self._retriever = Retriever(vectors_uri(workspace), alias_name(settings.application))
        self.tracer = ChatTracer(otlp_target(settings), service=settings.application)
        self._lock = threading.Lock()
        self._client: OpenAI | None = None

    def close(self) -> None:
        """Send the traces that wait."""
        self.tracer.close()

    def ask(self, question: str, *, session: str, user: str) -> Reply:
        """Answer a question. An error is a reply too, and leaves a failed trace."""
        from openai import OpenAIError

        started = time.monotonic()
        with self.tracer.chat(session=session, user=user, question=question, model=self._application) as span:
            try:
                text, release = self._answer(span, question, session)
                return Reply(span.trace_id, text, release, time.monotonic() - started)
            except (OpenAIError, SluiceError) as error:
                span.fail(type(error).__name__, str(error))
                return Reply(span.trace_id, "", "", time.monotonic() - started, str(error))

    def _answer(self, span: ChatSpan, question: str, session: str) -> tuple[str, str]:
        found = self._retriever.retrieve(question, PASSAGES)
        messages = build_messages(question, [passage.text for passage in found.passages])
        span.prompted(
            [Message(one["role"], one["content"]) for one in messages],
            version=PROMPT_VERSION,
            contexts=[Context(passage.id, passage.text) for passage in found.passages],
            index_digest=found.index_digest,
        )
        sent = time.monotonic()
        response = self._openai().chat.completions.with_raw_response.create(
            model=self._application,
            messages=cast("list[ChatCompletionMessageParam]", messages),
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-session-id": session, "traceparent": span.traceparent},
        )
        pieces: list[str] = []
        first: float | None = None
        finish, model, usage = "stop", "", None
        for chunk in response.parse():
            usage, model = chunk.usage or usage, chunk.model or model
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                if choice.delta.content:
                    first = first or (time.monotonic() - sent) * 1000
                    pieces.append(choice.delta.content)
        text = "".join(pieces)
        release = _header(response, RELEASE_HEADER)
        span.answer(
            text,
            release=release,
            adapter=_header(response, ADAPTER_HEADER),
            model=model,
            finish_reason=finish,
            input_tokens=usage.prompt_tokens if usage else None,
            output_tokens=usage.completion_tokens if usage else None,
            ttft_ms=first,
        )
        return text, release

    def _openai(self) -> OpenAI:
        with self._lock:
            if self._client is None:
                from openai import OpenAI

                self._client = OpenAI(base_url=self._gateway, api_key="unused", timeout=120, max_retries=2)
            return self._client


def _header(response: Any, name: str) -> str:
    return str(response.headers.get(name, ""))
