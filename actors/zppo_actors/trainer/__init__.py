"""The trainer: finished windows in, new policy versions out."""
