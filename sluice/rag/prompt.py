"""The one prompt: the same text in production, in evaluation and, through the traces, in training."""

from __future__ import annotations

from collections.abc import Sequence

PROMPT_VERSION = "faq-1"
SYSTEM = "You answer questions about building in Sweden, using the context."


def build_messages(question: str, contexts: Sequence[str]) -> list[dict[str, str]]:
    """Chat messages for a question and its retrieved passages, best first."""
    context = "\n".join(f"- {text}" for text in contexts)
    user = f"Context:\n{context}\n\nQuestion: {question}" if contexts else f"Question: {question}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
