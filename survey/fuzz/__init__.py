"""Random programs and random histories of a stack, next to a loop over the members: `make check-fuzz`."""
