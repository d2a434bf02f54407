"""How far the simulator is from machines and from other simulators, by device and engine."""
