"""Mutual TLS 1.3 between two nodes: each shows a certificate, and each asks for the other's."""

from __future__ import annotations

import os
import ssl

import click

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class TlsError(Exception):
    """There is no TLS with these files, or not with this peer; says why."""


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The three files that both ends need."""
    for name, text in (
        ("ca", "The authority that the other end's certificate must be of (PEM)."),
        ("key", "The private key (PEM); nobody but root may read it."),
        ("cert", "This end's certificate (PEM)."),
    ):
        path = click.Path(exists=True, dir_okay=False)
        command = click.option(
            f"--tls-{name}", metavar="FILE", type=path, required=True, help=text
        )(command)
    return command


def context(cert: str, key: str, ca: str, *, server: bool) -> ssl.SSLContext:
    """For one end. Raises TlsError."""
    if os.stat(key).st_mode & 0o077:
        raise TlsError(
            f"the key {key} may be read or written by others: chmod go= {key}, and take a new key "
            "if it was known"
        )
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.verify_mode = ssl.CERT_REQUIRED
    if server:
        made.num_tickets = 0  # unread, they would have the end of a connection be a reset
    try:
        made.load_verify_locations(cafile=ca)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"{ca} has no certificate of an authority: {error}") from error
    try:
        made.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"{cert} and {key} are no certificate and its key: {error}") from error
    return made


def names(sock: ssl.SSLSocket) -> set[str]:
    """By what names the peer's certificate, which was verified, calls it."""
    found = sock.getpeercert() or {}
    also: Any = found.get("subjectAltName", ())
    subject: Any = found.get("subject", ())
    common = {value for part in subject for key, value in part if key == "commonName"}
    return common | {value for kind, value in also if kind in ("DNS", "IP Address")}
