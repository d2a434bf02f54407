"""Which tokens are computed next, and in which KV blocks. Pure: no torch, no clock."""
