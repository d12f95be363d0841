"""Drives that come with the project, one TOML file each (see csd_device.config)."""
