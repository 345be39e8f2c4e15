"""Start the server: ``python -m twinslot_server SITE [--config FILE] [--port P] [--data DIR] ...``

Prints one line when it really listens, ``listening https://127.0.0.1:8443``, on stdout; its log is
JSON lines on stderr. Ends cleanly on SIGTERM and SIGINT; SIGHUP makes it take up a certificate
that was renewed. Exit code 1: it can't start, and why.
"""

import argparse
import contextlib
import datetime as dt
import functools
import ipaddress
import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn

from twinslot import keyring
from twinslot.errors import OtaError

from . import releases, schedules, settings, tls, tokens
from .app import Parts, create_app
from .auth import People
from .background import Background
from .desk import Desk
from .limits import Limits
from .settings import Settings, SettingsError
from .site import Site
from .store import DATABASE, Store, StoreError
from .wire import Server, protocol

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
    parser.add_argument("--config", type=Path, help="YAML: see docs/server.md")
    parser.add_argument("--host", help="address to bind (127.0.0.1)")
    parser.add_argument("--port", type=int, help="0 takes any free one (8443)")
    parser.add_argument("--data", type=Path, help="private folder (default: SITE-server)")
    parser.add_argument("--keys", type=Path, help="key file of the boards: offer what they take")
    parser.add_argument(
        "--name", action="append", help="host name or address boards use (repeatable)"
    )
    parser.add_argument("--poll", type=int, help="seconds until a board asks again (300)")
    parser.add_argument("--database", help="postgresql+psycopg://... (default: SQLite in --data)")
    parser.add_argument("--workers", type=int, help="processes, with PostgreSQL (1)")
    parser.add_argument(
        "--http", action="store_true", help="no TLS: only behind a proxy on this machine"
    )
    parser.add_argument(
        "--no-migrate", action="store_true", help="refuse a database of an older server"
    )
    return parser.parse_args(argv)


def start(arguments: argparse.Namespace, limits: Limits) -> None:
    """Serve until told to stop.

    Raises:
        StartError, SettingsError, tls.CertificateError, tokens.TokenError, StoreError, OtaError,
        OSError: it can't start; the message says why.
    """
    site_folder: Path = arguments.site
    if not site_folder.is_dir():
        raise StartError(f"{site_folder} is not a folder")
    wanted = _settings(arguments)
    beside = site_folder.resolve()
    data = wanted.data or beside.with_name(f"{beside.name}-server")
    tls.prepare_data_folder(data, site_folder)
    certificate = _certificate(wanted, data)
    device_token = _token(data, "device", wanted.device_token)
    operator_token = _token(data, "operator", wanted.operator_token)
    if device_token.digest == operator_token.digest:
        raise StartError("device and operator token are the same: boards would be operators")
    roots, keys = keyring.load(wanted.keys.read_bytes()) if wanted.keys else (None, None)
    planned = schedules.read_file(wanted.schedules) if wanted.schedules else []
    url = wanted.database or f"sqlite:///{data / DATABASE}"
    if wanted.workers > 1 and url.startswith("sqlite:"):
        raise StartError("workers: SQLite serves one process; give --database a PostgreSQL URL")

    def make_parts(store: Store) -> Parts:
        site = Site(site_folder, keys, roots)
        desk = Desk(site, store, limits, wanted)
        people = People(store, operator_token)
        return Parts(site, store, device_token, operator_token, limits, wanted, desk, people)

    store = Store(url, limits.database_wait_s, migrate=not arguments.no_migrate)
    try:
        parts = make_parts(store)
        now = int(time.time())
        store.write(lambda connection: releases.scan(connection, parts.site))
        store.write(lambda connection: schedules.sync_file(connection, planned, now))
        _log_start(certificate, parts, keys)
        with _listen(wanted.host, wanted.port) as listener:
            if wanted.workers == 1:
                _serve(parts, certificate, data, listener)
                return
            store.close()  # no connection and no thread may be shared by processes
            _serve_many(
                wanted.workers,
                lambda: _serve(
                    make_parts(Store(url, limits.database_wait_s, migrate=False)),
                    certificate,
                    data,
                    listener,
                ),
            )
    finally:
        store.close()


def _settings(arguments: argparse.Namespace) -> Settings:
    given = {
        "host": arguments.host,
        "port": arguments.port,
        "data": arguments.data,
        "keys": arguments.keys,
        "names": arguments.name,
        "poll.default": arguments.poll,
        "database": arguments.database,
        "workers": arguments.workers,
        "tls": False if arguments.http else None,
    }
    return settings.load(arguments.config, given)


def _certificate(wanted: Settings, data: Path) -> tls.Certificate | None:
    if not wanted.tls:
        if wanted.host not in ("127.0.0.1", "::1", "localhost"):
            raise StartError(f"without TLS only loopback is served, not {wanted.host}")
        return None
    if (wanted.certificate is None) != (wanted.key is None):
        raise StartError("certificate and key: expected both or none")
    if wanted.certificate and wanted.key:
        return tls.read(wanted.certificate, wanted.key)
    return tls.ensure(data, _names(wanted))


def _token(data: Path, role: str, configured: str | None) -> tokens.Token:
    variable = {"device": tokens.DEVICE_ENV, "operator": tokens.OPERATOR_ENV}[role]
    if configured is not None and variable not in os.environ:
        return tokens.checked(configured, f"the configuration ({role}_token)")
    return tokens.load(data / f"{role}-token", variable)


def _names(wanted: Settings) -> list[str]:
    """The names boards may use: those given, and a bound address other than "all of them"."""
    try:
        if not ipaddress.ip_address(wanted.host).is_unspecified:
            return [*wanted.names, wanted.host]
    except ValueError:
        return [*wanted.names, wanted.host]
    return list(wanted.names)


def _log_start(certificate: tls.Certificate | None, parts: Parts, keys: dict | None) -> None:
    fields: dict[str, object] = {
        "device_token": parts.device_token.source,
        "operator_token": parts.operator_token.source,
    }
    if certificate:
        fields |= {
            "certificate": str(certificate.certificate),
            "fingerprint": certificate.fingerprint,
            "names": list(certificate.names),
            "expires": certificate.not_after.isoformat(),
        }
    log.info("start", extra={"fields": fields})
    if certificate and certificate.not_after - dt.datetime.now(dt.UTC) < dt.timedelta(
        days=tls.WARN_DAYS
    ):
        log.warning("the certificate expires soon: give boards the next one before it does")
    if keys is None:
        log.warning("no --keys: releases are offered without verifying them first")


def _serve(
    parts: Parts, certificate: tls.Certificate | None, data: Path, listener: socket.socket
) -> None:
    config = uvicorn.Config(
        create_app(parts),
        http=protocol(parts.limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=certificate is None,  # without TLS it is a proxy that asks
        timeout_keep_alive=parts.limits.keep_alive_s,
        timeout_graceful_shutdown=parts.limits.shutdown_s,
        ssl_certfile=certificate.certificate if certificate else None,
        ssl_keyfile=certificate.key if certificate else None,
    )
    # uvicorn stops on these signals and then raises them again: without a handler of ours that
    # would end a clean stop as a crash.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if hasattr(signal, "SIGHUP"):
        # In a thread: a signal may come in the middle of a line of the log.
        renew = functools.partial(_renew, config, certificate)
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=renew).start())
    background = Background(parts, data)
    background.start()
    try:
        Server(config, parts.limits, _say_where).run([listener])
    finally:
        background.stop()
        parts.store.close()


def _renew(config: uvicorn.Config, certificate: tls.Certificate | None) -> None:
    """Take up the certificate that lies where the one in use lay; a bad one changes nothing."""
    if certificate is None or config.ssl is None:
        return
    try:
        found = tls.read(certificate.certificate, certificate.key)
        pair = (found.certificate, found.key)
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*pair)
        config.ssl.load_cert_chain(*pair)
    except (tls.CertificateError, OSError) as exc:  # a key of another is an OSError
        log.error("certificate", extra={"fields": {"why": str(exc)}})
        return
    fields = {"fingerprint": found.fingerprint, "expires": found.not_after.isoformat()}
    log.info("certificate", extra={"fields": fields})


def _say_where(url: str) -> None:
    print(f"listening {url}\n", end="", flush=True)  # in one piece: workers say it side by side


def _serve_many(count: int, serve: Callable[[], None]) -> None:
    """Serve with ``count`` processes that share the listener; one that dies ends them all.

    A process manager starts the whole again: half a server that looks well helps nobody.
    """
    children = []
    alive, held = os.pipe()  # its end tells the workers that this process is no more
    for _ in range(count):
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.close(held)
                threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
                serve()
                code = 0
            finally:
                os._exit(code)
        children.append(child)

    def tell(number: int) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    def stop(*_: object) -> None:
        tell(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGHUP, lambda *_: tell(signal.SIGHUP))
    _, first = os.wait()
    stop()
    for _ in children[1:]:
        os.wait()
    if first:
        raise StartError("a worker died; its log says why")


def _end_with(pipe: int) -> None:
    os.read(pipe, 1)
    os._exit(1)


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
    except (
        StartError,
        SettingsError,
        schedules.ScheduleError,
        tls.CertificateError,
        tokens.TokenError,
        StoreError,
        OtaError,
    ) as exc:
        print(f"twinslot_server: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        where = f"{exc.filename}: " if exc.filename else ""
        print(f"twinslot_server: {where}{exc.strerror or exc}", file=sys.stderr)
        return 1
    log.info("stopped")
    return 0
