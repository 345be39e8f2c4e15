"""Start the server: ``python -m twinslot_server SITE [--host H] [--port P] [--data DIR] ...``

Prints one line when it really listens, ``listening https://127.0.0.1:8443``, on stdout; its log is
JSON lines on stderr. Ends cleanly on SIGTERM and SIGINT. Exit code 1: it can't start, and why.
"""

import argparse
import datetime as dt
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from twinslot import keyring
from twinslot.errors import OtaError

from . import tls, tokens
from .app import Parts, create_app
from .limits import Limits
from .offers import DEFAULT_POLL_S
from .site import Site
from .store import DATABASE, Store, StoreError
from .wire import Server, protocol

DEFAULT_PORT = 8443

log = logging.getLogger("twinslot.server")


class StartError(Exception):
    """The server can't start as asked."""


class JsonLines(logging.Formatter):
    """One JSON object per line: whatever a board sends, it can't forge a line or a colour."""

    def format(self, record: logging.LogRecord) -> str:
        when = dt.datetime.fromtimestamp(record.created, dt.UTC)
        line = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("twinslot_server", description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="folder that 'twinslot publish' wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (%(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes any free one")
    parser.add_argument("--data", type=Path, help="private folder (default: SITE-server)")
    parser.add_argument("--keys", type=Path, help="key file of the boards: offer what they take")
    parser.add_argument(
        "--name", action="append", default=[], help="host name or address boards use (repeatable)"
    )
    parser.add_argument(
        "--poll", type=int, default=DEFAULT_POLL_S, help="seconds until a board asks again"
    )
    return parser.parse_args(argv)


def start(arguments: argparse.Namespace, limits: Limits) -> None:
    """Serve until told to stop.

    Raises:
        StartError, tls.CertificateError, tokens.TokenError, StoreError, OtaError, OSError: it
            can't start; the message says why.
    """
    site_folder: Path = arguments.site
    if not site_folder.is_dir():
        raise StartError(f"{site_folder} is not a folder")
    if arguments.poll <= 0:
        raise StartError(f"--poll {arguments.poll}: expected seconds, 1 or more")
    beside = site_folder.resolve()
    data = arguments.data or beside.with_name(f"{beside.name}-server")
    tls.prepare_data_folder(data, site_folder)
    certificate = tls.ensure(data, _names(arguments))
    device_token = tokens.load(data / tokens.DEVICE_FILE, tokens.DEVICE_ENV)
    operator_token = tokens.load(data / tokens.OPERATOR_FILE, tokens.OPERATOR_ENV)
    if device_token.digest == operator_token.digest:
        raise StartError("device and operator token are the same: boards would be operators")
    roots, keys = keyring.load(arguments.keys.read_bytes()) if arguments.keys else (None, None)
    store = Store(data / DATABASE, limits)
    parts = Parts(
        Site(site_folder, keys, roots), store, device_token, operator_token, limits, arguments.poll
    )
    try:
        _log_start(certificate, parts, keys)
        _serve(parts, certificate, arguments)
    finally:
        store.close()


def _names(arguments: argparse.Namespace) -> list[str]:
    """The names boards may use: those given, and a bound address other than "all of them"."""
    try:
        if not ipaddress.ip_address(arguments.host).is_unspecified:
            return [*arguments.name, arguments.host]
    except ValueError:
        return [*arguments.name, arguments.host]
    return list(arguments.name)


def _log_start(certificate: tls.Certificate, parts: Parts, keys: dict | None) -> None:
    fields = {
        "certificate": str(certificate.certificate),
        "fingerprint": certificate.fingerprint,
        "names": list(certificate.names),
        "expires": certificate.not_after.isoformat(),
        "device_token": parts.device_token.source,
        "operator_token": parts.operator_token.source,
    }
    log.info("start", extra={"fields": fields})
    if certificate.not_after - dt.datetime.now(dt.UTC) < dt.timedelta(days=tls.WARN_DAYS):
        log.warning("the certificate expires soon: give boards the next one before it does")
    if keys is None:
        log.warning("no --keys: releases are offered without verifying them first")


def _serve(parts: Parts, certificate: tls.Certificate, arguments: argparse.Namespace) -> None:
    config = uvicorn.Config(
        create_app(parts),
        http=protocol(parts.limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=parts.limits.keep_alive_s,
        timeout_graceful_shutdown=parts.limits.shutdown_s,
        h11_max_incomplete_event_size=parts.limits.header_bytes,
        ssl_certfile=certificate.certificate,
        ssl_keyfile=certificate.key,
    )
    # uvicorn stops on these signals and then raises them again: without a handler of ours that
    # would end a clean stop as a crash.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with _listen(arguments.host, arguments.port) as listener:
        Server(config, parts.limits, lambda url: print(f"listening {url}", flush=True)).run(
            [listener]
        )


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything else runs: uvicorn would log a busy port and exit by itself.

    Raises:
        StartError: nobody can listen there.
    """
    listener = None
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio turns Nagle's algorithm off (40 ms an answer) only where the protocol is named,
        # which socket.create_server() doesn't do.
        listener = socket.socket(family, kind, proto)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
    except (OSError, OverflowError) as exc:
        if listener:
            listener.close()
        raise StartError(f"can't listen on {host} port {port}: {exc}") from exc
    return listener


def main(argv: list[str] | None = None, limits: Limits | None = None) -> int:
    """Run as a program; return its exit code."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.INFO)
    try:
        start(_arguments(argv), limits or Limits())
    except (StartError, tls.CertificateError, tokens.TokenError, StoreError, OtaError) as exc:
        print(f"twinslot_server: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        where = f"{exc.filename}: " if exc.filename else ""
        print(f"twinslot_server: {where}{exc.strerror or exc}", file=sys.stderr)
        return 1
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
