"""The node's settings, read from grit.toml: runc's own options at the top level, ours under [grit].

The text is either a file (the `ConfigPath` of the runtime options, /etc/containerd/grit.toml by
custom) or the body that containerd 1.7 and later make from the runtime's options table. Whatever
is not understood is an error naming the file, the key, its line and what would be right: a
checkpoint must never run under other settings than the ones written down. This module does not
look at the node (whether a path exists is for whoever uses it to say), and importing it costs
next to nothing, since the shim's daemon does so at every start of a container.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Literal

    Check = Callable[[object], object]

DEFAULT_PATH = "/etc/containerd/grit.toml"
MAX_BYTES = 64 * 1024  # a configuration is a page or two; more is the wrong file


class ConfigError(Exception):
    """What is wrong in the configuration; `where` is the file, `key` and `line` are as known."""

    def __init__(
        self, message: str, *, where: str, key: str | None = None, line: int | None = None
    ) -> None:
        self.where, self.key, self.line = where, key, line
        at = f"{where}, line {line}" if line is not None else where
        super().__init__(f"{at}: {key}: {message}" if key is not None else f"{at}: {message}")


class _Settings:
    """Named values with defaults, set once. (A dataclass would import `inspect`.)"""

    def __init__(self, **values: object) -> None:
        unknown = values.keys() - type(self).__annotations__.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be removed")

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in type(self).__annotations__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        shown = ", ".join(f"{n}={getattr(self, n)!r}" for n in type(self).__annotations__)
        return f"{type(self).__name__}({shown})"


class RuncOptions(_Settings):
    """`containerd.runc.v1.Options` by its protobuf field names; the zero value means "not set"."""

    no_pivot_root: bool = False
    no_new_keyring: bool = False
    shim_cgroup: str = ""
    io_uid: int = 0
    io_gid: int = 0
    binary_name: str = ""
    root: str = ""
    criu_path: str = ""
    systemd_cgroup: bool = False
    criu_image_path: str = ""
    criu_work_path: str = ""


class GritOptions(_Settings):
    """The [grit] table; docs/configuration.md says what each key does."""

    engine: Literal["auto", "driver", "plugin"] = "auto"
    lock_timeout: float = 10.0  # seconds
    dump_timeout: float = 600.0  # seconds
    restore_timeout: float = 600.0  # seconds
    criu: str = "criu"  # a path, or a name looked up on PATH
    criu_service: str | None = None  # a socket's path
    plugin_dir: str | None = None
    libcuda: str = "libcuda.so.1"  # a path, or a name for the dynamic loader
    cuda_checkpoint: str | None = None
    tcp: Literal["refuse", "established", "close"] = "refuse"
    file_locks: bool = False
    ext_unix_sockets: bool = False
    link_remap: bool = False
    ghost_limit: int = 1024 * 1024  # bytes; CRIU's own default
    memory: Literal["refuse", "raise"] = "refuse"
    on_missing_checkpoint: Literal["start", "fail"] = "start"
    on_mismatch: Literal["refuse", "warn"] = "refuse"
    download_timeout: float = 60.0  # seconds
    agent_timeout: float = 10.0  # seconds
    together_timeout: float = 60.0  # seconds
    pause_timeout: float = 0.0  # seconds; 0: never
    prefault: Literal["auto", "off"] = "auto"
    lane: Literal["auto", "off"] = "auto"
    lane_from: int = 64 * 1024 * 1024  # bytes of a region
    lane_threads: int = 0  # as many as there are processors
    lane_direct: bool = False
    lane_compression: Literal["off", "auto", "lz4", "zstd"] = "off"
    checksum: Literal["xxh3", "sha256"] = "xxh3"
    metrics: str | None = None  # a directory, for node_exporter's textfile collector
    sign_key: str | None = None  # a file
    encryption_key_file: str | None = None
    encryption_key_command: tuple[str, ...] = ()  # a program and its arguments
    old_encryption_keys: tuple[str, ...] = ()  # files, for restores alone
    scratch_dir: str | None = None  # None: in the bundle
    verify_keys: tuple[str, ...] = ()  # files; empty: nothing need be signed
    checkpoint_roots: tuple[str, ...] = ()  # directories; empty: anywhere
    trusted_uids: tuple[int, ...] = ()  # beside root
    unpack_bytes: int = 0  # 0: what is free
    unpack_files: int = 2_000_000  # 0: what is free


# A check returns the value to keep, or raises ValueError saying what would be right.


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


def _text(value: object) -> str:
    if isinstance(value, str) and "\0" not in value:
        return value
    raise ValueError("a string")


def _path(value: object) -> str | None:
    if isinstance(value, str) and "\0" not in value and value[:1] in ("", "/"):
        return value or None
    raise ValueError('an absolute path, or "" for the default')


def _runc_path(value: object) -> str:
    return _path(value) or ""


def _program(value: object) -> str:
    """A bare name is looked up by whoever runs it; a relative path would depend on its cwd."""
    if isinstance(value, str) and "\0" not in value and value:
        absolute = value.startswith("/")
        if absolute or "/" not in value:
            return value
    raise ValueError("an absolute path, or a name without slashes")


def _runc_program(value: object) -> str:
    return _program(value) if value != "" else ""


def _one_of(*allowed: str) -> Check:
    def check(value: object) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        raise ValueError("one of " + ", ".join(f'"{word}"' for word in allowed))

    return check


def _integer(low: int, high: int) -> Check:
    def check(value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise ValueError(f"a whole number from {low} to {high}")

    return check


def _seconds(high: int) -> Check:
    """Zero is refused: to the driver a lock timeout of 0 means to wait for ever."""

    def check(value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= high:
            return float(value)
        raise ValueError(f"a number of seconds above 0 and up to {high}")

    return check


def _seconds_or_never(high: int) -> Check:
    def check(value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high:
            return float(value)
        raise ValueError(f"a number of seconds up to {high}, or 0 for never")

    return check


def _absolute(value: object) -> str:
    if value and isinstance(value, str):
        return _runc_path(value)
    raise ValueError("an absolute path")


def _several(check: Check, kind: str) -> Check:
    def check_all(value: object) -> tuple[object, ...]:
        try:
            if isinstance(value, list):
                return tuple(check(one) for one in value)
        except ValueError:
            pass
        raise ValueError(f"an array of {kind}")

    return check_all


def _command(value: object) -> tuple[str, ...]:
    words = [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
    if words == value and "\0" not in "".join(words) and (not words or words[0].startswith("/")):
        return tuple(words)
    raise ValueError("an array of a program's absolute path and its arguments")


_UINT32 = 2**32 - 1

# The TOML names are those of containerd's Go structure, which is what GRIT's file uses too.
_RUNC: dict[str, tuple[str, Check]] = {
    "NoPivotRoot": ("no_pivot_root", _boolean),
    "NoNewKeyring": ("no_new_keyring", _boolean),
    "ShimCgroup": ("shim_cgroup", _text),
    "IoUid": ("io_uid", _integer(0, _UINT32)),
    "IoGid": ("io_gid", _integer(0, _UINT32)),
    "BinaryName": ("binary_name", _runc_program),
    "Root": ("root", _runc_path),
    "CriuPath": ("criu_path", _runc_program),
    "SystemdCgroup": ("systemd_cgroup", _boolean),
    "CriuImagePath": ("criu_image_path", _runc_path),
    "CriuWorkPath": ("criu_work_path", _runc_path),
}

_GRIT: dict[str, Check] = {
    "engine": _one_of("auto", "driver", "plugin"),
    "lock_timeout": _seconds(24 * 3600),
    "dump_timeout": _seconds(24 * 3600),
    "restore_timeout": _seconds(24 * 3600),
    "criu": _program,
    "criu_service": _path,
    "plugin_dir": _path,
    "libcuda": _program,
    "cuda_checkpoint": _path,
    "tcp": _one_of("refuse", "established", "close"),
    "file_locks": _boolean,
    "ext_unix_sockets": _boolean,
    "link_remap": _boolean,
    "ghost_limit": _integer(0, _UINT32),
    "memory": _one_of("refuse", "raise"),
    "on_missing_checkpoint": _one_of("start", "fail"),
    "on_mismatch": _one_of("refuse", "warn"),
    "download_timeout": _seconds(24 * 3600),
    "agent_timeout": _seconds(24 * 3600),
    "together_timeout": _seconds(24 * 3600),
    "pause_timeout": _seconds_or_never(7 * 24 * 3600),
    "prefault": _one_of("auto", "off"),
    "lane": _one_of("auto", "off"),
    "lane_from": _integer(4096, 2**63 - 1),
    "lane_threads": _integer(0, 256),
    "lane_direct": _boolean,
    "lane_compression": _one_of("off", "auto", "lz4", "zstd"),
    "checksum": _one_of("xxh3", "sha256"),
    "metrics": _path,
    "sign_key": _path,
    "encryption_key_file": _path,
    "encryption_key_command": _command,
    "old_encryption_keys": _several(_absolute, "absolute paths"),
    "scratch_dir": _path,
    "verify_keys": _several(_absolute, "absolute paths"),
    "checkpoint_roots": _several(_absolute, "absolute paths"),
    "unpack_bytes": _integer(0, 2**63 - 1),
    "unpack_files": _integer(0, 2**63 - 1),
    "trusted_uids": _several(_integer(0, _UINT32), "user ids"),
}

# Tables at the top level, and a key that containerd leaves in the body it makes of the options.
_TOP_LEVEL = ("grit", "options", "TypeUrl")


def load(path: str | None = None) -> tuple[RuncOptions, GritOptions]:
    """Reads the configuration file `path`, which must be there; raises ConfigError.

    Without a path (the runtime was named by `runtime_path`, which brings no ConfigPath),
    DEFAULT_PATH is read if there is one; otherwise everything has its default.
    """
    where = path if path is not None else DEFAULT_PATH
    try:
        with open(where, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        if path is None:
            return RuncOptions(), GritOptions()
        raise ConfigError(
            "there is no such file; create it, or correct ConfigPath in the runtime's options "
            "in containerd's configuration",
            where=where,
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot be read: {reason}", where=where) from error
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"is larger than {MAX_BYTES} bytes; this is not a grit configuration", where=where
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("this line is not UTF-8 text", where=where, line=line) from error
    return parse(text, where)


def parse(text: str, where: str) -> tuple[RuncOptions, GritOptions]:
    """The settings in the TOML `text`; `where` is what errors call it. Raises ConfigError."""
    if not text.strip(" \t\n"):
        return RuncOptions(), GritOptions()
    document = _read_toml(text, where)
    runc: dict[str, object] = {}
    grit: dict[str, object] = {}

    def problem(message: str, *keys: str) -> ConfigError:
        line = _line_of(text, keys)
        return ConfigError(message, where=where, key=_spelled(keys), line=line)

    def take_runc(value: object, *keys: str) -> None:
        field, check = _RUNC[keys[-1]]
        if field in runc:
            raise problem("is set twice, at the top level and under [options]; remove one", *keys)
        runc[field] = checked(check, value, *keys)

    def checked(check: Check, value: object, *keys: str) -> object:
        try:
            return check(value)
        except ValueError as right:
            raise problem(f"is {_shown(value)}; it must be {right}", *keys) from None

    def table(value: object, name: str) -> Iterable[tuple[str, object]]:
        if isinstance(value, dict):
            return value.items()
        raise problem(f"is {_shown(value)}; it must be a table, written [{name}]", name)

    for name, value in document.items():
        if name in _RUNC:
            take_runc(value, name)
        elif name == "options":
            for key, inner in table(value, name):
                if key in _RUNC:
                    take_runc(inner, name, key)
                elif key != "TypeUrl":
                    raise problem(_unknown(key, _RUNC), name, key)
        elif name == "grit":
            for key, inner in table(value, name):
                if key not in _GRIT:
                    raise problem(_unknown(key, _GRIT), name, key)
                grit[key] = checked(_GRIT[key], inner, name, key)
        elif name in _GRIT:
            raise problem("belongs under [grit], not at the top level", name)
        elif name != "TypeUrl":
            raise problem(_unknown(name, (*_RUNC, *_TOP_LEVEL)), name)
    # An empty path stands for the default, as it does in containerd's own configuration.
    grit = {key: value for key, value in grit.items() if value is not None}
    return RuncOptions(**runc), GritOptions(**grit)


def _read_toml(text: str, where: str) -> dict[str, object]:
    import re
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
        if found is None:
            raise ConfigError(f"is not valid TOML: {message}", where=where) from error
        message = message[: found.start()]
        if found[1] is None:
            line = _never_ended(text)
            detail = f"is not valid TOML: what begins here does not end ({message})"
        else:
            line = int(found[1])
            detail = f"is not valid TOML: {message} (column {found[2]})"
        raise ConfigError(detail, where=where, line=line) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        raise ConfigError(f"is not usable TOML: {error}", where=where) from error


def _never_ended(text: str) -> int:
    """The line after the longest beginning that parses: what runs past the end starts there."""
    import tomllib

    lines = text.split("\n")
    for end in range(len(lines) - 1, 0, -1):
        try:
            tomllib.loads("\n".join(lines[:end]))
        except (ValueError, RecursionError):
            continue
        return end + 1
    return 1


def _line_of(text: str, keys: tuple[str, ...]) -> int | None:
    """The line that brings in the key, found by parsing ever longer beginnings of the text.

    tomllib keeps no positions; but every beginning of a valid document that does not end inside
    a value is valid itself, and the key's own line ends the first of them to hold the key.
    """
    import tomllib

    lines = text.split("\n")
    begins = 0  # the first line after the longest beginning that parsed
    first = next((n for n, line in enumerate(lines) if keys[-1] in line), 0)
    for end in range(1, len(lines) + 1):
        if end <= first:
            begins = end
            continue
        try:
            found: object = tomllib.loads("\n".join(lines[:end]))
        except (ValueError, RecursionError):
            continue
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            names_it = (n for n in range(begins, end) if keys[-1] in lines[n])
            return next(names_it, begins) + 1
        begins = end
    return None


def _spelled(keys: tuple[str, ...]) -> str:
    shown = keys[-1] if keys[-1].isprintable() and keys[-1] else repr(keys[-1])
    return shown if len(keys) == 1 else f"[{keys[0]}] {shown}"


def _unknown(key: str, known: Iterable[str]) -> str:
    import difflib

    by_fold = {name.lower().replace("_", ""): name for name in known}
    close = difflib.get_close_matches(key.lower().replace("_", ""), by_fold, n=1)
    if close:
        return f"is not a known key; did you mean {by_fold[close[0]]}?"
    return f"is not a known key; those known here are {', '.join(known)}"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, int) and abs(value) > 2**64:
        return "a huge number"  # Python refuses to spell out thousands of digits
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
