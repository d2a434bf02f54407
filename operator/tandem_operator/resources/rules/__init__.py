"""The rules between fields, each once as CEL for the apiserver and once as Python."""

from tandem_operator.resources.rules.check import RULES, Violation, violations
from tandem_operator.resources.rules.rule import Rule

__all__ = ["RULES", "Rule", "Violation", "violations"]
