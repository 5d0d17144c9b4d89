"""A small model to seal, a KEK to seal it with, and a key server that is not one."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import httpx
import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fortpoint.vault.key_encryption import Keyring, PassphraseFile
from fortpoint.vault.model_folder import write_manifest
from fortpoint.vault.tensor_writer import write

CHUNK = 4096
TOKEN = "hvs.right"


def model_folder(home: Path, name: str = "small", seed: int = 0) -> Path:
    """About twelve chunks of 4 KiB in four files, one of them empty."""
    folder = home / "models" / name
    folder.mkdir(parents=True)
    source = np.random.default_rng(seed)
    tensors = {
        f"model.layers.0.mlp.{name}_proj.weight": source.normal(size=shape).astype(np.float32)
        for name, shape in {"gate": (48, 64), "up": (48, 64), "down": (64, 48)}.items()
    }
    tensors["model.embed_tokens.weight"] = np.ones((2, 64), np.float32)
    write(folder / "model.safetensors", tensors, "F32", {"format": "pt"})
    config = {"num_attention_heads": 2, "hidden_size": 64, "seed": seed}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}" * 1000)
    (folder / "merges.txt").write_text("")
    write_manifest(folder, name, "tests/sealing.py", "Apache-2.0", 1_700_000_000)
    return folder


def passphrase(folder: Path, text: str = "correct horse battery staple") -> PassphraseFile:
    path = folder / f"passphrase-{text[:7]}"
    path.write_text(text + "\n")
    path.chmod(0o600)
    return PassphraseFile(path)


class FakeKeyring:
    """The two calls of the ``keyring`` package, in memory."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, account: str) -> str | None:
        return self.held.get((service, account))

    def set_password(self, service: str, account: str, password: str) -> None:
        self.held[service, account] = password


class FakeTransit(httpx.BaseTransport):
    """HashiCorp Vault's transit engine as its API documents it, for one key."""

    def __init__(self) -> None:
        self._kek = AESGCM(AESGCM.generate_key(256))
        self.down = False
        self.asked: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if self.down:
            raise httpx.ConnectError("connection refused", request=request)
        if request.headers.get("X-Vault-Token") != TOKEN:
            return httpx.Response(403, json={"errors": ["permission denied"]})
        body = json.loads(request.read())
        context = base64.b64decode(body["associated_data"])
        if request.url.path == "/v1/transit/encrypt/fortpoint":
            nonce = AESGCM.generate_key(128)[:12]
            sealed = nonce + self._kek.encrypt(nonce, base64.b64decode(body["plaintext"]), context)
            return _data(ciphertext="vault:v1:" + base64.b64encode(sealed).decode())
        if request.url.path == "/v1/transit/decrypt/fortpoint":
            try:
                sealed = base64.b64decode(body["ciphertext"].removeprefix("vault:v1:"))
                plain = self._kek.decrypt(sealed[:12], sealed[12:], context)
            except (InvalidTag, ValueError):
                return httpx.Response(400, json={"errors": ["cipher: message authentication"]})
            return _data(plaintext=base64.b64encode(plain).decode())
        return httpx.Response(404, json={"errors": []})


def _data(**fields: str) -> httpx.Response:
    return httpx.Response(200, json={"data": fields})


KEK = Keyring(FakeKeyring())
"""Costs nothing to use, unlike a passphrase."""
