"""Checks for who adds to Memberwise: rules against a loop, and the one table of tolerances."""

from memberwise.testing.rules import Checked, check_rule
from memberwise.testing.tolerance import assert_equal, tolerance

__all__ = ["Checked", "assert_equal", "check_rule", "tolerance"]
