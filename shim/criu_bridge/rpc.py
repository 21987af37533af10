"""CRIU's RPC messages, as far as a checkpoint needs them: one protobuf per SEQPACKET message.

Field numbers, types and names are those of CRIU's wire (images/rpc.proto, the same from 4.0 to
4.2; `proto/criu_rpc.proto` is their description in our words and a test keeps the two in step).
Everything is proto2 there, so every field has explicit presence: None is not sent and CRIU then
applies its own default. This module must do no input or output.
"""

from __future__ import annotations

from shim.protowire import (
    Message,
    bool_,
    bytes_,
    enum,
    int32,
    message,
    optional,
    repeated,
    string,
    uint32,
)

# criu_req_type: what a request asks for and what a response answers.
EMPTY = 0
DUMP = 1
RESTORE = 2
CHECK = 3
PRE_DUMP = 4
PAGE_SERVER = 5
NOTIFY = 6
CPUINFO_DUMP = 7
CPUINFO_CHECK = 8
FEATURE_CHECK = 9
VERSION = 10
WAIT_PID = 11
PAGE_SERVER_CHLD = 12
SINGLE_PRE_DUMP = 13

# criu_cg_mode: how much of the cgroups goes into the images.
CG_IGNORE = 0
CG_NONE = 1
CG_PROPS = 2
CG_SOFT = 3
CG_FULL = 4
CG_STRICT = 5
CG_DEFAULT = 6

# criu_network_lock_method
LOCK_IPTABLES = 1
LOCK_NFTABLES = 2
LOCK_SKIP = 3


class ExtMountMap(Message):
    """An external mount: on a dump `key` is the mount point, `val` its name in the images."""

    key: str | None = optional(string(1))
    val: str | None = optional(string(2))


class JoinNs(Message):
    """A namespace to enter on restore instead of making one."""

    ns: str | None = optional(string(1))
    ns_file: str | None = optional(string(2))


class InheritFd(Message):
    """An open descriptor of the `criu swrk` process that takes the place of file `key`."""

    key: str | None = optional(string(1))
    fd: int | None = optional(int32(2))


class CgroupRoot(Message):
    """Where on restore the cgroups of controller `ctrl` are to hang."""

    ctrl: str | None = optional(string(1))
    path: str | None = optional(string(2))


class UnixSk(Message):
    """Inode of a unix socket whose peer may lie outside the container."""

    inode: int | None = optional(uint32(1))


class CriuOpts(Message):
    """Options of one dump or restore. Descriptors are numbers in the process that connected:
    CRIU opens them again through /proc/PID/fd."""

    images_dir_fd: int | None = optional(int32(1))
    pid: int | None = optional(int32(2))
    leave_running: bool | None = optional(bool_(3))
    ext_unix_sk: bool | None = optional(bool_(4))
    tcp_established: bool | None = optional(bool_(5))
    evasive_devices: bool | None = optional(bool_(6))
    shell_job: bool | None = optional(bool_(7))
    file_locks: bool | None = optional(bool_(8))
    log_level: int | None = optional(int32(9))
    log_file: str | None = optional(string(10))
    notify_scripts: bool | None = optional(bool_(12))
    root: str | None = optional(string(13))
    parent_img: str | None = optional(string(14))
    track_mem: bool | None = optional(bool_(15))
    auto_dedup: bool | None = optional(bool_(16))
    work_dir_fd: int | None = optional(int32(17))
    link_remap: bool | None = optional(bool_(18))
    ext_mnt: list[ExtMountMap] = repeated(message(23, ExtMountMap))
    manage_cgroups: bool | None = optional(bool_(24))
    cg_root: list[CgroupRoot] = repeated(message(25, CgroupRoot))
    rst_sibling: bool | None = optional(bool_(26))
    inherit_fd: list[InheritFd] = repeated(message(27, InheritFd))
    unix_sk_ino: list[UnixSk] = repeated(message(33, UnixSk))
    manage_cgroups_mode: int | None = optional(enum(34))
    ghost_limit: int | None = optional(uint32(35))
    external: list[str] = repeated(string(37))
    empty_ns: int | None = optional(uint32(38))
    join_ns: list[JoinNs] = repeated(message(39, JoinNs))
    freeze_cgroup: str | None = optional(string(44))
    timeout: int | None = optional(uint32(45))
    tcp_skip_in_flight: bool | None = optional(bool_(46))
    lazy_pages: bool | None = optional(bool_(48))
    orphan_pts_master: bool | None = optional(bool_(50))
    config_file: str | None = optional(string(51))
    tcp_close: bool | None = optional(bool_(52))
    lsm_profile: str | None = optional(string(53))
    lsm_mount_context: str | None = optional(string(63))
    network_lock: int | None = optional(enum(64))


class CriuFeatures(Message):
    """Asked for and answered in FEATURE_CHECK."""

    mem_track: bool | None = optional(bool_(1))
    lazy_pages: bool | None = optional(bool_(2))
    pidfd_store: bool | None = optional(bool_(3))


class CriuReq(Message):
    """What goes to CRIU: a request, or the answer to a notification."""

    type: int | None = optional(enum(1))
    opts: CriuOpts | None = message(2, CriuOpts)
    notify_success: bool | None = optional(bool_(3))
    keep_open: bool | None = optional(bool_(4))
    features: CriuFeatures | None = message(5, CriuFeatures)


class DumpResp(Message):
    restored: bool | None = optional(bool_(1))


class RestoreResp(Message):
    pid: int | None = optional(int32(1))


class Notify(Message):
    """CRIU has reached the point named by `script` and waits for the answer."""

    script: str | None = optional(string(1))
    pid: int | None = optional(int32(2))


class Version(Message):
    major_number: int | None = optional(int32(1))
    minor_number: int | None = optional(int32(2))
    gitid: str | None = optional(string(3))
    sublevel: int | None = optional(int32(4))


class CriuResp(Message):
    """What comes from CRIU: a notification, or the final answer.

    `cr_errmsg` is the first error line of CRIU's log; it quotes paths, which need not be
    UTF-8, hence bytes.
    """

    type: int | None = optional(enum(1))
    success: bool | None = optional(bool_(2))
    dump: DumpResp | None = message(3, DumpResp)
    restore: RestoreResp | None = message(4, RestoreResp)
    notify: Notify | None = message(5, Notify)
    cr_errno: int | None = optional(int32(7))
    features: CriuFeatures | None = message(8, CriuFeatures)
    cr_errmsg: bytes | None = optional(bytes_(9))
    version: Version | None = message(10, Version)
    status: int | None = optional(int32(11))
