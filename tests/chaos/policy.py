"""What a bucket policy of AWS says to a request: as much of its language as `infra/bucket-policy.json` uses.

No part of AWS: an own reading of its documentation, strict where it does not know. Called by `proxy` and its tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ACCOUNT = "111122223333"


class BucketPolicy:
    """The statements of a policy, its placeholders replaced.

    Args:
        bucket: the bucket that it is attached to; requests to others are none of its business.
    """

    def __init__(self, path: Path, bucket: str) -> None:
        text = path.read_text(encoding="utf-8").replace("LATENTS", bucket).replace("ACCOUNT", ACCOUNT)
        self._bucket = bucket
        self._statements: list[dict[str, Any]] = json.loads(text)["Statement"]

    def is_allowed(
        self, role: str, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> bool:
        """Whether a role may do this over TLS: some statement allows it and none denies it."""
        bucket, _, key = path.lstrip("/").partition("/")
        if bucket != self._bucket:
            return True
        action = action_of(method, key, query)
        resource = f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}"
        principal = f"arn:aws:iam::{ACCOUNT}:role/{role}"
        context = {"aws:PrincipalArn": principal, "aws:SecureTransport": "true"}
        if "if-none-match" in {name.lower() for name in headers}:
            context["s3:if-none-match"] = "*"
        effects = {
            statement["Effect"]
            for statement in self._statements
            if _matches(_principals(statement), principal)
            and _matches(statement["Action"], action)
            and _matches(statement["Resource"], resource)
            and all(_holds(*condition, context) for condition in statement.get("Condition", {}).items())
        }
        return effects == {"Allow"}


def action_of(method: str, key: str, query: Mapping[str, str]) -> str:
    """The action that AWS asks permission for.

    Raises:
        ValueError: the request is none that is known here.
    """
    if not key:
        if method == "GET" and "list-type" in query:
            return "s3:ListBucket"
    elif method in ("GET", "HEAD"):
        return "s3:GetObject"
    elif method == "PUT" or (method == "POST" and query.keys() & {"uploads", "uploadId"}):
        return "s3:PutObject"
    elif method == "DELETE":
        return "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"
    raise ValueError(f"which action is {method} {key or 'of a bucket'} {dict(query)}?")


def _principals(statement: Mapping[str, Any]) -> Any:
    principal = statement["Principal"]
    return principal if principal == "*" else principal["AWS"]


def _matches(patterns: str | Iterable[str], value: str) -> bool:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # A star goes over slashes, unlike in a shell.
        if re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), value, re.DOTALL):
            return True
    return False


def _holds(operator: str, asked: Mapping[str, str], context: Mapping[str, str]) -> bool:
    for name, value in asked.items():
        if operator == "Null":
            holds = (name not in context) == (value == "true")
        elif operator == "Bool":
            holds = context[name] == value
        elif operator == "ArnNotEquals":
            holds = context[name] != value
        else:
            raise ValueError(f"which condition is {operator}?")
        if not holds:
            return False
    return True
