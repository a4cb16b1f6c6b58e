"""How a call of a webhook is signed, ours and MLflow's alike: https://www.standardwebhooks.com."""

from __future__ import annotations

import base64
import hashlib
import hmac


def signature_of(secret: bytes, delivery: str, timestamp: str, body: bytes) -> str:
    """`v1,<base64>` of HMAC-SHA256 over `<delivery id>.<timestamp>.<body>`; the timestamp in whole epoch seconds."""
    signed = f"{delivery}.{timestamp}.".encode(errors="replace") + body
    return f"v1,{base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()}"
