"""Tokens and client certificates for a broker of the tests. openssl creates all keys, in the folder of the broker."""

import base64
import json
import subprocess
import time
from pathlib import Path


def _run_openssl(folder: Path, *arguments: str, data: bytes | None = None) -> bytes:
    return subprocess.run(["openssl", *arguments], cwd=folder, input=data, check=True, capture_output=True).stdout


def encode_base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def make_unsigned_token(**claims: object) -> str:
    """Return a JWT with these claims and an invalid signature."""
    return ".".join(encode_base64url(json.dumps(part).encode()) for part in ({"alg": "RS256"}, claims, "signature"))


class TokenIssuer:
    """Signs tokens (JWT with RS256). The broker reads the public key from the file of `keys_url`."""

    KEY_ID = "test"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys_url = (folder / "keys.json").as_uri()  # a URL, because the broker expects one

    def create(self) -> None:
        _run_openssl(self.folder, "genrsa", "-out", "issuer.key", "2048")
        modulus = _run_openssl(self.folder, "rsa", "-in", "issuer.key", "-noout", "-modulus").decode().strip().partition("=")[2]
        key = {"kty": "RSA", "alg": "RS256", "use": "sig", "kid": self.KEY_ID, "e": "AQAB"}
        key["n"] = encode_base64url(bytes.fromhex(modulus))
        (self.folder / "keys.json").write_text(json.dumps({"keys": [key]}))

    def make_token(self, lifetime_s: float = 3600.0, **claims: object) -> str:
        """Return a token for the subject `charter`. `claims` override its claims."""
        now = int(time.time())
        header = {"alg": "RS256", "kid": self.KEY_ID, "typ": "JWT"}
        payload = {"sub": "charter", "aud": "kafka", "scope": "kafka", "iat": now, "exp": now + lifetime_s} | claims
        signed = ".".join(encode_base64url(json.dumps(part).encode()) for part in (header, payload))
        signature = _run_openssl(self.folder, "dgst", "-sha256", "-sign", "issuer.key", data=signed.encode())
        return f"{signed}.{encode_base64url(signature)}"


class ClientCertificates:
    """A certificate authority (`ca_file`), a certificate of it (`charter`), and a certificate that it has not signed (`stranger`)."""

    KEY_PASSWORD = "passphrase-of-the-key"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca_file = folder / "clients.pem"

    def create(self) -> None:
        signed_by = {"clients": [], "charter": ["-CA", "clients.pem", "-CAkey", "clients.key"], "stranger": []}
        for name, authority in signed_by.items():
            new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", f"{name}.key"]
            new_key += ["-addext", "subjectAltName=IP:127.0.0.1"]
            _run_openssl(
                self.folder, "req", "-x509", *new_key, "-subj", f"/CN={name}", "-days", "30", "-out", f"{name}.pem", *authority
            )
        password = f"pass:{self.KEY_PASSWORD}"
        _run_openssl(self.folder, "ec", "-aes256", "-in", "charter.key", "-out", "charter-encrypted.key", "-passout", password)

    def get_files(self, name: str) -> tuple[str, str]:
        """Return the paths of the certificate and of the key."""
        return str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key")
