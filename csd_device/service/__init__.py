"""The drive as a service: protobuf to commands and back, gRPC, the daemon and its command line."""
