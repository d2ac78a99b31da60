"""Program of the sandbox's process: confines itself, then runs the Python code on its standard input.

It imports nothing of ours, so that it starts within milliseconds. `seccomp` filters the system calls: a call that
reaches the network, another program or process, or changes the file system, fails with EPERM.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
import traceback

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in seccomp_data
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CLONE_THREAD = 0x10000
X32 = 0x40000000  # further numbers of the same calls, on x86_64 alone

REFUSED = {
    "x86_64": (
        *(41, 42, 44, 46, 49, 53),  # socket connect sendto sendmsg bind socketpair
        *(57, 58, 59, 322),  # fork vfork execve execveat
        *(62, 200, 234, 101, 310, 311, 434),  # kill tkill tgkill ptrace process_vm_readv process_vm_writev pidfd_open
        *(76, 77, 285, 82, 264, 316),  # truncate ftruncate fallocate rename renameat renameat2
        *(83, 258, 84, 85, 86, 265, 87, 263, 88, 266),  # mkdir(at) rmdir creat link(at) unlink(at) symlink(at)
        *(90, 91, 268, 452, 92, 93, 94, 260, 132, 235, 261, 280),  # chmod and chown and utime of all kinds
        *(133, 259, 161, 165, 166, 188, 189, 190),  # mknod(at) chroot mount umount2 setxattr of all kinds
        *(160, 302, 321, 425),  # setrlimit prlimit64 bpf io_uring_setup
    ),
    "aarch64": (
        *(198, 199, 200, 203, 206, 211),
        *(221, 281),
        *(129, 130, 131, 117, 270, 271, 434),
        *(45, 46, 47, 38, 276),
        *(33, 34, 35, 36, 37),
        *(52, 53, 452, 54, 55, 88),
        *(51, 39, 40, 5, 6, 7),
        *(164, 261, 280, 425),
    ),
}
UNKNOWN = (435, 437)  # clone3 and openat2: their flags lie in memory; libraries fall back to the older calls
CHECKED = {
    "x86_64": ((2, 1, WRITES), (257, 2, WRITES)),  # open, openat: number, argument, refused bits
    "aarch64": ((56, 2, WRITES),),
}
CLONE = {"x86_64": 56, "aarch64": 220}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter: (code, jump if true, jump if false, operand) each."""
    refuse, unknown = REFUSE | errno.EPERM, REFUSE | errno.ENOSYS
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, AUDIT[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, refuse)]
    for number in REFUSED[machine]:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, refuse)]
    for number in UNKNOWN:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, unknown)]
    for number, argument, bits in CHECKED[machine]:
        program += [(EQUAL, 0, 4, number), (LOAD, 0, 0, ARGUMENTS + 8 * argument), (ANY_BIT, 0, 1, bits)]
        program += [(RETURN, 0, 0, refuse), (RETURN, 0, 0, ALLOW)]
    program += [(EQUAL, 0, 3, CLONE[machine]), (LOAD, 0, 0, ARGUMENTS), (ANY_BIT, 1, 0, CLONE_THREAD)]
    return [*program, (RETURN, 0, 0, refuse), (RETURN, 0, 0, ALLOW)]


def confine(machine: str) -> None:
    """Installs the filter. Raises OSError where the kernel has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = instructions(machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.addressof(header), 0, 0)):  # no new privileges; seccomp
        if libc.prctl(*map(ctypes.c_ulong, arguments)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main(seconds: int, memory: int, no_sandbox: int) -> None:
    """Runs the code on standard input within `seconds` of processor time and `memory` bytes."""
    code = sys.stdin.buffer.read().decode()
    machine = platform.machine()
    if sys.platform != "linux" or machine not in AUDIT:
        print(f"it is {sys.platform} on {machine}, not Linux on x86_64 or aarch64", flush=True)
        os._exit(no_sandbox)
    limits = {"AS": memory, "FSIZE": 0, "CORE": 0, "NOFILE": 64}
    try:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        # At the first limit the kernel sends SIGXCPU, which says why; at the second SIGKILL, which no handler stops.
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        confine(machine)
    except (OSError, ValueError) as error:
        print(f"the kernel refuses it: {error}", flush=True)
        os._exit(no_sandbox)
    try:
        exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException as error:  # whatever the model's code raises; without the frames of this file
        frames = error.__traceback__ and error.__traceback__.tb_next
        print("".join(traceback.format_exception(type(error), error, frames)), end="")
        sys.exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
