"""grit.toml: what is accepted, and that each mistake is named with its line and its remedy."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tomllib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shim import config
from shim.config import ConfigError, GritOptions, RuncOptions, load, parse

FULL = """\
BinaryName = "/usr/sbin/runc"
SystemdCgroup = true
Root = "/run/containerd/runc"
NoPivotRoot = true
NoNewKeyring = true
ShimCgroup = "/shims"
IoUid = 1000
IoGid = 1001
CriuPath = "/usr/sbin/criu"
CriuImagePath = "/var/images"
CriuWorkPath = "/var/work"

[grit]
engine = "plugin"
lock_timeout = 2.5
dump_timeout = 60
restore_timeout = 90
criu = "/opt/criu/bin/criu"
criu_service = "/run/criu.sock"
plugin_dir = "/usr/lib/criu"
libcuda = "/usr/lib/libcuda.so.1"
cuda_checkpoint = "/usr/bin/cuda-checkpoint"
tcp = "established"
file_locks = true
ext_unix_sockets = true
link_remap = true
ghost_limit = 67108864
memory = "raise"
on_missing_checkpoint = "fail"
on_mismatch = "warn"
download_timeout = 300
agent_timeout = 3
together_timeout = 120
pause_timeout = 900
checksum = "sha256"
prefault = "off"
lane = "off"
lane_from = 1048576
lane_threads = 4
lane_direct = true
lane_compression = "auto"
metrics = "/var/lib/metrics"
sign_key = "/etc/grit/node.pem"
verify_keys = ["/etc/grit/a.pub", "/etc/grit/b.pub"]
encryption_key_file = "/etc/grit/key"
encryption_key_command = ["/usr/bin/key", "get"]
old_encryption_keys = ["/etc/grit/old-key"]
scratch_dir = "/var/scratch"
checkpoint_roots = ["/var/lib/checkpoints"]
trusted_uids = [65534]
unpack_bytes = 1073741824
unpack_files = 1000
"""


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, "grit.toml")
    return caught.value


def test_every_key_arrives_under_its_own_name() -> None:
    runc, grit = parse(FULL, "grit.toml")
    assert runc == RuncOptions(
        binary_name="/usr/sbin/runc",
        systemd_cgroup=True,
        root="/run/containerd/runc",
        no_pivot_root=True,
        no_new_keyring=True,
        shim_cgroup="/shims",
        io_uid=1000,
        io_gid=1001,
        criu_path="/usr/sbin/criu",
        criu_image_path="/var/images",
        criu_work_path="/var/work",
    )
    assert grit == GritOptions(
        engine="plugin",
        lock_timeout=2.5,
        dump_timeout=60.0,
        restore_timeout=90.0,
        criu="/opt/criu/bin/criu",
        criu_service="/run/criu.sock",
        plugin_dir="/usr/lib/criu",
        libcuda="/usr/lib/libcuda.so.1",
        cuda_checkpoint="/usr/bin/cuda-checkpoint",
        tcp="established",
        file_locks=True,
        ext_unix_sockets=True,
        link_remap=True,
        ghost_limit=64 << 20,
        memory="raise",
        on_missing_checkpoint="fail",
        on_mismatch="warn",
        download_timeout=300.0,
        agent_timeout=3.0,
        together_timeout=120.0,
        pause_timeout=900.0,
        checksum="sha256",
        prefault="off",
        lane="off",
        lane_from=1 << 20,
        lane_threads=4,
        lane_direct=True,
        lane_compression="auto",
        metrics="/var/lib/metrics",
        sign_key="/etc/grit/node.pem",
        verify_keys=("/etc/grit/a.pub", "/etc/grit/b.pub"),
        encryption_key_file="/etc/grit/key",
        encryption_key_command=("/usr/bin/key", "get"),
        old_encryption_keys=("/etc/grit/old-key",),
        scratch_dir="/var/scratch",
        checkpoint_roots=("/var/lib/checkpoints",),
        trusted_uids=(65534,),
        unpack_bytes=1 << 30,
        unpack_files=1000,
    )
    # The example above leaves no key out and keeps none at its default.
    assert all(getattr(runc, n) != getattr(RuncOptions, n) for n in RuncOptions.__annotations__)
    assert all(getattr(grit, n) != getattr(GritOptions, n) for n in GritOptions.__annotations__)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing set\n", "[grit]\n", "[options]\n"])
def test_nothing_set_is_all_defaults(text: str) -> None:
    assert parse(text, "grit.toml") == (RuncOptions(), GritOptions())


def test_runc_options_may_stand_under_options() -> None:
    runc, grit = parse('[options]\nSystemdCgroup = true\n[grit]\nengine = "driver"', "body")
    assert runc == RuncOptions(systemd_cgroup=True)
    assert grit == GritOptions(engine="driver")


def test_the_body_containerd_makes_of_the_options_table() -> None:
    body = (
        'TypeUrl = "containerd.runc.v1.Options"\nBinaryName = ""\nRoot = ""\nCriuPath = ""\n'
        "SystemdCgroup = true\nIoUid = 0\n\n[grit]\nlock_timeout = 3\n"
    )
    runc, grit = parse(body, "body")
    assert runc == RuncOptions(systemd_cgroup=True)
    assert grit == GritOptions(lock_timeout=3.0)


def test_an_empty_path_is_the_default() -> None:
    assert parse('grit = { criu_service = "", plugin_dir = "" }', "body")[1] == GritOptions()


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('\n\nBinaryNme = "x"', 3, "BinaryNme: is not a known key; did you mean BinaryName?"),
        ("systemdcgroup = true", 1, "systemdcgroup: is not a known key; did you mean Systemd"),
        ("systemd_cgroup = true", 1, "did you mean SystemdCgroup?"),
        ("[gritt]\nengine = 'auto'", 1, "gritt: is not a known key; did you mean grit?"),
        ("[grit]\n# lock_timout\nlock_timout = 3", 3, "did you mean lock_timeout?"),
        ("[grit]\nzzz = 3", 2, "those known here are engine, lock_timeout,"),
        ("[options]\nengine = 'auto'", 2, "[options] engine: is not a known key; those known"),
        ("\nengine = 'auto'", 2, "belongs under [grit], not at the top level"),
        ("grit = 3", 1, "grit: is 3; it must be a table, written [grit]"),
        ("[[grit]]\nengine = 'auto'", 1, "is an array; it must be a table"),
        ("options = true", 1, "is true; it must be a table, written [options]"),
        ("[grit]\nengine = 'nvidia'", 2, 'is "nvidia"; it must be one of "auto", "driver"'),
        ("[grit]\nengine = ['auto']", 2, "is an array; it must be one of"),
        ("[grit]\nlock_timeout = 0", 2, "is 0; it must be a number of seconds above 0"),
        ("[grit]\nlock_timeout = inf", 2, "is inf; it must be a number of seconds"),
        ("[grit]\nlock_timeout = nan", 2, "is nan; it must be a number of seconds"),
        ("[grit]\nlock_timeout = true", 2, "is true; it must be a number of seconds"),
        ("[grit]\nlock_timeout = '10s'", 2, 'is "10s"; it must be a number of seconds'),
        ("[grit]\nghost_limit = 4294967296", 2, "a whole number from 0 to 4294967295"),
        (f"[grit]\nghost_limit = 0x{'f' * 9000}", 2, "is a huge number; it must be a whole"),
        ("[grit]\nghost_limit = 1.5", 2, "is 1.5; it must be a whole number"),
        ("[grit]\nfile_locks = 1", 2, "is 1; it must be true or false"),
        ("[grit]\ncriu = 'bin/criu'", 2, "an absolute path, or a name without slashes"),
        ("[grit]\ncriu = ''", 2, "an absolute path, or a name without slashes"),
        ("[grit]\nplugin_dir = 'lib'", 2, 'an absolute path, or "" for the default'),
        ("[grit]\nverify_keys = '/a'", 2, 'is "/a"; it must be an array of absolute paths'),
        ("[grit]\nverify_keys = ['/a', 'b']", 2, "it must be an array of absolute paths"),
        ("[grit]\nverify_keys = ['']", 2, "it must be an array of absolute paths"),
        ("[grit]\ntrusted_uids = [-1]", 2, "it must be an array of user ids"),
        ("IoUid = -1", 1, "is -1; it must be a whole number from 0"),
        ("SystemdCgroup = 'yes'", 1, "it must be true or false"),
        ("Root = 'run'", 1, "an absolute path"),
        ('BinaryName = "a\\u0000b"', 1, "an absolute path, or a name without slashes"),
        ("Root = '/a'\n[options]\nRoot = '/b'", 3, "is set twice"),
        # Where a line cannot simply be searched for:
        ("grit.tcp = 'maybe'", 1, '[grit] tcp: is "maybe"'),
        ("grit = {file_locks = true, tcp = 1}", 1, "[grit] tcp: is 1"),
        ('# tcp\n"grit" = {"\\u0074cp" = 1}', 2, "[grit] tcp: is 1"),
        ('Root = """\ntcp = 1\n"""', 1, "an absolute path"),
        ("ShimCgroup = '''\n[grit]\ntcp = 1'''\n[grit]\ntcp = 1", 5, "[grit] tcp: is 1"),
        ("[options]\nRoot = '/tcp'\n[grit]\ntcp = [\n1,\n2]", 4, "[grit] tcp: is an array"),
        ("[grit]\n\n[grit.tcp]\nx = 1", 3, "[grit] tcp: is a table"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, line: int, message: str) -> None:
    error = refused(text)
    assert error.line == line
    assert str(error).startswith(f"grit.toml, line {line}: ")
    assert message in str(error)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[grit]\nengine = auto", 2),
        ("[grit\nengine = 'auto'", 1),
        ("\n\n= 3", 3),
        ("[grit]\nengine = 'auto'\nengine = 'auto'", 3),
        ("ShimCgroup = '''\n\n", 1),
        ("[grit]\ntcp = [\n'a',\n\n", 2),
        ("\r\n[grit]\r\nengine = \r\n", 3),
    ],
)
def test_a_syntax_error_has_its_line(text: str, line: int) -> None:
    error = refused(text)
    assert str(error).startswith(f"grit.toml, line {line}: is not valid TOML: ")


def test_absurd_nesting_is_an_error_like_any_other() -> None:
    assert "TOML" in str(refused("a = " + "[" * 20000))


def test_the_file_is_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "grit.toml"
    path.write_text(FULL)
    assert load(str(path)) == parse(FULL, "x")


def test_a_named_file_must_exist(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"grit.toml: there is no such file; create it, or corr"):
        load(str(tmp_path / "grit.toml"))


def test_the_usual_file_need_not_exist(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "grit.toml"))
    assert load() == (RuncOptions(), GritOptions())
    (tmp_path / "grit.toml").write_text("SystemdCgroup = true")
    assert load()[0] == RuncOptions(systemd_cgroup=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\n# caf\xe9\n", "line 2: this line is not UTF-8 text"),
        (b"#" * 100_000, "is larger than 65536 bytes"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: pathlib.Path, data: bytes, message: str) -> None:
    path = tmp_path / "grit.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_a_directory_cannot_be_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(str(tmp_path))


def test_settings_do_not_change() -> None:
    grit = GritOptions()
    with pytest.raises(AttributeError):
        grit.engine = "driver"
    with pytest.raises(AttributeError):
        del grit.engine
    with pytest.raises(TypeError, match="no enigne"):
        GritOptions(enigne="auto")
    assert hash(grit) == hash(GritOptions())
    assert grit != GritOptions(engine="driver") and grit != RuncOptions()


TOML_VALUE = st.one_of(
    st.booleans().map(lambda v: "true" if v else "false"),
    st.integers().map(str),
    st.floats().map(lambda v: repr(v) if "n" in repr(v) or "." in repr(v) else "1.0"),
    st.sampled_from(['"auto"', '"driver"', '"/a/b"', '""', "'x'", "[1, 2]", "[\n1,\n]", "{a = 1}"]),
    st.sampled_from(["'''\n'''", "1979-05-27", "07:32:00", "auto", '"', "[", "0x1F"]),
)
KEY = st.sampled_from([*config._RUNC, *config._GRIT, "x", '"a b"', "'é'", "grit.tcp", "a.b"])
LINE = st.one_of(
    st.tuples(KEY, TOML_VALUE).map(lambda pair: f"{pair[0]} = {pair[1]}"),
    st.sampled_from(["[grit]", "[options]", "[[grit]]", "[grit.x]", "# tcp", "", "]"]),
    st.text(max_size=20),
)


@given(st.one_of(st.text(), st.lists(LINE, max_size=12).map("\n".join)))
@example("a\n=")
def test_any_text_gives_settings_or_one_clear_error(text: str) -> None:
    """Never another exception, and a line that exists; a key's line holds the key's name."""
    try:
        runc, grit = parse(text, "grit.toml")
    except ConfigError as error:
        if error.key is not None:
            assert error.line is not None
        if error.line is not None:
            assert 1 <= error.line <= text.count("\n") + 1
        return
    assert isinstance(runc, RuncOptions) and isinstance(grit, GritOptions)
    tomllib.loads(text)


@given(st.integers(0, 15), st.sampled_from(sorted(config._GRIT)))
def test_the_line_of_a_key_is_found_wherever_it_stands(above: int, key: str) -> None:
    text = "[grit]\n" + f"# {key} = 1\n" * above + f"{key} = -1\n" + "# end\n" * 3
    assert refused(text).line == above + 2


def test_importing_it_stays_cheap() -> None:
    """The daemon of every container imports this module."""
    code = (
        "import sys; before = set(sys.modules); import shim.config; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=pathlib.Path(config.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) <= {"__future__", "shim", "shim.config"}
