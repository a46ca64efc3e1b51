"""Question and candidates → prompt → token ids."""
