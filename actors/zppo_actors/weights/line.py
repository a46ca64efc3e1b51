"""The line that weights take from host to host: TLS 1.3, beside the messages of the run.

The server makes a certificate and a token for its life. Both, and the address, reach the fetchers
as a message of the protocol (`WeightSource`), which is authenticated and secret. A fetcher talks to
exactly that certificate and shows the token first; whoever does not is cut off. Certificates have
no end, so that the clocks of two hosts need not agree.

After the token: requests and answers of fixed size, an answer followed by its bytes. Nothing here
allocates by what a peer says, and every wait has an end.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
import socket
import ssl
import struct
import tempfile
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from zppo_actors.weights.fetch import Chunk
from zppo_protocol.messages import WeightSource

FRAME = struct.Struct("!QQQ")
"""Version, first byte and number of bytes, of a request as of an answer. An answer of no bytes:
this version is not here."""
TOKEN_BYTES = 32
CONNECT_SECONDS = 10.0
KEEPALIVE_SECONDS = 60
"""A line on which nobody speaks is tried after so long, so that none whose other end is gone stays
for ever."""
NAME = "zppo weights"


class LineCut(Exception):
    """The other end is gone, silent, or not who it should be."""


def serving_context(folder: Path) -> tuple[ssl.SSLContext, str]:
    """The server's side of TLS with a new key, and its certificate as PEM. The key lies in
    `folder`, which must be private, only while it is read."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    public = key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(1970, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".weights-") as file:  # mode 0600
        file.write(pem + secret)
        file.flush()
        context.load_cert_chain(file.name)
    return context, pem.decode("ascii")


def new_token() -> str:
    """A secret of this life, as hexadecimal digits."""
    return secrets.token_hex(TOKEN_BYTES)


def proof_of(token: str) -> bytes:
    """What a fetcher shows for `token`: always as long, whatever the token."""
    return hashlib.sha256(token.encode()).digest()


def tune(plain: socket.socket) -> None:
    """Small messages go at once, and the end of a silent peer is found."""
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # elsewhere after two hours
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)


def connect(source: WeightSource) -> Line:
    """Open a line to the server. Raises LineCut."""
    where = f"{source.host}:{source.port}"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # it is this very certificate, or nobody's
    context.load_verify_locations(cadata=source.certificate)
    try:
        plain = socket.create_connection((source.host, source.port), timeout=CONNECT_SECONDS)
        tune(plain)
        secured = context.wrap_socket(plain)
        if secured.getpeercert(binary_form=True) != ssl.PEM_cert_to_DER_cert(source.certificate):
            secured.close()
            raise LineCut(f"{where} has another certificate than it should")
        secured.sendall(proof_of(source.token))
    except OSError as error:
        raise LineCut(f"{where}: {error}") from error
    return Line(secured)


class Line:
    """The fetcher's end. One thread only."""

    def __init__(self, secured: ssl.SSLSocket) -> None:
        self._socket = secured
        self._head, self._filled = bytearray(FRAME.size), 0
        self._expected: tuple[int, Chunk] | None = None
        self.alive = time.monotonic()
        """When the other end last had nothing to say, or said something."""

    def ask(self, version: int, chunk: Chunk) -> None:
        """Ask for a chunk of a version. Raises LineCut."""
        self.alive = time.monotonic()
        try:
            self._socket.settimeout(CONNECT_SECONDS)
            self._socket.sendall(FRAME.pack(version, chunk.start, chunk.size))
        except OSError as error:
            raise LineCut(str(error)) from error

    def receive(self, version: int, memory: memoryview, seconds: float) -> Chunk | None:
        """Read on, for `seconds` at most; a chunk that is whole, in its place in `memory`, which
        is as long as the file. None: there is more to come.

        Raises LineCut if the other end has gone, has no such version, or sends anything else.
        """
        deadline = time.monotonic() + seconds
        if self._expected is None and not self._read(memoryview(self._head), deadline):
            return None
        if self._expected is None:
            self._expected = self._announced(version, len(memory))
        _, chunk = self._expected
        if not self._read(memory[chunk.start : chunk.start + chunk.size], deadline):
            return None
        self._expected = None
        return chunk

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _announced(self, version: int, size: int) -> tuple[int, Chunk]:
        found, start, count = FRAME.unpack(self._head)
        if found != version or start + count > size:
            raise LineCut("an answer to another question came")
        if not count:
            raise LineCut(f"policy version {version} is not there")
        return found, Chunk(start, count)

    def _read(self, target: memoryview, deadline: float) -> bool:
        """Fill `target`, going on where the last call stopped; False when time is up."""
        while self._filled < len(target):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            try:
                self._socket.settimeout(left)
                count = self._socket.recv_into(target[self._filled :])
            except TimeoutError:
                return False
            except OSError as error:
                raise LineCut(str(error)) from error
            if not count:
                raise LineCut("the other end has hung up")
            self._filled += count
            self.alive = time.monotonic()
        self._filled = 0
        return True
