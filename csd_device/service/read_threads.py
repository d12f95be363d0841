"""Threads for direct reads of the media, which nothing beneath the service may start."""

from concurrent.futures import ThreadPoolExecutor

from csd_device.nand.direct_media import Begin

READ_THREADS = 8  # reads under way at once; started as they are needed


def in_threads(count: int = READ_THREADS) -> Begin:
    """Has work done by `count` threads, in the order in which it comes."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="csd-media")
    return lambda work: pool.submit(work).result
