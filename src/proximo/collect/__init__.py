"""Collecting experience: environments behind one contract, and the rollout."""
