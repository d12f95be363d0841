"""`python -m csd_device.service`: the same as `csd-device`."""

from csd_device.service.cli import main

main()
