"""AES-256-GCM at rest: the tag takes the place of the checksum, and losing the key is the wipe.

A nonce is 4 bytes of the slab and the 8-byte sequence number of the store, which is never drawn
twice for one slab (nvme/slab.py); the slot is authenticated too. A kept slab is under the key of a
file. One that is not kept begins its sequence numbers anew with every process, and 4 bytes are too
few to tell thousands of them apart: it is under a key of its own, derived from the given one.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from tiermem.errors import ConfigError, PageLost
from tiermem.nvme.files import Buffer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
TAG_BYTES = 16
_TAG = struct.Struct("<QQ")
_NONCE = struct.Struct("<4sQ")
_SLOT = struct.Struct("<I")

Tag = tuple[int, int]


class Cipher:
    """Seals and opens slots under one key; threads may share it."""

    def __init__(self, key: bytes) -> None:
        """key: 32 bytes. ConfigError if the `cryptography` package is missing."""
        if len(key) != KEY_BYTES:
            raise ConfigError(f"nvme: a key of {len(key)} bytes; AES-256 takes {KEY_BYTES}")
        self._key = key
        self._aes: AESGCM = _aes(key)
        self.key_id = f"{xxhash.xxh3_64_intdigest(b'tiermem key id' + key):016x}"
        """Names the key in a fingerprint, so that another key is refused and not tried."""

    @classmethod
    def of_process(cls) -> Cipher:
        """A key that nobody else has and that ends with this process."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def of_file(cls, path: Path, *, create: bool = True) -> Cipher:
        """The key in a file of ours (mode 0600), made if missing."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError(f"nvme: cannot open key file {path}: {error.strerror}") from error
        with os.fdopen(fd, "r+b") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o077:
                raise ConfigError(f"nvme: key file {path} must be a regular file of mode 0600")
            key = file.read()
            if not key:
                key = os.urandom(KEY_BYTES)
                file.write(key)
                file.flush()
                os.fsync(file.fileno())
        return cls(key)

    def of_slab(self, mark: bytes) -> Cipher:
        """Under a key of its own for one slab; mark: random bytes that no other slab has."""
        return Cipher(hashlib.blake2b(mark, key=self._key, digest_size=KEY_BYTES).digest())

    def encrypt(self, page: Buffer, into: Buffer, salt: bytes, sequence: int, slot: int) -> Tag:
        """Write the ciphertext to into[:len(page)] (into has 16 bytes more); the tag."""
        nonce, n = _NONCE.pack(salt, sequence), len(page)
        if hasattr(self._aes, "encrypt_into"):
            self._aes.encrypt_into(nonce, page, _SLOT.pack(slot), into[: n + TAG_BYTES])
        else:
            into[: n + TAG_BYTES] = self._aes.encrypt(nonce, page, _SLOT.pack(slot))
        first, second = _TAG.unpack(into[n : n + TAG_BYTES])
        return first, second

    def decrypt(
        self, sealed: Buffer, n: int, tag: Tag, into: Buffer, salt: bytes, sequence: int, slot: int
    ) -> None:
        """Open sealed[:n] into a page; PageLost unless it is what was stored, here, under this key.

        sealed has 16 bytes more than n, which are overwritten. After PageLost `into` holds
        undefined bytes.
        """
        from cryptography.exceptions import InvalidTag

        sealed[n : n + TAG_BYTES] = _TAG.pack(*tag)
        whole, nonce = sealed[: n + TAG_BYTES], _NONCE.pack(salt, sequence)
        try:
            if hasattr(self._aes, "decrypt_into"):
                self._aes.decrypt_into(nonce, whole, _SLOT.pack(slot), into)
            else:
                into[:] = self._aes.decrypt(nonce, whole, _SLOT.pack(slot))
        except InvalidTag:
            raise PageLost(
                f"nvme: slot {slot} does not open as it was sealed; compute the page again"
            ) from None


def drop_key(path: Path) -> None:
    """Wipe what a key file protects: overwrite the key, make that last, remove the file."""
    with path.open("r+b") as file:
        file.write(os.urandom(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _aes(key: bytes) -> AESGCM:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ConfigError(
            "nvme: encryption needs the package `cryptography`: pip install 'tiermem[crypt]'"
        ) from error
    return AESGCM(key)
