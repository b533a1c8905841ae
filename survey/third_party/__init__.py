"""Architectures that others wrote, each as a stack and in a loop: `make check-third-party`."""
