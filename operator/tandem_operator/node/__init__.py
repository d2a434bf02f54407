"""A node that runs the containers of pods as local processes.

It takes pod objects and reports pod statuses; where the pods come from, the in-process cluster of
local mode or a real control plane, is not its business.
"""

from tandem_operator.node.images import ImageTable
from tandem_operator.node.node import Node, NodeSettings

__all__ = ["ImageTable", "Node", "NodeSettings"]
