"""`csd`: the host's command line."""
