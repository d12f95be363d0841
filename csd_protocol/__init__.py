"""What a drive and its host must agree on, and nothing else.

The command set (`opcodes`, `status`, the generated stubs in `csd.v1`), the packed-model format
(`packed`), CRC32C (`crc32c`) and units of measure (`units`).
"""

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
