"""API keys: only their SHA-256 is stored, and every comparison takes the same time.

A key is 256 random bits (`new_key`), so a plain hash of it cannot be searched; that would not hold for a
password somebody thought up. A keys file, mode 0600 or not, holds no secret:

    keys:
      - {name: alice, sha256: 9f86d0..., requests_per_minute: 60, tokens_per_minute: 20000}
    admin_sha256: 60303a...

The environment does as well: POSTTRAIN_GATEWAY_KEYS="alice:9f86d0...,bob:..." and
POSTTRAIN_GATEWAY_ADMIN_KEY_SHA256.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from posttrain.config import StrictModel
from posttrain.errors import ConfigError, Problem, UserError
from posttrain.validation import validate
from posttrain.yaml_source import load_document
from serving.gateway.config import NAME, GatewayConfig, Name

KEYS_VARIABLE = "POSTTRAIN_GATEWAY_KEYS"
ADMIN_VARIABLE = "POSTTRAIN_GATEWAY_ADMIN_KEY_SHA256"
PREFIX = "pt-"
SHA256 = r"^[0-9a-f]{64}$"
NOTHING_SHA256 = hashlib.sha256(b"").hexdigest()
"""What hashing a variable that was empty gives. It is the hash of no key, and none is accepted under it."""


class ApiKey(StrictModel):
    """One client: how it is recognised and what it may use."""

    name: str = Field(pattern=NAME, description="Who it is, for logs and metrics.")
    sha256: str = Field(pattern=SHA256, description="Hash of the key, from `posttrain gateway-key`.")
    requests_per_minute: int | None = Field(None, ge=1, description="Default: no limit.")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Prompt and answer tokens together; default: no limit."
    )
    max_concurrent: int | None = Field(None, ge=1, description="Requests at a time; default: no limit.")
    models: list[Name] | None = Field(None, description="Models it may use; default: all.")


class KeysFile(StrictModel):
    """What a keys file holds."""

    keys: list[ApiKey] = Field(default_factory=list, description="Clients.")
    admin_sha256: str | None = Field(None, pattern=SHA256, description="Hash of the key for /admin.")


ANONYMOUS = ApiKey(name="anonymous", sha256="0" * 64)
"""Everybody, where `authentication: none`."""


class KeyRing:
    """The keys in force."""

    def __init__(self, keys: list[ApiKey], admin_sha256: str | None) -> None:
        self.keys = keys
        self.admin_sha256 = admin_sha256

    def find(self, presented: str) -> ApiKey | None:
        """The client whose key was presented. Compares with every hash, whatever the outcome.

        Nobody for "": a request without a key.
        """
        if not presented:
            return None
        digest = hash_key(presented)
        found = None
        for key in self.keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found

    def is_admin(self, presented: str) -> bool:
        """Whether the admin key was presented; never for "", a request without a key."""
        if not presented or self.admin_sha256 is None:
            return False
        return hmac.compare_digest(hash_key(presented), self.admin_sha256)


def new_key() -> str:
    """A fresh key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """Hexadecimal SHA-256 of a key. Bytes that are no text count as they were sent."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def describe_new_key(name: str) -> tuple[str, str]:
    """A new key, and what to write into a keys file. Raises UserError for a name that cannot be one."""
    key = new_key()
    entry = f"  - {{name: {_checked_name(name, 'NAME')}, sha256: {hash_key(key)}}}"
    return key, f"# for the `keys:` list of the keys file; the key itself is shown only now\n{entry}"


def load_keys(config: GatewayConfig, environment: Mapping[str, str]) -> KeyRing:
    """The keys of the file and of the environment together.

    Raises UserError when there are none though they are wanted, when one is malformed or the hash of an empty
    text, or two are the same.
    """
    held = KeysFile() if config.keys_file is None else _read_file(Path(config.keys_file))
    keys = held.keys + _from_environment(environment.get(KEYS_VARIABLE, ""))
    admin = environment.get(ADMIN_VARIABLE) or held.admin_sha256
    place = config.keys_file or KEYS_VARIABLE
    for field in ("name", "sha256"):
        values = [vars(key)[field] for key in keys]
        for value in sorted({value for value in values if values.count(value) > 1}):
            raise UserError(f"{place}: two API keys have the {field} '{value[:64]}'; keep one of them")
    empty = [f"key '{key.name}'" for key in keys if key.sha256 == NOTHING_SHA256]
    empty += ["the admin key"] if admin == NOTHING_SHA256 else []
    if empty:
        raise UserError(
            f"{place}: the hash of {' and '.join(empty)} is that of an empty text, which is no key\n"
            "    make a key with `posttrain gateway-key NAME` and copy the hash it prints"
        )
    unknown = {name for key in keys for name in key.models or ()} - config.models.keys()
    if unknown:
        raise UserError(f"{place}: a key allows models that are not served: {', '.join(sorted(unknown))}")
    if config.authentication == "keys" and not keys:
        raise UserError(
            f"there are no API keys: neither keys_file nor {KEYS_VARIABLE} names one\n"
            "    make one with `posttrain gateway-key NAME`, or set authentication: none on 127.0.0.1"
        )
    return KeyRing(keys, _checked_hash(admin, ADMIN_VARIABLE) if admin else None)


def _read_file(path: Path) -> KeysFile:
    document = load_document(path)
    held, problems = validate(KeysFile, document.data, document, ())
    if held is None:
        raise ConfigError(problems)
    return held


def _from_environment(text: str) -> list[ApiKey]:
    keys = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, digest = entry.partition(":")
        keys.append(
            ApiKey(name=_checked_name(name, KEYS_VARIABLE), sha256=_checked_hash(digest, KEYS_VARIABLE))
        )
    return keys


def _checked_name(name: str, place: str) -> str:
    if not re.fullmatch(NAME, name):
        raise UserError(
            f"{place}: the name of a key is 1 to 64 letters, digits, dots, dashes and underscores\n"
            f"    {KEYS_VARIABLE} is NAME:SHA256, with commas between the keys"
        )
    return name


def _checked_hash(digest: str, place: str) -> str:
    """`digest` if it looks like one. The message does not repeat it: it may be a key put there by mistake."""
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ConfigError(
            [
                Problem(
                    place,
                    "is not a SHA-256 in hexadecimal (64 characters 0-9 a-f)",
                    "posttrain gateway-key NAME makes a key and prints its hash",
                )
            ]
        )
    return digest
