"""Rollout and teacher actors: one engine each, and the messages around it."""
