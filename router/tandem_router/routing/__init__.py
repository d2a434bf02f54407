"""Which tier: scores, the policy's inputs, set-points, the record of decisions."""
