"""Checks for who adds to Memberwise: rules against a loop, a mode in which no broken rule hides, and the table
of tolerances."""

from memberwise.engine.strict import strict
from memberwise.testing.rules import Checked, check_rule
from memberwise.testing.tolerance import assert_equal, tolerance

__all__ = ["Checked", "assert_equal", "check_rule", "strict", "tolerance"]
