"""What whoever comes in at a door may do there: scopes, and the settings of the tokens that name them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

Scope = Literal["read", "label", "upload", "admin"]
"""`read` looks, `label` gives verdicts, `upload` sends pictures, `admin` may everything, what comes later included."""

ALL: frozenset[Scope] = frozenset({"admin"})
"""What an API key may."""

# A shorter secret can be found by trying, away from here and unseen, by whoever has one token. RFC 7518, 3.2.
_SECRET_BYTES = 32

# HS is HMAC, with a secret that the issuer and we share; all others are by key pairs. RFC 7518, 3.1, and RFC 9864.
Algorithm = Literal[
    "HS256",
    "HS384",
    "HS512",
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "Ed25519",
]


class Pass(NamedTuple):
    """What somebody who was let in may do, and for how long."""

    scopes: frozenset[Scope]
    until: float = math.inf
    """Seconds since the Unix epoch."""

    def allows(self, scope: Scope) -> bool:
        """Whether it is good for this."""
        return scope in self.scopes or "admin" in self.scopes


class JwtSettings(BaseModel):
    """Tokens of an identity provider (JWT), taken beside the API key. Off until an issuer is set."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    issuer: str = Field(default="", description="Whose tokens are taken: their `iss`, letter by letter. Empty: none.")
    audience: str = Field(default="rewatch", min_length=1, description="For whom they must be made: `aud`.")
    secret: SecretStr | None = Field(
        default=None,
        description="What they are signed with, HS256: 32 characters or more. It belongs in the environment.",
    )
    keys_file: Path | None = Field(
        default=None,
        description="Or the issuer's public keys: a JWKS file, or a key or certificate in PEM. Read again when it "
        "changes, so keys are rotated without a restart.",
    )
    algorithms: tuple[Algorithm, ...] = Field(
        default=(), description="Signatures that are taken; by default HS256 with a secret, all others with a file."
    )
    leeway_s: int = Field(default=30, ge=0, le=300, description="How far the issuer's clock may be off, seconds.")
    scope_claim: str = Field(
        default="scope", min_length=1, description="Which claim names the scopes: words in a text, or a list."
    )
    scopes: Mapping[str, Scope] = Field(
        default_factory=dict,
        description="The issuer's own names for read, label, upload and admin, as `cameras.view: read`.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.issuer:
            if self.secret is not None or self.keys_file is not None:
                raise ValueError("set `issuer` too: whose tokens are taken (their `iss`)")
            return self
        if (self.secret is None) == (self.keys_file is None):
            raise ValueError("set either `secret` or `keys_file`: what the issuer's tokens are signed with")
        if self.secret is not None and len(self.secret.get_secret_value().encode()) < _SECRET_BYTES:
            raise ValueError(f"`secret` has fewer than {_SECRET_BYTES} characters: `openssl rand -hex 32` makes one")
        # A public key is no secret: taken for one of HMAC's, anybody could sign with it.
        wrong = [name for name in self.algorithms if name.startswith("HS") != (self.secret is not None)]
        if wrong:
            raise ValueError(f"`algorithms` {', '.join(wrong)}: HS goes with `secret`, all others with `keys_file`")
        return self

    @property
    def enabled(self) -> bool:
        """Whether tokens are taken."""
        return bool(self.issuer)

    @property
    def taken(self) -> tuple[str, ...]:
        """The algorithms that are taken."""
        by_pair = tuple(name for name in get_args(Algorithm) if not name.startswith("HS"))
        return self.algorithms or (("HS256",) if self.secret is not None else by_pair)
