"""Takes from the helper process what no driver call needs, for good: it loads the driver's library,
and stops and looks into processes of containers.

What the driver may need stays: CAP_SYS_PTRACE above all, CAP_SYS_ADMIN, and CAP_SYS_MODULE and
CAP_MKNOD, since the library runs nvidia-modprobe where a device file or module is missing.
"""

from __future__ import annotations

# <linux/capability.h>
NEEDLESS = {
    "LINUX_IMMUTABLE": 9,
    "NET_BIND_SERVICE": 10,
    "NET_BROADCAST": 11,
    "NET_ADMIN": 12,
    "NET_RAW": 13,
    "SYS_PACCT": 20,
    "SYS_BOOT": 22,
    "SYS_TIME": 25,
    "SYS_TTY_CONFIG": 26,
    "LEASE": 28,
    "AUDIT_WRITE": 29,
    "AUDIT_CONTROL": 30,
    "SETFCAP": 31,
    "MAC_OVERRIDE": 32,
    "MAC_ADMIN": 33,
    "SYSLOG": 34,
    "WAKE_ALARM": 35,
    "BLOCK_SUSPEND": 36,
    "AUDIT_READ": 37,
    "BPF": 39,
}

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_VERSION_3 = 0x20080522


def drop() -> None:
    """From this process (all of it, if called before it has threads) and all it will start. What
    the kernel does not know, or does not let us drop, stays: then we have less already."""
    import ctypes
    import struct

    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    needless = 0
    for number in NEEDLESS.values():
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)  # or a program that root starts gets it back
        needless |= 1 << number
    header = struct.pack("=Ii", _VERSION_3, 0)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; low, then high half
    if libc.capget(header, sets):
        return
    kept = []
    for index, word in enumerate(struct.unpack("=6I", sets.raw)):
        kept.append(word & ~(needless >> (32 * (index // 3))) & 0xFFFFFFFF)
    libc.capset(header, struct.pack("=6I", *kept))
