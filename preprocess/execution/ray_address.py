"""Ask a Ray cluster's address for a sign of life, as Ray itself waits for minutes, or for ever, for a dead one."""

from __future__ import annotations

import importlib
import os
import socket
from urllib.parse import urlsplit

from shards.errors import ConfigError

_SECONDS = 10.0
_CLIENT_PORT = 10001  # of ray:// addresses that name none
_LEGAL = "auto, HOST:PORT or ray://HOST:PORT of a running Ray cluster, or null to start one on this machine"
# Ray speaks gRPC, that is HTTP/2 (RFC 9113, 3.4): after the client's preface and empty settings, servers send theirs.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + b"\4" + b"\0" + b"\0\0\0\0"
_FRAME, _KIND, _SETTINGS = 9, 3, 4  # bytes of a frame's header, the place of its kind, a kind


def check_ray_address(address: str | None) -> None:
    """Raise ConfigError when `ray_address` cannot be an address, or no Ray cluster answers there within 10 seconds.

    Without an address, Ray takes RAY_ADDRESS, or the cluster that was last started on this machine.
    """
    said = f"ray_address is {address!r}"
    if found := os.environ.get("RAY_ADDRESS"):
        said += f" and RAY_ADDRESS is {found!r}"
    try:
        place = _place(found or address)
        if place is not None:
            _knock(*place)
    except ConnectionError as error:
        raise ConfigError(f"{said}: {error}; legal: {_LEGAL}") from error
    except ValueError as error:
        raise ConfigError(f"{said}: {error}, legal: {_LEGAL}") from error


def _place(address: str | None) -> tuple[str, int] | None:
    """(host, port) of an address; None if there is nobody to ask. Raises ValueError, and ConnectionError for `auto` on
    a machine without a cluster."""
    scheme, mark, named = (address or "").partition("://")
    rest: str | None = named
    if mark and scheme != "ray":
        raise ValueError("this is another kind of URL")
    if not mark:  # what Ray makes of it: also of none, and of auto
        services = importlib.import_module("ray._private.services")
        rest = getattr(services, "canonicalize_bootstrap_address", _named)(address)
    if rest is None:
        return None
    parts = urlsplit(f"//{rest}")
    if not parts.hostname or (parts.port is None and not mark):
        raise ValueError("it has no host or no port")
    return parts.hostname, parts.port or _CLIENT_PORT


def _named(address: str | None) -> str | None:
    """For a release of Ray that has no such function: the address, unless only Ray knows which one is meant."""
    return None if address in (None, "auto", "local") else address


def _knock(host: str, port: int) -> None:
    """Raise ConnectionError unless a gRPC server answers."""
    where = f"{host} port {port}"
    try:
        with socket.create_connection((host, port), _SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return  # it would not answer in plain text
            connection.sendall(_PREFACE)
            answer = b""
            while len(answer) < _FRAME and (piece := connection.recv(_FRAME - len(answer))):
                answer += piece
    except OSError as error:
        raise ConnectionError(f"nobody answers at {where} ({error.strerror or error})") from error
    if len(answer) < _FRAME or answer[_KIND] != _SETTINGS:
        raise ConnectionError(f"what answers at {where} is no Ray cluster")
