"""Algorithms: pure settings with an `update(policy, optimizer, batch, generator) -> metrics`; torch alone."""
