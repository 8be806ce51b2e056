"""What a process gives away before it handles bytes that a stranger wrote: files, programs, networks, other processes.

Not a promise that holds everywhere: each layer stands alone, is tried in turn and is left out where kernel or container
refuse it; what was reached is tried out and reported. `decode_child` enters it once its decoders are loaded, while it
still has a single thread; nothing else calls it.

The layers, from Linux's man pages and kernel documentation: an own mount, network and IPC namespace with an empty,
read-only root (with a user namespace where the user is not root); another user where the user is root, no capabilities
otherwise; Landlock without a single rule; not dumpable, so that processes of the same user cannot look in; a seccomp
filter. Seccomp and Landlock need no rights at all, and most containers allow them.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress

# Of root's children; it owns nothing and belongs to no group.
_NOBODY = 65534
# A child opens no files of its own; a media file, a log, a connection and a few that libraries keep are all.
_MAX_OPEN_FILES = 64

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_CLONE_THREAD = 0x10000
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 1 << 14, 1 << 18
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446

# System calls that decoding never makes: the number on x86_64 and on aarch64, which has neither fork nor vfork.
_REFUSED: Mapping[str, tuple[int, int | None]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "io_uring_setup": (425, 425),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "fork": (57, None),
    "vfork": (58, None),
}
# AUDIT_ARCH_*, the column above, and the numbers of clone, kill and tgkill, whose arguments are looked at.
_ARCHITECTURES: Mapping[str, tuple[int, int, tuple[int, int, int]]] = {
    "x86_64": (0xC000003E, 0, (56, 62, 234)),
    "aarch64": (0xC00000B7, 1, (220, 129, 131)),
}
# The same everywhere; its arguments cannot be looked at.
_CLONE3 = 435
_X32_SYSCALLS = 0x40000000
_EPERM, _ENOSYS = 1, 38


def limit_resources(memory_bytes: int, file_bytes: int) -> None:
    """No core dumps, and at most so much address space and so many bytes in any file; for the rest of the process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def limit_cpu_time(more_s: float) -> None:
    """The kernel ends this process by SIGXCPU once it has computed for so long from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + more_s) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))


def end_with_parent(parent_pid: int) -> bool:
    """Asks the kernel to kill this process when the thread that started it ends; False where it cannot.

    The *thread* counts, so it must live as long as this process shall. A change of user clears the wish.
    """
    is_set = bool(_libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0)
    if os.getppid() != parent_pid:
        os._exit(1)
    return is_set


def enter(parent_pid: int) -> dict[str, object]:
    """Gives away every right that computing on open descriptors does not need; returns the report of it.

    What is not imported or opened by now cannot be any more.

    Returns:
        "layers": the names of the layers in force; "network", "files", "processes": "refused", or "open: " and what
        is possible, found out by trying; "user": the id it runs as; "dies_with_parent"; "environment": names.
    """
    parent_files = f"/proc/{parent_pid}/environ"
    layers = []
    for layer in (_empty_root, _nobody, _landlock):
        with suppress(OSError):
            layers.append(layer())
    # Behind the change of user, which would undo both.
    dies_with_parent = end_with_parent(parent_pid)
    if _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0:
        layers.append("not dumpable")
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN_FILES, _MAX_OPEN_FILES))
    with suppress(OSError):
        layers.append(_seccomp())
    return {
        "layers": layers,
        "network": _tried(lambda: socket.socket().close(), "sockets can be made"),
        "files": _tried(_look_around, "what its user can read is readable"),
        "processes": _tried(lambda: os.close(os.open(parent_files, os.O_RDONLY)), "its parent's memory is readable"),
        "user": os.getuid(),
        "dies_with_parent": dies_with_parent,
        "environment": sorted(os.environ),
    }


def is_tight(report: Mapping[str, object]) -> bool:
    """Whether neither network nor files nor other processes can be reached, by a report of `enter`."""
    return all(report.get(name) == "refused" for name in ("network", "files", "processes"))


def in_words(report: Mapping[str, object]) -> str:
    """A report of `enter` in one line."""
    layers = report.get("layers")
    names = ", ".join(map(str, layers)) if isinstance(layers, list) and layers else "no layer at all"
    loose = [
        f"{name} {report.get(name)}" for name in ("network", "files", "processes") if report.get(name) != "refused"
    ]
    return names + "".join(f"; {text}" for text in loose)


def _tried(act: Callable[[], None], possible: str) -> str:
    try:
        act()
    except OSError:
        return "refused"
    return f"open: {possible}"


def _look_around() -> None:
    if not os.listdir("/"):
        raise FileNotFoundError("the root is empty")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _empty_root() -> str:
    """An own view of mounts, network and IPC, rooted in an empty folder that cannot be written.

    Raises:
        OSError: the kernel or a container's filter does not allow it.
    """
    libc = _libc()
    flags = _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC
    _checked(libc.unshare(flags | (0 if os.geteuid() == 0 else _CLONE_NEWUSER)))
    _checked(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    # Any folder will do that exists everywhere; /proc is better hidden as well.
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _checked(libc.mount(b"none", b"/proc", b"tmpfs", flags, b"mode=0555,size=4k"))
    os.chroot("/proc")
    os.chdir("/")
    return "empty root"


def _nobody() -> str:
    """Another user where this one is root; otherwise no capability, neither own ones nor those of a namespace.

    Raises:
        OSError: the container's root has no such right.
    """
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        return "another user"
    header = ctypes.create_string_buffer(struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0))
    _checked(_libc().capset(header, ctypes.create_string_buffer(24)))
    return "no capabilities"


def _landlock() -> str:
    """Refuses every path, and with newer kernels TCP, abstract sockets and signals to the outside.

    Raises:
        OSError: the kernel has no Landlock, or it is switched off.
    """
    libc = _libc()
    version = _checked(libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))
    # By version: the rights that a ruleset can name, from linux/landlock.h.
    num_file_rights = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    rules = struct.pack("=QQQ", (1 << num_file_rights) - 1, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = ctypes.create_string_buffer(rules, len(rules))
    ruleset = _checked(libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    try:
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return f"landlock {version}"


def _filter(machine: str, pid: int) -> bytes:
    """A classic BPF program: what is refused, threads but no processes, signals to itself alone, one architecture.

    The layouts are those of `struct sock_filter` and `struct seccomp_data` in Linux's linux/filter.h and seccomp.h.
    """
    load, jump_if_equal, jump_if_at_least, jump_if_any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    architecture, column, (clone, kill, tgkill) = _ARCHITECTURES[machine]
    refused = [number for numbers in _REFUSED.values() if (number := numbers[column]) is not None]
    # Steps by name of the place that they jump to; jumps count from the step behind the jump.
    steps: list[tuple[int, str | None, str | None, int]] = [
        (load, None, None, 4),
        (jump_if_equal, None, "refuse", architecture),
        (load, None, None, 0),
        (jump_if_at_least, "refuse", None, _X32_SYSCALLS),
        (jump_if_equal, "missing", None, _CLONE3),
        (jump_if_equal, "thread?", None, clone),
        (jump_if_equal, "itself?", None, kill),
        (jump_if_equal, "itself?", None, tgkill),
        *((jump_if_equal, "refuse", None, number) for number in refused),
    ]
    places = {"allow": len(steps)}
    steps.append((answer, None, None, 0x7FFF0000))
    places["refuse"] = len(steps)
    steps.append((answer, None, None, 0x00050000 | _EPERM))
    # glibc takes clone instead, whose flags can be looked at.
    places["missing"] = len(steps)
    steps.append((answer, None, None, 0x00050000 | _ENOSYS))
    # Jumps go forwards only, so these answer for themselves. The first argument begins at byte 16.
    for name, test, value in (("thread?", jump_if_any_bit, _CLONE_THREAD), ("itself?", jump_if_equal, pid)):
        places[name] = len(steps)
        steps += [
            (load, None, None, 16),
            (test, None, f"not {name}", value),
            (answer, None, None, 0x7FFF0000),
        ]
        places[f"not {name}"] = len(steps)
        steps.append((answer, None, None, 0x00050000 | _EPERM))

    def jump(here: int, to: str | None) -> int:
        return 0 if to is None else places[to] - here - 1

    return b"".join(
        struct.pack("=HBBI", code, jump(here, if_true), jump(here, if_false), value)
        for here, (code, if_true, if_false, value) in enumerate(steps)
    )


def _seccomp() -> str:
    """Installs the filter for this process and all its threads to come.

    Raises:
        OSError: the kernel refused it, or there is none for this architecture.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(_ENOSYS, f"there is no filter for {machine}")
    code = _filter(machine, os.getpid())
    steps = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count, padding, a pointer.
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(steps)))
    libc = _libc()
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))
    return "seccomp"
