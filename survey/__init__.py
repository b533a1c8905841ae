"""The big sweeps: what Memberwise does with all that torch has. They take minutes, and are no part of `make test`."""
