"""Opcodes, feature and log page identifiers, with NVMe's names.

The numbers stand in `proto/csd/v1/csd.proto`; a test holds these enums to it.
"""

from enum import IntEnum


class CommandSet(IntEnum):
    ADMIN = 0
    NVM = 1
    COMPUTE = 2


class AdminOpcode(IntEnum):
    GET_LOG_PAGE = 0x02
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT = 0x0C
    KEEP_ALIVE = 0x18
    CONNECT = 0x7F
    FORMAT = 0x80
    LOAD_PROGRAM = 0x85
    PROGRAM_ACTIVATION = 0x88
    MEMORY_RANGE_SET = 0x89


class NvmOpcode(IntEnum):
    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C
    COPY = 0x19
    DEFINE_PATTERNS = 0xC0
    WRITE_PATTERNS = 0xC1


class ComputeOpcode(IntEnum):
    EXECUTE_PROGRAM = 0x01
    PREDICT_AND_STAGE = 0xC0
    STAGE = 0xC1
    RELEASE = 0xC2
    HOST_RESIDENCY = 0xC3


class Cns(IntEnum):
    """What Identify is asked for; from C0h on vendor specific."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    WINDOW = 0xC0
    PROGRAMS = 0xC1


class LogPage(IntEnum):
    ERROR = 0x01
    SMART = 0x02
    TELEMETRY = 0x07
    ENDURANCE = 0x09
    EVENTS = 0x0D
    STAGE = 0xC0
    TRACE = 0xC2


class Feature(IntEnum):
    """What Set and Get Features are asked for; from C0h on vendor specific."""

    TEMPERATURE_THRESHOLD = 0x04
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    ASYNC_EVENT_CONFIGURATION = 0x0B
    FAULT_INJECTION = 0xC0
    TRACE = 0xC1
