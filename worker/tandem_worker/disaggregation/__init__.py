"""Prefill and decode on two workers: the order, the reservation, the push."""
