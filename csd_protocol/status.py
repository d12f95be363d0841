"""Status codes: a status code type (SCT) and a status code (SC), with NVMe's names.

Sources: NVM Express Base 2.1, figures "Status Code" of each type; the program codes 8Ah to 9Bh are
the Computational Programs command set's. Command specific codes from C0h on are vendor specific.
"""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class StatusCode:
    """One (SCT, SC) pair. `retryable` is the default of a completion's inverted DNR bit."""

    sct: int
    sc: int
    title: str
    retryable: bool = False

    def __str__(self) -> str:
        return f"{self.title} ({self.sct}/{self.sc:02X}h)"


class Status(Enum):
    """Every status this command set uses."""

    SUCCESS = StatusCode(0, 0x00, "Successful Completion")
    INVALID_OPCODE = StatusCode(0, 0x01, "Invalid Command Opcode")
    INVALID_FIELD = StatusCode(0, 0x02, "Invalid Field in Command")
    CID_CONFLICT = StatusCode(0, 0x03, "Command ID Conflict")
    INTERNAL_ERROR = StatusCode(0, 0x06, "Internal Error")
    ABORT_REQUESTED = StatusCode(0, 0x07, "Command Abort Requested")
    SEQUENCE_ERROR = StatusCode(0, 0x0C, "Command Sequence Error")
    INVALID_NAMESPACE = StatusCode(0, 0x0B, "Invalid Namespace or Format")
    WRITE_PROTECTED = StatusCode(0, 0x20, "Namespace is Write Protected")
    LBA_OUT_OF_RANGE = StatusCode(0, 0x80, "LBA Out of Range")
    CAPACITY_EXCEEDED = StatusCode(0, 0x81, "Capacity Exceeded")
    QUEUE_FULL = StatusCode(0, 0xC0, "Submission Queue Full", retryable=True)
    PROTOCOL_VERSION = StatusCode(0, 0xC1, "Protocol Version Not Supported")

    ABORT_LIMIT = StatusCode(1, 0x03, "Abort Command Limit Exceeded", retryable=True)
    ASYNC_EVENT_LIMIT = StatusCode(1, 0x05, "Asynchronous Event Request Limit Exceeded")
    INVALID_LOG_PAGE = StatusCode(1, 0x09, "Invalid Log Page")
    INSUFFICIENT_PROGRAM_RESOURCES = StatusCode(1, 0x8A, "Insufficient Program Resources")
    INVALID_PROGRAM_DATA = StatusCode(1, 0x8E, "Invalid Program Data")
    INVALID_PROGRAM_INDEX = StatusCode(1, 0x8F, "Invalid Program Index")
    INVALID_PROGRAM_TYPE = StatusCode(1, 0x90, "Invalid Program Type")
    MEMORY_RANGE_SET_IN_USE = StatusCode(1, 0x95, "Memory Range Set In Use", retryable=True)
    NO_PROGRAM = StatusCode(1, 0x96, "No Program")
    PROGRAM_NOT_ACTIVATED = StatusCode(1, 0x98, "Program Not Activated")
    PROGRAM_IN_USE = StatusCode(1, 0x99, "Program In Use", retryable=True)
    PROGRAM_TOO_BIG = StatusCode(1, 0x9B, "Program Too Big")
    NO_MODEL = StatusCode(1, 0xC0, "No Such Packed Model")
    NO_SITE = StatusCode(1, 0xC1, "No Such Site or Unit")
    WINDOW_FULL = StatusCode(1, 0xC2, "Window Full", retryable=True)
    NO_LEASE = StatusCode(1, 0xC3, "No Such Lease")
    DRAM_EXCEEDED = StatusCode(1, 0xC4, "On-Drive DRAM Exceeded")
    WINDOW_UNAVAILABLE = StatusCode(1, 0xC5, "Window Unavailable", retryable=True)

    WRITE_FAULT = StatusCode(2, 0x80, "Write Fault")
    UNRECOVERED_READ = StatusCode(2, 0x81, "Unrecovered Read Error")
    GUARD_CHECK = StatusCode(2, 0x82, "End-to-end Guard Check Error")
    COMPARE_FAILURE = StatusCode(2, 0x85, "Compare Failure")
    UNWRITTEN_BLOCK = StatusCode(2, 0x87, "Deallocated or Unwritten Logical Block")

    HOST_PATH_ERROR = StatusCode(3, 0x70, "Host Pathing Error", retryable=True)

    @property
    def sct(self) -> int:
        return self.value.sct

    @property
    def sc(self) -> int:
        return self.value.sc

    def __str__(self) -> str:
        return str(self.value)


_BY_CODE = {(status.sct, status.sc): status for status in Status}


def describe(sct: int, sc: int) -> str:
    """The title and numbers of a status code, also of one that this version does not know."""
    known = _BY_CODE.get((sct, sc))
    return str(known) if known else f"status {sct}/{sc:02X}h"


def lookup(sct: int, sc: int) -> Status | None:
    """The status with these numbers, or None when this version does not know it."""
    return _BY_CODE.get((sct, sc))
