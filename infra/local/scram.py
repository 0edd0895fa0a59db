"""Kafka's request that sets a user's password (AlterUserScramCredentials), which aiokafka does not have.

The password itself is not sent: what is, is what SCRAM servers keep (RFC 5802).
"""

import hashlib
import os
import ssl
from typing import Any

from aiokafka.conn import create_conn
from aiokafka.errors import for_code
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import CompactArray, CompactBytes, CompactString, Int8, Int16, Int32, Schema, TaggedFields

MECHANISM = "SCRAM-SHA-256"
_MECHANISM_CODE = 1

# Kafka's least. More makes guessing slower, and ours, 256 random bits, is not guessed.
_ITERATIONS = 4096


class _Answer(Response):  # type: ignore[misc]
    API_KEY = 51
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "results",
            CompactArray(
                ("user", CompactString("utf-8")),
                ("error_code", Int16),
                ("error_message", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _Question(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 51
    API_VERSION = 0
    RESPONSE_TYPE = _Answer
    SCHEMA = Schema(
        ("deletions", CompactArray(("name", CompactString("utf-8")), ("mechanism", Int8), ("tags", TaggedFields))),
        (
            "upsertions",
            CompactArray(
                ("name", CompactString("utf-8")),
                ("mechanism", Int8),
                ("iterations", Int32),
                ("salt", CompactBytes),
                ("salted_password", CompactBytes),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _SetPassword(Request[_Question]):  # type: ignore[misc]
    API_KEY = 51

    def __init__(self, user: str, salt: bytes, salted: bytes) -> None:
        self._upsertion: tuple[Any, ...] = (user, _MECHANISM_CODE, _ITERATIONS, salt, salted, {})

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class([], [self._upsertion], {})


async def set_password(host: str, port: int, context: ssl.SSLContext, user: str, password: str) -> None:
    """Make the user, or change its password, by a node's controller listener that asks for a certificate.

    Raises:
        KafkaError or OSError: it cannot be done now.
    """
    salt = os.urandom(32)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _ITERATIONS)
    conn = await create_conn(host, port, ssl_context=context, security_protocol="SSL", request_timeout_ms=10_000)
    try:
        answer = await conn.send(_SetPassword(user, salt, salted))
    finally:
        conn.close()
    for _, code, message, _ in answer.results:
        if code:
            raise for_code(code)(message)
