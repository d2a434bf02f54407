"""What would happen: a trace replayed against a plan on a virtual clock.

Nothing here decides: the routing policy, the picker, the scheduler, the block manager and the
autoscaler are the objects that the services use. What is modelled is what they run on: how long a
step takes (`profiles`), how long blocks travel, how long a pod takes to start.
"""
