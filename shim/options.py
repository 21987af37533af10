"""The options that come with a runtime: told apart, read, and put into the stock shim's form.

A runtime named `io.containerd.runc.v2` (with `runtime_path`) gets runc's own options; any
other name gets `runtimeoptions.v1.Options`, a file's path or body, which the stock shim cannot
decode (facts 1.7). This is the one place that knows both.
"""

from __future__ import annotations

from shim import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.config import GritOptions


def read(options: messages.Any | None) -> tuple[messages.Any | None, GritOptions]:
    """The options as the stock shim wants them, and ours.

    An Any of a type unknown to us goes on as it is: a containerd newer than this shim may send
    one. Raises ConfigError where the configuration cannot be understood.
    """
    from shim import config

    if options is None or options.type_url != messages.RUNTIME_OPTIONS:
        return options, config.load()[1]
    given = messages.RuntimeOptions.decode(options.value)
    if given.config_path:
        runc, grit = config.load(given.config_path)
    elif given.config_body.strip():
        body = given.config_body.decode(errors="replace")
        runc, grit = config.parse(body, "the runtime's options in containerd's configuration")
        if "[grit" not in body:
            grit = config.load()[1]
    else:
        runc, grit = config.load()
    names = (field.name for field in messages.RuncOptions.FIELDS)
    value = messages.RuncOptions(**{name: getattr(runc, name) for name in names})
    return messages.Any(type_url=messages.RUNC_OPTIONS, value=value.encode()), grit


def runc_options(options: messages.Any | None) -> messages.RuncOptions:
    """runc's options out of what the stock shim is given; all defaults if it is given none."""
    if options is None or options.type_url != messages.RUNC_OPTIONS:
        return messages.RuncOptions()
    return messages.RuncOptions.decode(options.value)


def for_inner(stdin: bytes) -> bytes:
    """The standard input of `start` or `-info` for the stock shim: translated where it is an
    Any we know, word for word otherwise (containerd >= 2.3 sends another message)."""
    try:
        options = messages.Any.decode(stdin)
    except ValueError:
        return stdin
    if options.type_url != messages.RUNTIME_OPTIONS:
        return stdin
    translated, _ = read(options)
    return translated.encode() if translated else b""


def checkpoint_options(options: messages.Any | None) -> messages.CheckpointOptions:
    """The options of a Checkpoint call; all defaults (keep running) if the client sent none,
    as CRI and nerdctl do under a runtime not called runc (facts 4.1).

    Raises ValueError for an Any of another type.
    """
    if options is None or not options.type_url:
        return messages.CheckpointOptions()
    if options.type_url != messages.CHECKPOINT_OPTIONS:
        raise ValueError(
            f"checkpoint options of type {options.type_url}; expected {messages.CHECKPOINT_OPTIONS}"
        )
    return messages.CheckpointOptions.decode(options.value)
