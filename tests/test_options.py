"""Options by the two names of the runtime, and what the stock shim gets of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shim import messages, options
from shim.config import ConfigError


@pytest.fixture(autouse=True)
def no_node_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shim.config.DEFAULT_PATH", str(tmp_path / "absent.toml"))


def runtime_options(**fields: object) -> messages.Any:
    value = messages.RuntimeOptions(type_url=messages.RUNC_OPTIONS, **fields)
    return messages.Any(type_url=messages.RUNTIME_OPTIONS, value=value.encode())


def test_a_config_path_becomes_runc_options_and_ours(tmp_path: Path) -> None:
    file = tmp_path / "grit.toml"
    file.write_text('BinaryName = "crun"\nSystemdCgroup = true\n[grit]\nengine = "plugin"\n')
    translated, ours = options.read(runtime_options(config_path=str(file)))
    runc = options.runc_options(translated)
    assert (runc.binary_name, runc.systemd_cgroup) == ("crun", True)
    assert ours.engine == "plugin"


def test_a_config_body_is_read_as_a_file_would_be() -> None:
    body = b'BinaryName = "crun"\n[grit]\nlock_timeout = 3\n'
    translated, ours = options.read(runtime_options(config_body=body))
    assert options.runc_options(translated).binary_name == "crun"
    assert ours.lock_timeout == 3


def test_runc_options_go_on_untouched() -> None:
    given = messages.Any(type_url=messages.RUNC_OPTIONS, value=b"\x32\x04crun")
    translated, _ = options.read(given)
    assert translated is given
    assert options.runc_options(translated).binary_name == "crun"


def test_no_options_are_no_options() -> None:
    translated, ours = options.read(None)
    assert translated is None
    assert ours.engine == "auto"
    assert options.runc_options(None) == messages.RuncOptions()


def test_a_wrong_configuration_names_file_key_and_line(tmp_path: Path) -> None:
    file = tmp_path / "grit.toml"
    file.write_text('[grit]\nengin = "driver"\n')
    with pytest.raises(ConfigError, match=rf"{file}, line 2: \[grit\] engin: .*engine"):
        options.read(runtime_options(config_path=str(file)))


@pytest.mark.parametrize("stdin", [b"", b"\xff\xff\xff", b"\x0a\x03abc\x12\x01x"])
def test_what_is_not_ours_to_translate_reaches_the_stock_shim_word_for_word(stdin: bytes) -> None:
    assert options.for_inner(stdin) == stdin


def test_runtime_options_on_standard_input_are_translated() -> None:
    stdin = runtime_options(config_body=b'ShimCgroup = "/pods"\n').encode()
    translated = messages.Any.decode(options.for_inner(stdin))
    assert translated.type_url == messages.RUNC_OPTIONS
    assert options.runc_options(translated).shim_cgroup == "/pods"


def test_checkpoint_options_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected containerd\.runc.v1\.CheckpointOptions"):
        options.checkpoint_options(messages.Any(type_url="other.Options", value=b""))
    assert options.checkpoint_options(None).exit is False
