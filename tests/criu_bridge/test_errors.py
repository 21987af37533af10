"""The first error of a log, and the words for it. The lines are CRIU's, from real logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from shim.criu_bridge.errors import error_lines, explain, first_error, read_log

RLIMIT = (
    "(00.000684) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: "
    "Operation not permitted\n"
)
TUN = "(00.005147) Error (criu/tun.c:85): tun: Unable to create tun: No such file or directory\n"
FAILED = "(00.081794) Error (criu/cr-dump.c:2111): Dumping FAILED.\n"


def test_first_error_has_no_time_and_skips_what_is_harmless() -> None:
    log = (
        "(00.000001) Version: 4.1.1\n"
        + RLIMIT
        + "(00.000735) Warn  (criu/kerndat.c:1): Error is not at the start\n"
        + "(00.008948) Error (criu/files-reg.c:1790): Can't lookup mount=71 for fd=2 path=/x\n"
        + FAILED
    )
    assert first_error(log) == (
        "Error (criu/files-reg.c:1790): Can't lookup mount=71 for fd=2 path=/x"
    )
    assert len(error_lines(log)) == 2


def test_a_process_without_cuda_is_not_why_a_dump_failed() -> None:
    asked = "(00.1) Error (cuda_plugin.c:222): cuda_plugin: Failed to launch cuda-checkpoint to "
    asked += "retrieve restore tid: cuda-checkpoint: pid 82: "
    nested = "(03.8) Error (criu/namespaces.c:460): Can't dump nested pid namespace for 84\n"
    log = asked + "no CUDA (by the record of the suspension, /run/x)\n" + nested + FAILED
    assert (first_error(log) or "").endswith("Can't dump nested pid namespace for 84")
    assert "pid namespace of its own" in (explain(log) or "")
    assert "cuda_plugin" in (first_error(asked + "the record is gone\n" + nested) or "")


def test_errors_of_parasites_and_of_children_count() -> None:
    assert first_error("(00.1) pie: 12: Error (criu/pie/parasite.c:1): no\n") == (
        "Error (criu/pie/parasite.c:1): no"
    )
    assert first_error("(00.01234)     12: Error (criu/x.c:1): no\n") == "Error (criu/x.c:1): no"


def test_no_error() -> None:
    assert first_error("(00.000001) Dumping finished successfully\n") is None
    assert first_error(TUN + RLIMIT) is None
    assert explain("") is None
    assert explain(FAILED) is None


def test_what_is_no_error_explains_nothing() -> None:
    assert explain("(00.1) Dumping path for 3 fd via self 9 [/dev/nvidia0]\n" + FAILED) is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Error (criu/sk-unix.c:874): unix: External socket is used. Consider", "ext_unix_sk"),
        ("Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider", "tcp_established"),
        ("Error (criu/sk-inet.c:185): inet: In-flight connection (l) for 2f", "skip_in_flight"),
        (
            "Error (criu/files-ext.c:98): Can't dump file 5 of that type [20666] (chr 195:255)",
            "GPU's device files",
        ),
        (
            "Error (criu/files-ext.c:98): Can't dump file 5 of that type [20666] (chr 510:0)",
            "device file that CRIU cannot dump",
        ),
        (
            (
                "Error (criu/files-ext.c:98): Can't dump file 4 of that type [600] "
                "(anon anon_inode:[io_uring])"
            ),
            "io_uring",
        ),
        (
            (
                "Error (criu/files-reg.c:1031): Can't dump ghost file /x of 2097152 size, "
                "increase limit"
            ),
            "ghost_limit",
        ),
        ("Error (criu/file-lock.c:362): Some file locks are hold by dumping", "file_locks"),
        (
            "Error (cuda_plugin.c:453): cuda_plugin: PAUSE_DEVICES failed with timed out",
            "lock in time",
        ),
        ("Error (cuda_plugin.c:397): cuda_plugin: CHECKPOINT_DEVICES failed", "cuda-checkpoint"),
        (
            (
                "Error (criu/page-xfer.c:252): page-xfer: Unable to spice data (-1): "
                "No space left on device"
            ),
            "full",
        ),
        ("Error (criu/image.c:198): Missing required plugin: cuda_plugin", "libdir"),
        ("Error (criu/mount.c:753): mnt: 71:/x doesn't have a proper root mount", "external"),
        ("Error (criu/mount.c:3141): mnt: No mapping for 71:/x mountpoint", "external mount"),
    ],
)
def test_explanations(line: str, words: str) -> None:
    assert words in (explain(f"(00.1) {line}\n{FAILED}") or "")


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(str(tmp_path / "dump.log")) == ""
